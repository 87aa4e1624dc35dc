# SPDX-License-Identifier: Apache-2.0
"""Measures the time that the trainer adds to a step, in milliseconds."""

import itertools
import statistics
import tempfile
import time
from typing import Any

import torch

from hf_ssl.data import open_source, train_loader
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, build_trainer
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.optimizers import build_optimizer
from hf_ssl.trainer.trainer import SSLTrainer
from training.benchmarks.pairs import quartiles

SHORT, LONG = 100, 500
AIM_MILLISECONDS = 1.0  # 2 % of a step of 50 ms
DEEP = (  # about 200 small tensors, so that the overhead is large compared with the computation
    "backbone={model_type: resnet, layer_type: basic, embedding_size: 8, "
    "depths: [8, 8], hidden_sizes: [8, 16]}"
)


def trainer_overhead(repeats: int = 5) -> dict[str, Any]:
    """Return the milliseconds that SSLTrainer (hooks, a log record every tenth step, clock) adds to a step.

    The bare loop has the same loader, views, model and optimizer. The difference between a long and a short
    run excludes the time of the start. The result also contains the monitor's fraction of the training time
    at the default interval.
    """
    # With several threads, the CPU time would include the busy waiting of idle threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    extra = []
    for _ in range(repeats):
        trained = _trained(LONG) - _trained(SHORT)
        bare = _bare(LONG) - _bare(SHORT)
        extra.append(1000 * (trained - bare) / (LONG - SHORT))
    torch.set_num_threads(threads)
    low, middle, high = quartiles(extra)
    return {
        "extra_milliseconds": middle,
        "extra_low": low,
        "extra_high": high,
        "bare_milliseconds": 1000 * bare / (LONG - SHORT),
        "share_of_50_ms_step": middle / 50,
        "monitor_share": statistics.median(_monitor_share() for _ in range(3)),
        "aim_milliseconds": AIM_MILLISECONDS,
        "pairs": repeats,
    }


def _recipe(steps: int, folder: str) -> Any:
    return load_recipe(
        "smoke/simclr",
        [
            DEEP,
            f"training.output_dir={folder}",
            f"training.max_steps={steps}",
            "training.monitor_steps=0",
            "training.batch_size=4",
            "training.save_strategy='no'",
            "training.disable_tqdm=true",
            "training.logging_steps=10",
        ],
    )


def _trained(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(steps, folder)
        source = open_source(recipe.data)
        trainer = SSLTrainer(
            build_model(recipe, 0), recipe.training_arguments(), train_dataset=source, data=recipe.data
        )
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def _bare(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(steps, folder)
        args, source = recipe.training_arguments(), open_source(recipe.data)
        model = build_model(recipe, 0).to(args.device, memory_format=torch.channels_last).train()
        optimizer = build_optimizer(model, args)
        batch_size = args.per_device_train_batch_size
        loader = train_loader(source, recipe.views, config=recipe.data, seed=0, batch_size=batch_size)
        start = time.process_time()
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
        for batch in itertools.islice(endless, steps):
            model(**batch.inputs(args.device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - start


def _monitor_share() -> float:
    """Return the time of one measurement, divided by the time of the steps between two measurements.

    Network and settings are those of the demo.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = 20
        overrides = [
            f"training.output_dir={folder}",
            f"training.max_steps={steps}",
            "training.disable_tqdm=true",
        ]
        recipe = load_recipe("demo", [*overrides, "training.save_strategy='no'"])
        args = recipe.training_arguments()
        interval, args.eval_strategy, args.eval_on_start = SSLTrainingArguments.monitor_steps, "no", False
        trainer = build_trainer(recipe, args)
        start = time.process_time()
        trainer.train()
        middle = time.process_time()
        trainer.evaluate()
        return (time.process_time() - middle) / ((middle - start) / steps * interval)
