# SPDX-License-Identifier: Apache-2.0
"""Chooses precision, loader workers, batch size and monitor images for the machine of a run.

A recipe states the settings of its paper, for the paper's machines. This module chooses the values that the
user did not set. It uses the number of images, the device, its free memory and the measured time of a step.
The main process chooses, and all processes use its choice. `_run.json` stores the choice. A resumed run uses
the same one.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import set_seed

from hf_ssl.data import Source
from hf_ssl.data.batch import ProcessShare
from hf_ssl.data.loader import holds_batch, too_few_images
from hf_ssl.errors import UserError, counted
from hf_ssl.modeling.activation_checkpoints import supports_checkpointing
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.modeling.fast_layers import choose_attention, use_fast_convnext_layers
from hf_ssl.modeling.gather import from_first_process
from hf_ssl.precision import AUTO, fastest_precision, launched_precision
from hf_ssl.resources import own_cores, processes_here
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.step_cost import StepCost, checkpoints_activations

STEP_SECONDS = 30.0
"""Longest time of a training step on a CPU, in seconds. A batch size that needs more time is reduced."""
FIRST_MEASUREMENT_SHARE, FIRST_MEASUREMENT_SECONDS = 0.05, (2.0, 10.0)
"""Longest time of the monitor's first measurement, as a fraction of the planned run. The limit is always
between 2 and 10 seconds, because a run of one minute also needs a monitor.
"""
MONITOR_IMAGES = 512
"""Number of training images that the monitor embeds, unless this takes too long."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
_STEP_MARGIN = 1.5
"""Factor for the parts of a step that the measurement does not contain: loading, objective and optimizer."""
_FEWEST = {"images": 32, "bank": 100, "queries": 50}
_MOST_WORKERS = 12


class Choice(TypedDict):
    """A value that was chosen for this machine, and the reason."""

    value: Any
    reason: str


Choices = dict[str, Choice]
"""Maps a recipe key, e.g. "training.precision", to the choice.

One further key is in no recipe: "monitor.probe_images", the number of training images of the monitor. It has
an old name, because `_run.json` stores it.
"""


def choose_precision(args: SSLTrainingArguments) -> Choices:
    """Choose and set the precision if `args.precision` is `auto`. Return the choice, or {} otherwise."""
    if args.precision != AUTO:
        return {}
    launched = launched_precision()
    if launched is not None:
        args.use_precision(launched)
        reason = "--mixed_precision of accelerate launch selects it"
        return {"training.precision": {"value": launched, "reason": reason}}
    found = fastest_precision(args.device.type)
    choice: Choice = {"value": found.name, "reason": found.reason}
    if found.name in args.excluded_precisions:
        choice = {"value": "float32", "reason": f"{found.name} is excluded by the training arguments"}
    choice = from_first_process(choice)
    args.use_precision(choice["value"])
    return {"training.precision": choice}


def choose_workers(args: SSLTrainingArguments, *, small: bool) -> Choices:
    """Choose and set the number of workers if `args.dataloader_num_workers` is `auto`.

    Return the choice, or {} otherwise. With training on a CPU, small images need no workers. The training
    process assembles a batch faster than it receives one from a worker. Workers would also compete with the
    training step for the cores. With training on an accelerator, two workers are enough for small images.

    Args:
        args: the training arguments.
        small: whether all images are small and of one size (`hf_ssl.data.batch.MAX_SMALL_SIDE`).
    """
    if args.dataloader_num_workers != AUTO:
        return {}
    cores = own_cores()
    on_cpu = args.device.type == "cpu"
    most = (0 if small else 2) if on_cpu else (2 if small else _MOST_WORKERS)
    number = min(most, cores - 1)
    if args.dataloader_prefetch_factor is not None or args.dataloader_multiprocessing_context is not None:
        number = max(1, number)  # both arguments have an effect only with workers
    use = ", which training also uses" if on_cpu else ""
    reason = f"{'small' if small else 'large'} images, {counted(cores, 'core')}{use}"
    choice = from_first_process(Choice(value=max(0, number), reason=reason))
    args.dataloader_num_workers = choice["value"]
    return {"training.dataloader_num_workers": choice}


