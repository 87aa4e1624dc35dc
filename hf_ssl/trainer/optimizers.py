# SPDX-License-Identifier: Apache-2.0
"""Builds the optimizer and its schedules from training arguments and the parameter rules of a method."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Container
from copy import copy
from dataclasses import MISSING, fields, replace
from typing import Any, cast

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from hf_ssl.errors import UserError, check_name, check_values, one_line
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import scheduled_value
from hf_ssl.modeling.parameter_groups import ParameterGroup, assign_parameter_groups, layer_depths
from hf_ssl.trainer.arguments import OPTIMIZERS, SSLTrainingArguments
from hf_ssl.trainer.lars import LARS, LARSConfig
from hf_ssl.trainer.logs import Stopwatch
from hf_ssl.trainer.transformers_arguments import parse_optim_args, warn_once

_OF_MEASUREMENTS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_WITHOUT_WARMUP = (SchedulerType.CONSTANT, *_OF_MEASUREMENTS)
_OF_OPTIMIZER = (
    "optimizer", "optim_args", "learning_rate", "base_learning_rate", "weight_decay", "weight_decay_end",
    "decay_all_parameters", "layer_decay", "predictor_learning_rate_factor", "lars", "momentum", "nesterov",
    "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
_OF_SCHEDULE = (
    *("lr_scheduler_type", "lr_scheduler_kwargs", "minimum_learning_rate_ratio", "learning_rate_drops"),
    *("warmup_epochs", "warmup_steps"),
)


def check_objects(optimizers: Any, cls_and_kwargs: Any, callbacks: Any) -> None:
    """Check the arguments of `SSLTrainer` that are optimizers or callbacks.

    Raises:
        UserError: one of them has another form, or there are two optimizers.
    """
    pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    given = pair and optimizers[0] is not None
    valid = not cls_and_kwargs or [*map(isinstance, cls_and_kwargs, (type, dict))] == [True, True]
    kinds = [item if isinstance(item, type) else type(item) for item in callbacks or ()]
    check_values(
        "SSLTrainer",
        ("optimizers", optimizers, pair and (not given or isinstance(optimizers[0], Optimizer)),
         "an optimizer or None, and a schedule or None", "optimizers=(optimizer, None)"),
        ("optimizer_cls_and_kwargs", cls_and_kwargs, valid, "a class and a dict", "(SGD, {'lr': 0.1})"),
        ("optimizer_cls_and_kwargs", cls_and_kwargs, not (given and cls_and_kwargs), "None with optimizers"),
        ("callbacks", callbacks, all(issubclass(kind, TrainerCallback) for kind in kinds),
         "a list of callbacks", "callbacks=[callback]"),
    )  # fmt: skip


def check_optimization(
    model: SSLPreTrainedModel, args: SSLTrainingArguments, optimizers: tuple[Any, Any]
) -> None:
    """Check the arguments of optimizer and schedule.

    A warning names the arguments that have no effect because the user made the optimizer or the schedule.

    Args:
        model: the model of the method.
        args: the training arguments.
        optimizers: the user's optimizer and schedule; None for those of `args`.

    Raises:
        UserError: the errors of `parameter_groups_by_name`.
    """
    parameter_groups_by_name(model, args)
    for item, names in zip(optimizers, (_OF_OPTIMIZER, _OF_SCHEDULE), strict=True):
        for name in names if item is not None else ():
            if name in _changed(args):
                warn_once(f"training.{name} has no effect with your own {type(item).__name__}")


def _changed(args: SSLTrainingArguments) -> set[str]:
    """Return the names of the arguments that do not have their default values."""
    default: dict[str, Any] = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(args)
    }
    default["lr_scheduler_kwargs"] = {"min_lr_rate": args.minimum_learning_rate_ratio}  # set by hf_ssl
    return {name for name, value in default.items() if getattr(args, name) not in (value, None)}


def build_optimizer(
    model: SSLPreTrainedModel,
    args: SSLTrainingArguments,
    cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
) -> Optimizer:
    """Return the optimizer `args.optimizer` with the parameter groups that the rules of the method define.

    Args:
        model: the model of the method.
        args: the training arguments.
        cls_and_kwargs: another class of optimizers and its arguments. `lr` and `weight_decay` among them
            replace those of `args`.
    """
    kwargs = {} if cls_and_kwargs is None else dict(cls_and_kwargs[1])
    learning_rate = kwargs.setdefault("lr", args.learning_rate)
    weight_decay = kwargs.pop("weight_decay", args.weight_decay)
    by_settings: dict[ParameterGroup, list[torch.nn.Parameter]] = defaultdict(list)
    parameters = dict(model.named_parameters())
    for name, group in parameter_groups_by_name(model, args).items():
        by_settings[group].append(parameters[name])
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "lr": learning_rate * group.learning_rate_scale,
            "weight_decay": weight_decay if group.decay else 0.0,
            "decay": group.decay,
            "adapt": group.adapt or args.lars.adapt_all_parameters,
            "fixed_learning_rate": group.fixed_learning_rate,
        }
        for group, members in by_settings.items()
    ]
    # The parameter groups contain the weight decay.
    known = {"sgd": ["momentum"], "lars": ["momentum"], "adamw": ["betas", "eps"]}
    if cls_and_kwargs is None:
        _warn_about_unused(args, {"weight_decay", *known[args.optimizer]}, args.optimizer)
    else:
        own = {*kwargs, *(inspect.signature(cls_and_kwargs[0]).parameters.keys() & {"weight_decay"})}
        is_named = args.optimizer not in OPTIMIZERS
        _warn_about_unused(args, own, args.optimizer if is_named else cls_and_kwargs[0].__name__)
    if cls_and_kwargs is not None:
        try:
            return cls_and_kwargs[0](groups, **kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"training.optim_args: expected arguments of {cls_and_kwargs[0].__name__}, got "
                f"{kwargs}: {one_line(error)}"
            ) from error
    if args.optimizer == "lars":
        return LARS(
            groups,
            lr=args.learning_rate,
            momentum=args.momentum,
            trust_coefficient=args.lars.trust_coefficient,
            variant=args.lars.variant,
            clip=args.lars.clip,
        )
    # `fused` is 2 to 8 times faster than the default, also on a CPU. On a CPU, `foreach` is slower.
    if args.optimizer == "sgd":
        return SGD(groups, lr=args.learning_rate, momentum=args.momentum, nesterov=args.nesterov, fused=True)
    betas = (args.adam_beta1, args.adam_beta2)
    return AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def transformers_optimizer(args: SSLTrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the arguments of the optimizer of transformers that `args.optimizer` names.

    Raises:
        UserError: its package is not installed, it needs more than parameter groups (GaLore, LOMO), or
            `args.optim_args` contains an argument that it does not have.
    """
    given = parse_optim_args(args.optim_args)
    simple = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    try:
        cls, kwargs = _with_optim_args(args, simple)
        without = _with_optim_args(args, {})[1]
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"training.optimizer: expected an optimizer that works here, got {args.optimizer}: {error}"
        ) from error
    parameters = {name for name in inspect.signature(cls).parameters if name not in ("self", "params")}
    # torch-optimi 0.3.3 (stable_adamw) selects triton also on a CPU, which ends in an error of triton.
    kwargs |= {"triton": False} if "triton" in parameters and args.device.type == "cpu" else {}
    for name, value in given.items():
        if name not in parameters | kwargs.keys():
            check_name("training.optim_args", name, sorted(parameters), f"arguments of {cls.__name__}")
        # transformers (5.20 to 5.24) passes `optim_args` only to some optimizers, and converts the values
        # that it passes.
        if name not in kwargs or (name in without and kwargs[name] is without[name]):
            kwargs[name] = value
    return cls, kwargs


