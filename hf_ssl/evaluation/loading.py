# SPDX-License-Identifier: Apache-2.0
"""Opens an encoder as a stranger does: with the Auto classes, from a folder or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_ssl.errors import UserError


def load_encoder(model: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """An encoder in eval mode and its image processor.

    Args:
        model: a folder, or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    options = {} if revision is None else {"revision": revision}
    with _explained(f"an encoder and its image processor from {model}"):
        encoder = AutoModel.from_pretrained(model, **options)
        return encoder.eval(), AutoImageProcessor.from_pretrained(model, **options)


def load_weights(model: str) -> PreTrainedModel:
    """An encoder alone, from a folder or the Hub. Raises `UserError` as `load_encoder` does."""
    with _explained(f"an encoder from {model}"):
        encoder: PreTrainedModel = AutoModel.from_pretrained(model)
        return encoder


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of an encoder. Raises `UserError` as `load_encoder` does."""
    with _explained(f"the configuration of an encoder from {model}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        return config


def fastest_device() -> torch.device:
    """The accelerator, if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load {what}: expected a folder here or a model on the Hub; {reason}"
        ) from error