def choose_batch_size(
    args: SSLTrainingArguments, cost: StepCost, images: int | None, *, free_bytes: float
) -> Choices:
    """Reduce a recipe's batch size if the data, the memory or (on a CPU) the time of a step do not allow it.

    The reduced size per process and accumulation step is the largest possible power of two. If
    `args.base_learning_rate` is set, `args.learning_rate_rule` computes the learning rate for it. Return the
    choice, or {} if the recipe's batch size fits.

    Args:
        args: the training arguments; their batch size and learning rate are changed.
        cost: cost of one image.
        images: number of images in the data set; None for a stream of unknown length.
        free_bytes: free memory of the device.
    """
    micro_batches = args.micro_batches
    limits: list[tuple[float, str]] = []
    if images is not None:
        limits.append((images, f"there {'is' if images == 1 else 'are'} {counted(images, 'image')}"))
    if args.contrastive_chunk_size is None and cost.step_bytes > 0:
        fitting = cost.fitting_images(free_bytes)
        gib = free_bytes / 2**30
        limits.append(
            (
                fitting * micro_batches,
                f"{gib:.1f} GiB of free memory hold {counted(round(max(0, fitting)), 'image')}",
            )
        )
    if args.device.type == "cpu" and cost.step_seconds > 0:
        timely = STEP_SECONDS / (_STEP_MARGIN * cost.step_seconds)
        reason = f"a step of {counted(round(timely), 'image')} takes {STEP_SECONDS:.0f} seconds on this CPU"
        limits.append((timely * args.world_size, reason))
    limit, reason = min(limits, default=(float("inf"), ""))
    chosen = (
        args.batch_size if limit >= args.batch_size else micro_batches * _power_of_two(limit / micro_batches)
    )
    chosen, reason = from_first_process((chosen, reason))
    if chosen >= args.batch_size:
        return {}
    args.use_batch_size(chosen)
    return {"training.batch_size": {"value": chosen, "reason": reason}}


def check_images(source: Source) -> None:
    """Raise UserError for a single image: BatchNorm, negatives and the monitor need two."""
    if source.num_rows == 1:
        raise UserError(f"data.path: expected at least 2 images in {source.description}, got 1")


def check_batch_size(args: SSLTrainingArguments, source: Source) -> None:
    """Check that the data hold one micro-batch for each process.

    Raises:
        UserError: there is one image, or there are too few images. The message gives a batch size that fits.
    """
    if source.num_rows is None:
        return
    share = ProcessShare(0, args.per_device_train_batch_size, world_size=args.world_size)
    check_images(source)
    if holds_batch(source, share):
        return
    micro_batches = args.micro_batches
    advice = f"training.batch_size={micro_batches * _power_of_two(source.num_rows / micro_batches)}"
    if source.num_rows < 2 * micro_batches:
        fitting = args.world_size * _power_of_two(source.num_rows / args.world_size)
        advice = f"training.batch_size={fitting} training.gradient_accumulation_steps=1"
    raise too_few_images(source, args.batch_size, advice)


def choose_monitor(
    args: SSLTrainingArguments, cost: StepCost, images: int | None, *, labeled: bool, overridden: set[str]
) -> Choices:
    """Reduce the number of images that the monitor measures, if its first measurement would take too long.

    The limit is 5 % of the planned run, but at least 2 and at most 10 seconds. Return the choices, or {} if
    nothing is reduced.

    Args:
        args: training arguments with the chosen batch size.
        cost: cost of one image.
        images: number of training images; None for a stream of unknown length.
        labeled: whether there are labeled images for k-NN.
        overridden: keys of the section `training` that the user set; their values are not changed.
    """
    least, most = FIRST_MEASUREMENT_SECONDS
    budget = max(least, min(most, FIRST_MEASUREMENT_SHARE * _planned_seconds(args, cost, images)))
    count = min(MONITOR_IMAGES, images or MONITOR_IMAGES)
    sizes = {"images": count, "bank": args.monitor_bank_images, "queries": args.monitor_query_images}
    seconds = {
        # The monitor embeds all views, and encodes one of them. A forward pass takes a third of a step.
        "images": count * (cost.step_seconds / 3 + cost.feature_seconds + cost.load_seconds),
        "knn": (sizes["bank"] + sizes["queries"]) * (cost.feature_seconds + cost.load_seconds),
    }
    if not labeled:
        seconds["knn"] = 0.0
    share = min(1.0, budget / max(sum(seconds.values()), 1e-9))
    share, budget = from_first_process((share, budget))
    if share == 1.0:
        return {}
    fixed = {"bank": "monitor_bank_images" in overridden, "queries": "monitor_query_images" in overridden}
    reduced = {
        name: size if fixed.get(name) else max(min(size, _FEWEST[name]), int(size * share))
        for name, size in sizes.items()
    }
    reason = f"the first measurement may take {budget:.1f} seconds"
    choices: Choices = {"monitor.probe_images": {"value": reduced["images"], "reason": reason}}
    if labeled:
        args.monitor_bank_images, args.monitor_query_images = reduced["bank"], reduced["queries"]
        for key, name in (("monitor_bank_images", "bank"), ("monitor_query_images", "queries")):
            if not fixed[name]:
                choices[f"training.{key}"] = {"value": reduced[name], "reason": reason}
    return choices


