# SPDX-License-Identifier: Apache-2.0
"""Builds the optimizer and its schedules from training arguments and the parameter rules of a method."""

import ast
import inspect
from collections import defaultdict
from collections.abc import Container
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_ssl.errors import UserError, check_name, check_values, one_line
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.image_trainer import ImageTrainer
from hf_ssl.modeling.lars import LARS, LARSConfig
from hf_ssl.modeling.parameter_groups import ParameterGroup, assign_parameter_groups, layer_scales
from hf_ssl.sections import default_values
from hf_ssl.trainer.arguments import OPTIMIZERS, SSLTrainingArguments
from hf_ssl.trainer.epochs import warn_about_frozen_backbone
from hf_ssl.trainer.logs import Stopwatch
from hf_ssl.trainer.schedules import build_scheduler, is_schedule_free
from hf_ssl.trainer.transformers_arguments import as_bool, warn_once

GROUP_ARGUMENTS = {
    "initial_lr": ("learning_rate", "layer_decay", "predictor_learning_rate_factor"),
    "weight_decay": ("weight_decay", "weight_decay_end", "decay_all_parameters"),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "momentum": ("momentum",),
    "nesterov": ("nesterov",),
    "trust_coefficient": ("lars.trust_coefficient",),
    "variant": ("lars.variant",),
    "clip": ("lars.clip",),
    "adapt": ("lars.adapt_all_parameters",),
}
"""Key of a parameter group of an optimizer -> the training arguments that set it."""
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
        UserError: one of them does not have the expected type, or there are two optimizers.
    """
    pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    given = pair and optimizers[0] is not None
    valid = not cls_and_kwargs or [*map(isinstance, cls_and_kwargs, (type, dict))] == [True, True]
    valid = valid and (not cls_and_kwargs or issubclass(cls_and_kwargs[0], Optimizer))
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
    model: SSLPreTrainedModel,
    args: SSLTrainingArguments,
    optimizer: Any = None,
    schedule: Any = None,
    cls_and_kwargs: Any = None,
) -> None:
    """Check the arguments of optimizer and schedule.

    A warning names the arguments that have no effect because the user made the optimizer or the schedule.

    Args:
        model: the model of the method.
        args: the training arguments.
        optimizer, schedule: those of the user; None for those of `args`.
        cls_and_kwargs: the user's class of optimizers and its arguments, or None.

    Raises:
        UserError: the errors of `parameter_groups_by_name`; or a schedule-free optimizer has a warmup that is
            not a number of steps.
    """
    parameter_groups_by_name(model, args)
    unused: dict[str, type] = {}
    if optimizer is not None:
        unused |= dict.fromkeys(_OF_OPTIMIZER, type(optimizer))
    if schedule is not None:
        unused |= dict.fromkeys(_OF_SCHEDULE, type(schedule))
    if cls_and_kwargs:
        rates = [] if "lr" not in cls_and_kwargs[1] else ["learning_rate", "base_learning_rate"]
        unused |= dict.fromkeys(["optimizer", "optim_args", "lars", *rates], cls_and_kwargs[0])
    for name, cls in unused.items():
        if name in _changed(args):
            warn_once(f"training.{name} has no effect with your own {cls.__name__}")
    if is_schedule_free(args) and (args.warmup_epochs or args.warmup_steps != int(args.warmup_steps)):
        raise UserError(
            f"training.warmup_steps: expected a number of steps with {args.optimizer}, got "
            f"warmup_steps={args.warmup_steps}, warmup_epochs={args.warmup_epochs}; use warmup_steps=100"
        )


def _changed(args: SSLTrainingArguments) -> set[str]:
    """Return the names of the arguments that do not have their default values."""
    default = default_values(args)
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
    if not groups:
        raise UserError(
            "model: expected trainable parameters, got only frozen ones; use requires_grad_(True)"
        )
    is_named = args.optimizer not in OPTIMIZERS
    # The parameter groups contain the weight decay.
    known = {"sgd": ["momentum", "nesterov"], "lars": ["momentum"], "adamw": ["betas", "eps"]}
    if cls_and_kwargs is None:
        _warn_about_unused(args, {"weight_decay", *known[args.optimizer]}, args.optimizer)
    else:
        own = {*kwargs, *(inspect.signature(cls_and_kwargs[0]).parameters.keys() & {"weight_decay"})}
        _warn_about_unused(args, own, args.optimizer if is_named else cls_and_kwargs[0].__name__)
    if cls_and_kwargs is not None:
        try:
            return cls_and_kwargs[0](groups, **kwargs)
        except (TypeError, ValueError) as error:
            key = "training.optim_args" if is_named else "optimizer_cls_and_kwargs"
            raise UserError(
                f"{key}: expected arguments of {cls_and_kwargs[0].__name__}, got {kwargs}: {one_line(error)}"
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
    return ImageTrainer.get_optimizer_cls_and_kwargs(args)


def parse_optim_args(optim_args: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments in a text "name=value,name=value".

    A word without quotes is a string, except true and false.
    """
    if isinstance(optim_args, dict):
        return optim_args
    try:
        call = cast(ast.Call, ast.parse(f"f({optim_args or ''})", mode="eval").body)
        if call.args or not all(pair.arg for pair in call.keywords):
            raise ValueError("a value has no name")
        return {
            str(pair.arg): as_bool(pair.value.id)
            if isinstance(pair.value, ast.Name)
            else ast.literal_eval(pair.value)
            for pair in call.keywords
        }
    except (SyntaxError, ValueError, AttributeError) as error:
        raise UserError(
            f"training.optim_args: expected name=value,name=value with Python values, got {optim_args}"
        ) from error


def _warn_about_unused(args: SSLTrainingArguments, known: Container[str], optimizer: str) -> None:
    """Warn about arguments that the user set and that this optimizer does not have.

    Args:
        args: the training arguments.
        known: names of the arguments of the optimizer.
        optimizer: name of the optimizer.
    """
    others = [names for key, names in GROUP_ARGUMENTS.items() if key not in known and key != "initial_lr"]
    unused = [name for names in others for name in names if name in _changed(args)]
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
    names = [name for name, _ in model.backbone.named_parameters()]
    decay = 1.0 if args.layer_decay is None else args.layer_decay
    scales = layer_scales(names, decay, "training.layer_decay", type(model.backbone).__name__)
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
        group = found[name]
        found[name] = replace(
            group,
            learning_rate_scale=group.learning_rate_scale * scales[own],
            frozen_epochs=max(group.frozen_epochs, args.head_warmup_epochs),
        )
    return found


class OptimizingTrainer(ImageTrainer):
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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm if it is logged or known, else None, because it takes 1 ms for 200 tensors."""
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS and self.state.global_step > 0
        logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        if grad_norm is None and by_steps and not logged and not self.args.fp16:
            return None
        return super()._get_grad_norm(model, grad_norm)

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
        """Store `steps_per_epoch`. Return the numbers of steps and images as transformers' Trainer does."""
        numbers = super().set_initial_training_values(args, dataloader)
        self.steps_per_epoch = numbers[1]
        warn_about_frozen_backbone(self.args, self.steps_per_epoch, numbers[-1])
        return numbers
