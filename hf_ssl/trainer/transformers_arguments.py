# SPDX-License-Identifier: Apache-2.0
"""The arguments of transformers' Trainer: which ones hf_ssl rejects, and which ones have no effect here.

All other fields of `transformers.TrainingArguments` work. `training/README.md` prints this table.
"""

import dataclasses
import logging
import math
import types
import typing
from collections.abc import Callable, Container, Iterable
from functools import lru_cache
from multiprocessing import get_all_start_methods
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor
from transformers import EarlyStoppingCallback, IntervalStrategy, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, trainer_log_levels

from hf_ssl.effects import LANGUAGE, WITHOUT_EFFECT
from hf_ssl.errors import UserError, check_keys, check_name, check_values
from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.sections import as_setting, check_finite, default_values, describe

logger = logging.getLogger(__name__)
DEFAULTS = {item.name: item.default for item in dataclasses.fields(TrainingArguments) if item.init}

ONE_GPU = "each process holds the whole model; start one process per GPU with torchrun"

REJECTED = {
    "auto_find_batch_size": "hf-ssl pretrain finds a batch size that fits; in Python, set batch_size",
    "bf16_full_eval": "set training.precision, which measurements also use",
    "fp16_full_eval": "set training.precision, which measurements also use",
    "dataloader_drop_last": "an incomplete batch is always dropped, because losses compare its images",
    "dataloader_in_order": "a run can resume only if batches arrive in order",
    "deepspeed": ONE_GPU,
    "fsdp": ONE_GPU,
    "fsdp_config": ONE_GPU,
    "parallelism_config": ONE_GPU,
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint without it",
    "ignore_data_skip": "a run resumes with its next image, and reads no earlier ones",
    "include_num_input_tokens_seen": "images have no tokens; images_per_second and epoch are logged instead",
    "label_smoothing_factor": "the losses use no labels; hf-ssl supervise uses "
    "evaluation.settings.fine_tune.label_smoothing",
    "neftune_noise_alpha": "the augmentation is set in the section views",
    "optim_target_modules": "the rules of the method select the parameters",
    "save_only_model": "the encoder in the output folder contains no optimizer state; set save_total_limit=1",
    "train_sampling_strategy": "batches are random samples, because losses compare their images",
    "use_liger_kernel": LANGUAGE,
}
"""Argument of transformers that raises a `UserError` -> the reason or the alternative."""

_RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        ("gradient_accumulation_steps", "per_device_eval_batch_size", "dataloader_prefetch_factor",
         "contrastive_chunk_size", "monitor_neighbors"),
    ),
    "at least 2": (lambda value: value >= 2, ("monitor_bank_images", "monitor_query_images")),
    "at least 0": (
        lambda value: value >= 0,
        ("learning_rate", "base_learning_rate", "weight_decay", "weight_decay_end", "adam_epsilon",
         "max_grad_norm", "clip_each_tensor", "warmup_steps", "warmup_epochs", "head_warmup_epochs",
         "eval_delay", "monitor_steps", "batch_size", "per_device_train_batch_size"),
    ),
    "a positive number": (
        lambda value: value > 0,
        ("predictor_learning_rate_factor", "num_train_epochs", "save_steps", "logging_steps", "ddp_timeout",
         "online_probe_learning_rate"),
    ),
    "a positive number, or -1 for all epochs": (lambda value: value == -1 or value > 0, ("max_steps",)),
    "at least 0 and less than 1": (lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2", "momentum")),
    "a number from 0 to 1": (lambda value: 0 <= value <= 1, ("minimum_learning_rate_ratio",)),
    "a number above 0 and at most 1": (lambda value: 0 < value <= 1, ("layer_decay",)),
    "a whole number from 0 to 2**32 - 1": (lambda value: 0 <= value < 2**32, ("seed", "data_seed")),
    "positive epochs": (lambda value: min(value, default=1) > 0, ("learning_rate_drops",)),
    "the path of a folder": (
        lambda value: str(value) != "" and not Path(value).is_file(), ("output_dir",),
    ),
    f"one of {', '.join(trainer_log_levels)}": (
        lambda value: value in trainer_log_levels, ("log_level", "log_level_replica"),
    ),
    f"one of {', '.join(get_all_start_methods())}": (
        lambda value: value in get_all_start_methods(), ("dataloader_multiprocessing_context",),
    ),
}  # fmt: skip
"""Expected values in words -> their check, and the arguments that must pass it unless they are None."""
_WITH_WORKERS = ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
_CHOICES: dict[str, Any] = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
_FURTHER_TYPES: dict[str, Any] = {
    "accelerator_config": AcceleratorConfig,
    "dataloader_num_workers": (int, float),
    "debug": types.NoneType,
    "optim_args": dict,
    "resume_from_checkpoint": bool,
}
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check")
_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")