def apply_choices(args: SSLTrainingArguments, choices: Choices) -> None:
    """Set the choices of an earlier part of the run in the training arguments."""
    for key, choice in choices.items():
        if key == "training.precision":
            args.use_precision(choice["value"])
        elif key == "training.batch_size":
            args.use_batch_size(choice["value"])
        elif key.startswith("training."):
            setattr(args, key.removeprefix("training."), choice["value"])


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on the device.

    For a CPU, this is the smaller of the machine's available memory and the free memory of the control
    group. The result is divided by the number of processes on this machine.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    import psutil

    free = psutil.virtual_memory().available  # psutil ignores the limits of containers
    return min(float(free), _left_in_control_group()) / processes_here()


def _left_in_control_group() -> float:
    """Return the free bytes within the limit of the control group (version 2); infinity without a limit.

    The control group counts cached files as used, but the kernel frees them when memory is needed.
    """
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        parts = {name: int(size) for name, size in map(str.split, lines)}
        reclaimable = parts.get("inactive_file", 0) + parts.get("active_file", 0)
        return math.inf if limit == "max" else float(int(limit) - used + reclaimable)
    except (OSError, ValueError):
        return math.inf


def _planned_seconds(args: SSLTrainingArguments, cost: StepCost, images: int | None) -> float:
    """Return the estimated seconds of the whole training with all processes."""
    if args.max_steps > 0:
        total = args.max_steps * args.batch_size
    elif images is None:
        return float("inf")
    else:
        total = int(args.num_train_epochs * images)
    return total * cost.step_seconds / args.world_size


def _power_of_two(limit: float) -> int:
    """Return the largest power of two up to `limit`, but at least 2.

    BatchNorm and negatives need two images.
    """
    return 1 << max(1, int(limit).bit_length() - 1)


def prepare_model(model: SSLPreTrainedModel, args: SSLTrainingArguments) -> None:
    """Set synchronized BatchNorm, the memory layout of convolutions and the fastest layers, in place.

    The outputs change only by rounding, except that BatchNorm uses the statistics of all processes.

    Raises:
        UserError: the encoder or the compiler cannot use activation checkpoints in a compiled model.
    """
    compiles_checkpoints = args.torch_compile and checkpoints_activations(args)
    if compiles_checkpoints and args.torch_compile_backend == "eager":
        # torch (2.6 to 2.15) passes preserve_rng_state=False to checkpoints in compiled code. Its other
        # backends keep the random numbers (TagActivationCheckpoint in torch/_higher_order_ops/wrap.py).
        raise UserError(
            "training.torch_compile_backend: expected inductor or aot_eager with activation checkpointing, "
            "because eager recomputes activations with other random numbers, got eager"
        )
    if compiles_checkpoints and not supports_checkpointing(model.backbone):
        raise UserError(
            "training.torch_compile: expected false with activation checkpointing of "
            f"{type(model.backbone).__name__}, whose stages torch cannot compile, got true; use one of them"
        )
    if args.sync_batch_norm and args.world_size > 1:
        synchronize_batch_norm(model)
    if args.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)
    if args.device.type == "cpu":
        choose_attention(model)
        use_fast_convnext_layers(model)


def checked_model(
    model: Any, model_init: Callable[..., SSLPreTrainedModel] | None, seed: int
) -> SSLPreTrainedModel:
    """Return the model of a method: `model`, or the result of `model_init` with this seed.

    Raises:
        UserError: both or none of them are given, or the model is not one of a method, or has other weights
            than float32.
    """
    if (model is None) == (model_init is None):
        raise UserError("model, model_init: expected one of them; use SSLTrainer(model=...)")
    if model_init is not None:
        set_seed(seed)
        model = model_init(*[None for _ in inspect.signature(model_init).parameters])  # None: no trial
    if not isinstance(model, SSLPreTrainedModel):
        raise UserError(
            f"model: expected the model of a method such as SimCLRForPreTraining, got {type(model).__name__};"
            " use SimCLRForPreTraining.from_backbone(...) for an encoder"
        )
    types = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    for found in types - {torch.float32}:
        raise UserError(
            f"model: expected weights in float32, got {found}; use model.float(), and training.precision for "
            "the type of the computation"
        )
    return model
