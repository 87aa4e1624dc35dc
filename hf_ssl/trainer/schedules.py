# SPDX-License-Identifier: Apache-2.0
"""Schedules of the learning rate and of weight decay."""

from collections.abc import Callable
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from hf_ssl.errors import UserError
from hf_ssl.modeling.configuration import cosine_factor, scheduled_value
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.transformers_arguments import warn_once

_OF_MEASUREMENTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_WARMUP = (SchedulerType.CONSTANT, *_OF_MEASUREMENTS)


def is_schedule_free(args: SSLTrainingArguments) -> bool:
    """Return whether the optimizer is schedule-free. Such an optimizer contains the warmup."""
    return args.optimizer.startswith("schedule_free")


def build_scheduler(
    optimizer: Optimizer, args: SSLTrainingArguments, total_steps: int, steps_per_epoch: int
) -> LambdaLR:
    """Return the learning rate schedule `args.lr_scheduler_type` of transformers.

    `args.learning_rate_drops` modifies it. Parameter groups with a fixed learning rate keep it constant.

    Args:
        optimizer: the result of `build_optimizer`.
        args: the training arguments.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        UserError: `args.lr_scheduler_kwargs` do not fit the schedule; or learning rate drops or fixed
            learning rates need a schedule that depends only on the step.
    """
    warmup = (
        round(args.warmup_epochs * steps_per_epoch)
        if args.warmup_epochs
        else args.get_warmup_steps(total_steps)
    )
    specific = cast("dict[str, Any] | None", args.lr_scheduler_kwargs)
    kind = SchedulerType(args.lr_scheduler_type)
    if warmup and kind in _WITHOUT_WARMUP and not is_schedule_free(args):
        warn_once(
            f"training.warmup_steps and warmup_epochs have no effect with lr_scheduler_type={kind.value}"
        )
    elif warmup > total_steps:
        key = "warmup_epochs" if args.warmup_epochs else "warmup_steps"
        warn_once(
            f"training.{key}: expected a warmup of at most {total_steps} steps, the length of the run, got "
            f"{warmup}, so the learning rate does not reach its value; set a smaller one"
        )
    if specific and kind == SchedulerType.CONSTANT:
        warn_once("training.lr_scheduler_kwargs has no effect with lr_scheduler_type=constant")
    if kind in _OF_MEASUREMENTS:  # transformers (5.20 to 5.24) does not use `greater_is_better`
        specific = {"mode": "max" if args.greater_is_better else "min", **(specific or {})}
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, total_steps, scheduler_specific_kwargs=specific
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"training.lr_scheduler_kwargs: expected the arguments of {args.lr_scheduler_type}, got "
            f"{specific}: {error}"
        ) from error
    if args.cosine_variant is not None:
        rates = {"min_lr_rate": 0.0, "warmup_lr_rate": 0.0} | (specific or {})
        if rates.get("min_lr") is not None:
            rates["min_lr_rate"] = rates["min_lr"] / optimizer.defaults["lr"]
        start, end = float(rates["warmup_lr_rate"] or 0), float(rates["min_lr_rate"] or 0)
        cycles = float(rates.get("num_cycles", 0.5))
        schedule = warmup_and_cosine(args.cosine_variant, warmup, total_steps, start, end, cycles)
        scheduler = LambdaLR(optimizer, schedule)
    drops = [round(epoch * steps_per_epoch) for epoch in args.learning_rate_drops]
    # An optimizer that the user made has groups without our keys.
    fixed = any(group.get("fixed_learning_rate") for group in optimizer.param_groups)
    if (drops or fixed) and not isinstance(scheduler, LambdaLR):
        raise UserError(
            "training.lr_scheduler_type: expected a schedule that depends on the step alone"
            f"{', because the predictor keeps its learning rate' if fixed else ' with learning_rate_drops'}, "
            f"got {args.lr_scheduler_type}; use cosine_with_min_lr"
        )
    if drops or fixed:
        lambdas = [
            (lambda step: 1.0)
            if group.get("fixed_learning_rate")
            else _dropped(scheduler.lr_lambdas[index], drops)
            for index, group in enumerate(optimizer.param_groups)
        ]
        scheduler = LambdaLR(optimizer, lambdas)
    return scheduler


def warmup_and_cosine(
    variant: str, warmup: int, total: int, start: float, end: float, cycles: float = 0.5
) -> Callable[[int], float]:
    """Return the authors' schedule, a function of the completed steps: linear warmup, then a cosine.

    Args:
        variant: `swav` (facebookresearch/swav, main_swav.py; DeepCluster v2 and DINO share it). The first
            step has `start`. The last step of the warmup and the next step both have 1, because
            `numpy.linspace` includes the end. The last step is one step before `end`.
            `ijepa` (facebookresearch/ijepa, src/utils/schedulers.py). The schedule advances before each step,
            so the first step is one step after `start`, and the last step has `end`.
        warmup, total: steps of the warmup and of the run.
        start, end: first and last factor on the learning rate.
        cycles: periods of the cosine.
    """
    first = 1 if variant == "ijepa" else 0
    intervals = max(1, warmup - 1 + first)

    def factor(step: int) -> float:
        position = min(step + first, total)
        if position < warmup:
            return start + (1 - start) * position / intervals
        progress = (position - warmup) / max(1, total - warmup)
        return end + (1 - end) * cosine_factor(2 * cycles * progress, 1)

    return factor


def _dropped(schedule: Callable[[int], float], drops: list[int]) -> Callable[[int], float]:
    """Return the schedule times 0.1 for each step in `drops` that has been reached."""
    return lambda step: schedule(step) * 0.1 ** sum(step >= drop for drop in drops)


def schedule_weight_decay(optimizer: Any, args: SSLTrainingArguments, fraction: float) -> None:
    """Set the weight decay of the next step in the parameter groups with weight decay.

    This function does nothing without `args.weight_decay_end`.

    Args:
        optimizer: the result of `build_optimizer`, with or without a wrapper.
        args: the training arguments. `weight_decay` and `weight_decay_end` are used.
        fraction: completed fraction of the run. The weight decay depends only on it, so a resumed run uses
            the same values.
    """
    if args.weight_decay_end is None:
        return
    value = scheduled_value(args.weight_decay, args.weight_decay_end, "cosine", fraction)
    for group in optimizer.param_groups:
        if group.get("decay") and "weight_decay" in group:
            group["weight_decay"] = value


def largest_weight_decay(optimizer: Optimizer) -> float:
    """Return the largest weight decay of all parameter groups."""
    return max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
