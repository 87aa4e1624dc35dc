# SPDX-License-Identifier: Apache-2.0
"""Checks the settings that count epochs, for a stream whose length is not known."""

import logging

from transformers import IntervalStrategy
from transformers.trainer_utils import SaveStrategy

from hf_ssl.data import DataConfig, Source
from hf_ssl.errors import UserError
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.trainer.arguments import SSLTrainingArguments

logger = logging.getLogger(__name__)

IN_EPOCHS = {
    "warmup_epochs": "training.warmup_steps=N",
    "head_warmup_epochs": None,
    "learning_rate_drops": None,
    "eval_strategy": "training.monitor_steps=N",
    "save_strategy": "training.save_steps=N",
    "logging_strategy": "training.logging_steps=N",
}
"""Training argument that can count epochs -> the same setting in steps, if there is one. It omits
`num_train_epochs`, because `max_steps` replaces it."""
_STRATEGIES = (IntervalStrategy.EPOCH, SaveStrategy.EPOCH)


def check_epochs(
    args: SSLTrainingArguments, method: SSLPreTrainedModel, source: Source, data: DataConfig
) -> None:
    """Check the settings that count epochs.

    Args:
        args: the training arguments.
        method: the model of the method.
        source: the training images.
        data: the section `data`.

    Raises:
        UserError: the length of a stream is not known, and a setting counts epochs or `max_steps` is not set;
            or `data.num_images` is set for other data than a stream.
    """
    if data.num_images is not None and not source.streaming:
        raise UserError(
            f"data.num_images: expected no value, because {source.description} is not a stream, got "
            f"{data.num_images}; use data.max_images to train on fewer images"
        )
    if source.num_rows is not None:
        return
    if args.max_steps <= 0:
        raise UserError(
            "training.max_steps: expected a positive number for a stream of unknown length, got -1; set it, "
            "or data.num_images=N, the number of images"
        )
    found = {f"training.{name}": getattr(args, name) for name in IN_EPOCHS}
    found |= {f"method.{name}": value for name, value in method.settings_in_epochs(method.config).items()}
    for key, value in found.items():
        if key.endswith("_strategy"):
            expected, value = "another value than epoch", value if value in _STRATEGIES else None
        else:
            expected = "no value" if isinstance(value, list) else "0"
        if value:
            advice = IN_EPOCHS.get(key.removeprefix("training."))
            shown = f"{value:g}" if isinstance(value, float) else getattr(value, "value", value)
            steps = "" if advice is None else f", or {advice}"
            raise UserError(
                f"{key}: expected {expected} for a stream of unknown length, which has no epochs, got "
                f"{shown}; set data.num_images=N, the number of images{steps}"
            )


def warn_about_frozen_backbone(args: SSLTrainingArguments, steps_per_epoch: int, total_steps: int) -> None:
    """Log a warning if the backbone is frozen in every step of the run."""
    frozen = round(args.head_warmup_epochs * steps_per_epoch)
    if frozen and frozen >= total_steps:
        logger.warning(
            "training.head_warmup_epochs: the backbone does not change in this run, because it is frozen for "
            "%d steps and the run has %d", frozen, total_steps,
        )  # fmt: skip
