# SPDX-License-Identifier: Apache-2.0
"""Fits a run to its machine: precision, loader workers, batch size, and the size of the monitor.

A recipe states what its paper used, on the paper's machines. Whatever the user did not set is chosen here
from the number of images, the device, its free memory and the measured time of a step. The main process
chooses, all processes use its choice, and `_run.json` keeps it, so that a resumed run uses the same one.
"""

import math
import os
from pathlib import Path
from typing import Any, TypedDict

import torch

from hf_ssl.modeling.gather import from_first_process
from hf_ssl.precision import fastest_precision
from hf_ssl.trainer.arguments import AUTO, SSLTrainingArguments
from hf_ssl.trainer.step_cost import MEMORY_MARGIN, StepCost

STEP_SECONDS = 30.0
"""The longest step that a recipe's batch size may lead to on a CPU."""
FIRST_MEASUREMENT_SHARE, FIRST_MEASUREMENT_SECONDS = 0.05, (2.0, 10.0)
"""The monitor's first measurement takes at most this share of the planned run, at most the second number of
seconds, and never less than the first (a run that is over in a minute needs a monitor, too).
"""
PROBE_IMAGES = 512
"""Training images that the monitor embeds, where time allows."""

CONTROL_GROUP = Path("/sys/fs/cgroup")
_FEWEST = {"probe": 32, "bank": 100, "queries": 50}
_MOST_WORKERS = 12


class Choice(TypedDict):
    """A value that was chosen for this machine, and why."""

    value: Any
    reason: str


Choices = dict[str, Choice]
"""By recipe key, e.g. "training.precision"."""


def choose_precision(args: SSLTrainingArguments) -> Choices:
    """Choose what `args.precision=auto` stands for and set it. Returns {} if the user chose."""
    if args.precision != AUTO:
        return {}
    found = fastest_precision(args.device.type)
    choice: Choice = {"value": found.name, "reason": found.reason}
    if found.name in args.excluded_precisions:
        choice = {"value": "float32", "reason": f"{found.name} is excluded by the training arguments"}
    choice = from_first_process(choice)
    args.use_precision(choice["value"])
    return {"training.precision": choice}


def choose_workers(args: SSLTrainingArguments, *, small: bool) -> Choices:
    """Choose what `args.dataloader_num_workers=auto` stands for and set it. Returns {} if the user chose.

    On a CPU, batches of small images are assembled faster in the training process than they travel from a
    worker, and workers compete with the training step for the cores. Beside an accelerator, two workers are
    enough for small images.

    Args:
        args: the training arguments.
        small: whether all images are small and of one size (`hf_ssl.data.batch.SMALL`).
    """
    if args.dataloader_num_workers != AUTO:
        return {}
    cores = usable_cores() // _processes_here()
    on_cpu = args.device.type == "cpu"
    most = (0 if small else 2) if on_cpu else (2 if small else _MOST_WORKERS)
    number = min(most, cores - 1)
    reason = f"{'small' if small else 'large'} images, {cores} cores{', which also train' if on_cpu else ''}"
    choice = from_first_process(Choice(value=max(0, number), reason=reason))
    args.dataloader_num_workers = choice["value"]
    return {"training.dataloader_num_workers": choice}


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def choose_batch_size(
    args: SSLTrainingArguments, cost: StepCost, images: int | None, *, free_bytes: float
) -> Choices:
    """Reduce a recipe's batch size to what data, memory and, on a CPU, time allow, and set it.

    The reduced size is the largest power of two for each process and accumulation step. The learning rate
    follows the recipe's rule. Returns {} if the recipe's batch size fits.

    Args:
        args: the training arguments.
        cost: of one image.
        images: in the data set; None for a stream of unknown length.
        free_bytes: of the device.
    """
    micro_batches = args.gradient_accumulation_steps
    shares = args.world_size * micro_batches
    limits: list[tuple[float, str]] = []
    if images is not None:
        limits.append((images, f"there are {images:,} images"))
    if args.contrastive_chunk_size is None and cost.step_bytes > 0:
        fitting = (free_bytes - cost.fixed_bytes) / (MEMORY_MARGIN * cost.step_bytes)
        gib = free_bytes / 2**30
        limits.append((fitting * shares, f"{gib:.1f} GiB of free memory hold {max(0, fitting):,.0f} images"))
    if args.device.type == "cpu" and cost.step_seconds > 0:
        timely = STEP_SECONDS / cost.step_seconds
        reason = f"{STEP_SECONDS:.0f} seconds per step are enough for {timely:,.0f} images on this CPU"
        limits.append((timely * args.world_size, reason))
    limit, reason = min(limits, default=(float("inf"), ""))
    chosen = args.batch_size if limit >= args.batch_size else shares * _power_of_two(limit / shares)
    chosen, reason = from_first_process((chosen, reason))
    if chosen >= args.batch_size:
        return {}
    args.use_batch_size(chosen)
    return {"training.batch_size": {"value": chosen, "reason": reason}}


