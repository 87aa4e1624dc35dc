# SPDX-License-Identifier: Apache-2.0
"""Measures memory and time of a streamed run: `python -m training.benchmarks.streaming [--images 10000]`.

The program trains a tiny network for one epoch on Parquet files of each size. So the loading of images
dominates the measurement. The memory should stay constant, and the time per image should not depend on the
size. The program writes streaming.json and streaming.png.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from hf_ssl.cards import environment
from hf_ssl.data import open_source
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model
from hf_ssl.trainer.trainer import SSLTrainer
from training.benchmarks.images import parquet_of_small_images
from training.benchmarks.peak import memory_mib
from training.benchmarks.report import RESULTS

BATCH = 100
POINTS = 50  # number of points of the curve


class Memory(TrainerCallback):
    """Records resident memory and CPU time after every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.images: list[int] = []
        self.mib: list[float] = []
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self.images.append(state.global_step * BATCH)
            self.mib.append(memory_mib("RssAnon"))  # without mapped files
            self.seconds.append(time.process_time())


def streamed_pass(data: Path, images: int) -> dict[str, Any]:
    """Return the record of one epoch of `images` images."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        memory = _trained(data, Path(folder), images)
    start = len(memory.mib) // 5  # the shuffle buffer is full at this point
    seconds = memory.seconds[-1] - memory.seconds[start]
    return {
        "images": images,
        "first_mib": memory.mib[start],
        "last_mib": memory.mib[-1],
        "microseconds_an_image": 1e6 * seconds / (memory.images[-1] - memory.images[start]),
        "curve": {"images": memory.images, "mib": [round(value, 1) for value in memory.mib]},
    }


def _trained(data: Path, folder: Path, images: int) -> Memory:
    recipe = load_recipe(
        "smoke/simclr",
        [
            f"data.path={data}",
            "data.streaming=true",
            "views={size: 32}",
            f"training.output_dir={folder / 'run'}",
            f"training.batch_size={BATCH}",
            f"training.max_steps={images // BATCH}",
            "training.monitor_steps=0",
            "training.save_strategy='no'",
            "training.disable_tqdm=true",
            "training.logging_steps=100",
        ],
    )
    memory = Memory(max(1, images // BATCH // POINTS))
    source = open_source(recipe.data)
    trainer = SSLTrainer(
        build_model(recipe, 0),
        recipe.training_arguments(),
        train_dataset=source,
        data=recipe.data,
        callbacks=[memory],
    )
    trainer.train()
    return memory


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Draw the memory over the number of images, with one line per size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for record in records:
        label = f"{record['images']:,} images, {record['microseconds_an_image']:.0f} µs each"
        axes.plot(record["curve"]["images"], record["curve"]["mib"], label=label)
    axes.set(xlabel="images read", ylabel="resident memory, MiB", ylim=(0, None), xscale="log")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = []
    datasets.disable_progress_bars()
    for images in arguments.images:
        # Each size has a new process, so that the memory excludes the creation of the data set.
        fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with tempfile.TemporaryDirectory() as folder, fresh as process:
            data = parquet_of_small_images(Path(folder) / str(images), images)
            records.append(process.submit(streamed_pass, data, images).result())
        print({key: value for key, value in records[-1].items() if key != "curve"}, flush=True)
    record = {"machine": environment(), "runs": records}
    (arguments.output / "streaming.json").write_text(json.dumps(record) + "\n")
    draw(records, arguments.output / "streaming.png")


if __name__ == "__main__":
    main()
