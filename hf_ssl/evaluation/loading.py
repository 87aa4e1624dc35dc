# SPDX-License-Identifier: Apache-2.0
"""Loading of encoders with the Auto classes of transformers, from a folder or from the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_ssl.errors import UserError


def load_encoder(model: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Return an encoder in evaluation mode and its image processor.

    Args:
        model: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: the encoder does not exist or cannot be loaded.
    """
    options = {} if revision is None else {"revision": revision}
    with _explained(f"an encoder with its image processor, got {model}"):
        encoder = AutoModel.from_pretrained(model, **options)
        return encoder.eval(), AutoImageProcessor.from_pretrained(model, **options)


def load_weights(model: str) -> PreTrainedModel:
    """Return an encoder from a folder or the Hub, without its processor. Errors: see `load_encoder`."""
    with _explained(f"an encoder, got {model}"):
        encoder: PreTrainedModel = AutoModel.from_pretrained(model)
        return encoder


def load_config(model: str) -> PreTrainedConfig:
    """Return the configuration of an encoder. Errors: see `load_encoder`."""
    with _explained(f"an encoder with its configuration, got {model}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        return config


def fastest_device() -> torch.device:
    """Return the accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: expected a local folder or a Hub id of {what}; {reason}") from error
