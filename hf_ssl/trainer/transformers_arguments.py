# SPDX-License-Identifier: Apache-2.0
"""The arguments of transformers' Trainer: which ones hf_ssl rejects, and which ones have no effect here.

All other fields of `transformers.TrainingArguments` work. `training/README.md` prints this table.
"""

import dataclasses
import logging
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MEASUREMENTS

logger = logging.getLogger(__name__)

_ONE_GPU = "each process holds the whole model; start one process per GPU with torchrun"
_FEATURES = "the monitor measures features of whole images"
_LANGUAGE = "it is meant for language models"

REJECTED = {
    "auto_find_batch_size": "hf-ssl pretrain finds a batch size that fits; in Python, set batch_size",
    "bf16_full_eval": "set training.precision, which measurements use, too",
    "fp16_full_eval": "set training.precision, which measurements use, too",
    "dataloader_drop_last": "a batch that is not full is always left out, because losses compare its images",
    "dataloader_in_order": "a run can resume only if batches arrive in order",
    "deepspeed": _ONE_GPU,
    "fsdp": _ONE_GPU,
    "fsdp_config": _ONE_GPU,
    "parallelism_config": _ONE_GPU,
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C save a checkpoint without it",
    "ignore_data_skip": "a run resumes with its next image, and reads no earlier ones",
    "include_num_input_tokens_seen": "images_per_second and epoch are logged",
    "label_smoothing_factor": "the losses have no labels",
    "neftune_noise_alpha": "the augmentation is set in the section views",
    "optim_target_modules": "the rules of the method select the parameters",
    "save_only_model": "the encoder in the output folder contains no optimizer state; set save_total_limit=1",
    "train_sampling_strategy": "batches are random samples, because losses compare their images",
    "use_liger_kernel": _LANGUAGE,
}
"""Argument of transformers that raises a `UserError` -> what to do instead."""

WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the losses are means over images",
    "batch_eval_metrics": _FEATURES,
    "do_eval": "only scripts read it; the trainer measures every monitor_steps steps",
    "do_predict": "only scripts read it; use hf-ssl evaluate",
    "do_train": "only scripts read it",
    "eval_accumulation_steps": _FEATURES,
    "eval_do_concat_batches": _FEATURES,
    "eval_use_gather_object": _FEATURES,
    "include_for_metrics": "compute_metrics receives features and labels",
    "label_names": "training needs no labels; data.label_column names those of the monitor",
    "length_column_name": _LANGUAGE,
    "liger_kernel_config": _LANGUAGE,
    "prediction_loss_only": _FEATURES,
    "remove_unused_columns": "only the columns of images and labels are read",
    "use_cache": _LANGUAGE,
}
"""Argument of transformers that only causes a warning -> the reason."""

_AT_LEAST_ONE = ("gradient_accumulation_steps", "per_device_eval_batch_size")
_TEXT_OR_NUMBER = ("bf16", "fp16", "dataloader_num_workers")
_ACCELERATOR = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")


def check_arguments(args: TrainingArguments) -> None:
    """Reject or report the values of `REJECTED` and `WITHOUT_EFFECT`. Called before `__post_init__`.

    Raises:
        UserError: a rejected argument does not have its default value, a number is missing or too small, or
            `report_to` names no installed tracker.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value is None or value == default or (default == "no" and value is False):
            continue
        if isinstance(default, int | float) and isinstance(value, str) and field.name not in _TEXT_OR_NUMBER:
            raise UserError(f"training.{field.name}: expected a number, got {value!r}")
        if field.name in REJECTED:
            raise UserError(f"training.{field.name}: expected {default}, got {value}; {REJECTED[field.name]}")
        if field.name in WITHOUT_EFFECT:
            _warn_once(f"training.{field.name} has no effect: {WITHOUT_EFFECT[field.name]}")
    for name in _AT_LEAST_ONE:
        if getattr(args, name) < 1:
            raise UserError(f"training.{name}: expected at least 1, got {getattr(args, name)}")
    if args.max_steps == 0:
        raise UserError("training.max_steps: expected a positive number, or -1 for all epochs, got 0")
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise UserError(
                f"training.{name}: expected one of {', '.join(trainer_log_levels)}, got {getattr(args, name)}"
            )
    _check_trackers(args.report_to)


def check_accelerator_config(args: TrainingArguments) -> None:
    """Reject settings of accelerate's data loaders. Called after `__post_init__`.

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
    if name is not None and name not in known and f"eval_{name}" not in known:
        close = get_close_matches(name, known, 1, cutoff=0.8)
        hint = f"did you mean {close[0]}?" if close else f"use {', '.join(known[:3])}, ..."
        raise UserError(
            f"training.metric_for_best_model: expected a measurement of the monitor, got {name}; {hint}"
        )


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