def check_arguments(args: TrainingArguments, names: Container[str] | None = None) -> None:
    """Reject or report the values of `REJECTED` and `WITHOUT_EFFECT`.

    The caller runs this before transformers' `__post_init__`.

    `as_setting` converts the values, but a whole number remains an int (eval_steps=50).

    Args:
        args: the arguments.
        names: names of the arguments that are checked; None checks all of them.

    Raises:
        UserError: a rejected argument does not have its default value, a value has the wrong type or is out
            of range, or `report_to` names no installed tracker.
    """
    hints, defaults = typing.get_type_hints(type(args)), default_values(args)
    for field in dataclasses.fields(args):
        if names is not None and field.name not in names:
            continue
        value = getattr(args, field.name)
        default = defaults[field.name]
        if field.name in _CHOICES and value is False:
            value = "no"  # YAML reads `no` as False
        if isinstance(value, np.generic | np.ndarray | torch.Tensor):
            value = value.tolist()
        converted = as_setting(value, hints[field.name])
        keeps = isinstance(value, _FURTHER_TYPES.get(field.name, ())) or (
            type(value) is int and isinstance(converted, float)
        )
        value = value if keeps else converted
        setattr(args, field.name, value)
        if value == default or (default == "no" and value is False):
            continue
        _check_type(field.name, value, hints[field.name])
        if field.name in REJECTED and value is not None:
            raise UserError(f"training.{field.name}: expected {default}, got {value}; {REJECTED[field.name]}")
        if field.name in WITHOUT_EFFECT and value is not None:
            warn_once(f"training.{field.name} has no effect: {WITHOUT_EFFECT[field.name]}")
    for name in _WITH_WORKERS:
        if getattr(args, name) and args.dataloader_num_workers == 0:
            warn_once(f"training.{name} has no effect with dataloader_num_workers=0")
    for expected, (holds, limited) in _RANGES.items():
        values = [(name, getattr(args, name)) for name in limited if names is None or name in names]
        check_values(
            "training", *((name, value, value is None or holds(value), expected) for name, value in values)
        )
    # transformers 5.24 renamed `gradient_checkpointing_kwargs` to `activation_checkpointing_kwargs`.
    known = {
        "accelerator_config": [item.name for item in dataclasses.fields(AcceleratorConfig)],
        "gradient_checkpointing_kwargs": _CHECKPOINTING,
        "activation_checkpointing_kwargs": _CHECKPOINTING,
    }
    for name, keys in known.items():
        if isinstance(given := getattr(args, name, None), dict):
            check_keys(given, keys, f"training.{name}")
    _check_compilation(args)
    args.report_to = "none" if args.report_to is None else args.report_to
    _check_trackers(args.report_to)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Raise `UserError` for a value of another type, or one that is not finite."""
    if name in _CHOICES:
        check_name(f"training.{name}", value, [item.value for item in _CHOICES[name]], "a known name")
    check_finite(f"training.{name}", value)
    valid = isinstance(value, _FURTHER_TYPES.get(name, ())) or _fits(value, annotation)
    check_values("training", (name, value, valid, describe(annotation)))


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value has a type. A float field accepts an int."""
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if kind in (int, float):
        allowed = int | float if kind is float else int
        return isinstance(value, allowed) and not isinstance(value, bool)
    if kind is typing.Literal:
        return value in arguments
    if kind is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    return isinstance(value, str | PathLike if kind is str else kind)


def _check_compilation(args: TrainingArguments) -> None:
    """Raise `UserError` if torch has no such compiler backend or mode."""
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    if backend is None and mode is None:
        return
    known = {
        "torch_compile_backend": (backend, torch.compiler.list_backends(exclude_tags=())),
        "torch_compile_mode": (mode, list(torch._inductor.list_mode_options())),
    }
    for name, (value, names) in known.items():
        if value is not None:
            check_name(f"training.{name}", value, names, "a known name")