def choose_monitor(
    args: SSLTrainingArguments, cost: StepCost, images: int | None, *, labelled: bool, typed: set[str]
) -> Choices:
    """Reduce the number of images that the monitor measures, so that its first measurement takes at most
    5 % of the planned run (but 2 seconds in any case) and at most 10 seconds. Returns {} if all of them fit.

    Args:
        args: training arguments with the chosen batch size.
        cost: of one image.
        images: in the training data; None for a stream of unknown length.
        labelled: whether there are labelled images for k-NN.
        typed: keys of the section `training` that the user set; these stay.
    """
    least, most = FIRST_MEASUREMENT_SECONDS
    budget = max(least, min(most, FIRST_MEASUREMENT_SHARE * _planned_seconds(args, cost, images)))
    probe = min(PROBE_IMAGES, images or PROBE_IMAGES)
    sizes = {"probe": probe, "bank": args.monitor_bank_images, "queries": args.monitor_query_images}
    seconds = {
        # All views and one through the encoder; the forward pass is a third of a step.
        "probe": probe * (cost.step_seconds / 3 + cost.feature_seconds + cost.load_seconds),
        "knn": (sizes["bank"] + sizes["queries"]) * (cost.feature_seconds + cost.load_seconds),
    }
    if not labelled:
        seconds["knn"] = 0.0
    share = min(1.0, budget / max(sum(seconds.values()), 1e-9))
    share, budget = from_first_process((share, budget))
    if share == 1.0:
        return {}
    fixed = {"bank": "monitor_bank_images" in typed, "queries": "monitor_query_images" in typed}
    reduced = {
        name: size if fixed.get(name) else max(min(size, _FEWEST[name]), int(size * share))
        for name, size in sizes.items()
    }
    reason = f"the first measurement may take {budget:.1f} seconds"
    choices: Choices = {"monitor.probe_images": {"value": reduced["probe"], "reason": reason}}
    if labelled:
        args.monitor_bank_images, args.monitor_query_images = reduced["bank"], reduced["queries"]
        for key, name in (("monitor_bank_images", "bank"), ("monitor_query_images", "queries")):
            if not fixed[name]:
                choices[f"training.{key}"] = {"value": reduced[name], "reason": reason}
    return choices


def apply_choices(args: SSLTrainingArguments, choices: Choices) -> None:
    """Set what an earlier part of a run chose (by `choices`) in the training arguments."""
    for key, choice in choices.items():
        if key == "training.precision":
            args.use_precision(choice["value"])
        elif key == "training.batch_size":
            args.use_batch_size(choice["value"])
        elif key.startswith("training."):
            setattr(args, key.removeprefix("training."), choice["value"])


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still allocate on the device.

    For a CPU these are the machine's available bytes, or what the limit of the control group leaves, divided
    among the processes on this machine.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    import psutil

    free = psutil.virtual_memory().available  # of the machine: psutil knows no containers
    return min(float(free), _left_in_control_group()) / _processes_here()


def _left_in_control_group() -> float:
    """Bytes that the limit of the control group (version 2) leaves; infinity without a limit.

    Files that were read count as used, but the kernel drops them when memory is needed.
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


def _processes_here() -> int:
    """Number of processes of this run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _planned_seconds(args: SSLTrainingArguments, cost: StepCost, images: int | None) -> float:
    """Estimated seconds of the whole training, all processes at work."""
    if args.max_steps > 0:
        total = args.max_steps * args.batch_size
    elif images is None:
        return float("inf")
    else:
        total = int(args.num_train_epochs * images)
    return total * cost.step_seconds / args.world_size


def _power_of_two(limit: float) -> int:
    """Return the largest power of two up to `limit`, at least 2: BatchNorm and negatives need two images."""
    return 1 << max(1, int(limit).bit_length() - 1)