def _with_optim_args(
    args: SSLTrainingArguments, values: dict[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and the arguments that transformers selects with these `optim_args`."""
    args = copy(args)
    args.optim_args = ",".join(f"{name}={value}" for name, value in values.items()) or None
    return Trainer.get_optimizer_cls_and_kwargs(args)


def _warn_about_unused(args: SSLTrainingArguments, known: Container[str], optimizer: str) -> None:
    """Warn about arguments that the user set and that this optimizer does not have.

    Args:
        args: the training arguments.
        known: names of the arguments of the optimizer.
        optimizer: name of the optimizer.
    """
    name_of = {
        "weight_decay": "weight_decay",
        "weight_decay_end": "weight_decay",
        "momentum": "momentum",
        "adam_beta1": "betas",
        "adam_beta2": "betas",
        "adam_epsilon": "eps",
    }
    unused = [name for name, own in name_of.items() if own not in known and name in _changed(args)]
    if args.optimizer != "lars" and args.lars != LARSConfig():
        unused.append("lars")
    for name in unused:
        warn_once(f"training.{name} has no effect with the optimizer {optimizer}")


def parameter_groups_by_name(
    model: SSLPreTrainedModel, args: SSLTrainingArguments
) -> dict[str, ParameterGroup]:
    """Return the parameter group of each trainable parameter, by name.

    The groups follow from the rules of the method and from the training arguments.

    Raises:
        UserError: the encoder has no numbered blocks for `layer_decay`, or the method trains no predictor for
            `predictor_learning_rate_factor`.
    """
    found = assign_parameter_groups(model, model.parameter_rules, decay_all=args.decay_all_parameters)
    inside = {name: name.removeprefix("backbone.") for name in found if name.startswith("backbone.")}
    depth = layer_depths([name for name, _ in model.backbone.named_parameters()])
    if args.layer_decay is not None and max(depth.values()) <= 1:  # all parameters are "after the blocks"
        raise UserError(
            "training.layer_decay: expected an encoder with numbered blocks, got "
            f"{type(model.backbone).__name__}; leave it out"
        )
    factor = args.predictor_learning_rate_factor
    predictor = [name for name in found if name.startswith("predictor.")]
    if factor != 1 and not predictor:
        raise UserError(
            f"training.predictor_learning_rate_factor: expected 1, because {type(model).__name__} trains no "
            f"predictor, got {factor}"
        )
    for name in predictor:
        scale = found[name].learning_rate_scale * factor
        found[name] = replace(found[name], learning_rate_scale=scale)
    for name, own in inside.items():
        group, scale = found[name], (args.layer_decay or 1.0) ** (max(depth.values()) - depth[own])
        found[name] = replace(
            group,
            learning_rate_scale=group.learning_rate_scale * scale,
            frozen_epochs=max(group.frozen_epochs, args.head_warmup_epochs),
        )
    return found


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
    if warmup and kind in _WITHOUT_WARMUP:
        warn_once(
            f"training.warmup_steps and warmup_epochs have no effect with lr_scheduler_type={kind.value}"
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
        return end + (1 - end) * (1 + math.cos(2 * math.pi * cycles * progress)) / 2

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


class OptimizingTrainer(Trainer):
    """The part of `SSLTrainer` that builds the optimizer and the schedule of the learning rate.

    Attributes:
        method: the model of the method.
        steps_per_epoch: optimizer steps of an epoch, and of the whole run if the length of an epoch is not
            known; 0 before training.
    """

    args: SSLTrainingArguments
    method: SSLPreTrainedModel
    steps_per_epoch: int
    stopwatch: Stopwatch

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer `args.optimizer` with its parameter groups."""
        if self.optimizer is None:
            given = self.optimizer_cls_and_kwargs
            if given is None and self.args.optimizer not in OPTIMIZERS:
                given = transformers_optimizer(self.args)
            self.optimizer = build_optimizer(self.method, self.args, given)
        return self.optimizer

    def use_averaged_weights(self, averaged: bool) -> None:
        """Switch the model to the averaged weights (for measurements and files) or to the training weights.

        They differ for schedule-free optimizers only (Defazio et al., arXiv:2405.15682). Such an optimizer
        raises an error if a step starts with the averaged weights.
        """
        switch = getattr(self.optimizer, "eval" if averaged else "train", None)
        if switch is not None:
            switch()

    def _get_learning_rate(self) -> float:
        """Return the largest learning rate of the groups that follow the schedule, for the log."""
        groups = cast(Optimizer, self.optimizer).param_groups
        return max(group["lr"] for group in groups if not group.get("fixed_learning_rate"))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate schedule: warmup, then the schedule of transformers."""
        if self.lr_scheduler is None:
            if not self.steps_per_epoch:  # called by the user, before training
                self.set_initial_training_values(self.args, self.get_train_dataloader())
            optimizer = optimizer if optimizer is not None else self.create_optimizer()
            self.lr_scheduler = build_scheduler(
                optimizer, self.args, num_training_steps, self.steps_per_epoch
            )
            self._created_lr_scheduler = True
        self.stopwatch.start(self.state.global_step)
        return self.lr_scheduler

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """Store `steps_per_epoch`, and return the numbers of steps and images as transformers' Trainer."""
        numbers = super().set_initial_training_values(args, dataloader)
        self.steps_per_epoch = numbers[1]
        return numbers