def check_best_model(args: TrainingArguments) -> None:
    """Check the arguments about the best model, and set `greater_is_better`.

    The caller runs this before transformers' `__post_init__`.

    Raises:
        UserError: the best model is needed, and the model is not measured when it is saved.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name in MEASUREMENTS and args.metric_for_best_model:
        is_better = not MEASUREMENTS[name].lower_is_better
        if args.greater_is_better not in (None, is_better):
            warn_once(
                f"training.greater_is_better={args.greater_is_better} selects the worst model by {name}"
            )
        args.greater_is_better = is_better if args.greater_is_better is None else args.greater_is_better
    save, evaluate = SaveStrategy(args.save_strategy).value, IntervalStrategy(args.eval_strategy).value
    if evaluate == "no" and (args.load_best_model_at_end or save == "best"):
        what = "save_strategy=best" if save == "best" else "load_best_model_at_end"
        raise UserError(
            f"training.monitor_steps, training.eval_strategy: expected measurements with {what}, got none; "
            "use monitor_steps=200 with eval_strategy=steps, or eval_strategy=epoch"
        )
    if save == "best" and args.metric_for_best_model is None:
        raise UserError(
            "training.metric_for_best_model: expected a measurement with save_strategy=best, got none; use "
            "metric_for_best_model=knn"
        )
    if args.load_best_model_at_end and save not in ("best", evaluate):
        raise UserError(
            f"training.save_strategy: expected {evaluate}, as eval_strategy, or best, because "
            f"load_best_model_at_end is set, got {save}; use save_strategy={evaluate}"
        )
    steps, measured = args.save_steps, args.eval_steps or 1
    if args.load_best_model_at_end and save == "steps" and min(steps, measured) >= 1 and steps % measured:
        raise UserError(
            f"training.save_steps: expected a multiple of the {measured} steps between measurements, because "
            f"load_best_model_at_end is set, got {steps}; use save_steps="
            f"{math.ceil(steps / measured) * measured}"
        )


def check_early_stopping(args: TrainingArguments, callbacks: Iterable[Any]) -> None:
    """Check that early stopping has a measurement.

    Raises:
        UserError: `metric_for_best_model` is not set, or the monitor is disabled.
    """
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    missing = "metric_for_best_model" if args.metric_for_best_model is None else "eval_strategy"
    if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            f"training.{missing}: expected a value for EarlyStoppingCallback, got {getattr(args, missing)}; "
            "use metric_for_best_model='knn', eval_strategy='epoch'"
        )


def as_bool(value: Any) -> Any:
    """Return True for "true" and False for "false", in any case. Return other values unchanged."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def given_values(args: TrainingArguments) -> dict[str, Any]:
    """Return the values of `args` that differ from the defaults of transformers, by name.

    The function cannot recognize a value that the user set to such a default. A warning reports this.
    """
    stock = TrainingArguments(output_dir=str(args.output_dir), use_cpu=args.use_cpu)
    given = {
        name: value
        for name in DEFAULTS
        if (value := getattr(args, name)) not in (DEFAULTS[name], getattr(stock, name))
    }
    # transformers (5.20 to 5.24) sets these from other arguments.
    metric = str(args.metric_for_best_model)
    derived = {"do_eval": args.eval_strategy != "no", "greater_is_better": not metric.endswith("loss")}
    warn_once(
        "values of TrainingArguments that equal transformers' defaults are replaced by those of hf_ssl; use "
        "SSLTrainingArguments to set them"
    )
    return {name: value for name, value in given.items() if value != derived.get(name)}


def check_accelerator_config(args: TrainingArguments) -> None:
    """Reject settings of accelerate's data loaders. The caller runs this after transformers' `__post_init__`.

    Raises:
        UserError: one of them does not have its default value.
    """
    given: Any = args.accelerator_config
    default = type(given)()
    for name in _ACCELERATOR:
        if getattr(given, name) != getattr(default, name):
            raise UserError(
                f"training.accelerator_config: expected no {name}, got {getattr(given, name)}; the loader of "
                "hf_ssl divides batches among the processes"
            )
    given.gradient_accumulation_kwargs = kwargs = dict(given.gradient_accumulation_kwargs or {}) or None
    steps = args.gradient_accumulation_steps  # the value that transformers writes into the dict
    if kwargs is not None and kwargs.get("num_steps", steps) != steps:
        raise UserError(
            f"training.accelerator_config: expected no num_steps, got {kwargs['num_steps']}; use "
            "training.gradient_accumulation_steps"
        )


def _check_trackers(report_to: Any) -> None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            trackers = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"training.report_to: expected none, all or one of {trackers}, got {name}")
        if name != "flyte" and name not in get_available_reporting_integrations():
            raise UserError(
                f"training.report_to: expected an installed tracker, got {name}; use pip install {name}"
            )


def check_metric(name: str | None, further: Iterable[str] = ()) -> None:
    """Check the name of a measurement, for `metric_for_best_model`.

    Args:
        name: with or without the prefix `eval_`; None is accepted.
        further: further names that are accepted, without the prefix.

    Raises:
        UserError: the monitor makes no such measurement.
    """
    known = [f"eval_{item}" for item in (*further, *MEASUREMENTS)]
    if name is not None:
        name = f"eval_{name.removeprefix('eval_')}"
        check_name("training.metric_for_best_model", name, known, "a measurement of the monitor")


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, once per process."""
    logger.warning("%s", message)


def reject_argument(name: str, value: Any, advice: str) -> None:
    """Raise `UserError` if an argument of transformers' Trainer that has no meaning here is not None."""
    if value is not None:
        raise UserError(f"{name}: expected None, got {type(value).__name__}; {advice}")
