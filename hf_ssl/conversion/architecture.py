# SPDX-License-Identifier: Apache-2.0
"""The result of reading the weights of an encoder, and the errors of architectures that do not fit."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hf_ssl.conversion.checkpoint import StateDict
from hf_ssl.errors import UserError

TIMM_ADVICE = "If timm has this encoder, hf-ssl evaluate timm/NAME loads it without conversion"


@dataclass
class Architecture:
    """An encoder of transformers, as the names and shapes of weights describe it.

    Attributes:
        name: short name for readers, such as "ResNet-50" or "ViT-S/16".
        model_class: class of transformers.
        config: its configuration.
        weights: all weights, with the names of `model_class`.
        left_out: names of the weights that are not a part of the encoder, as in the file.
        image_size: side of the images in pixels; None: the encoder takes images of any size.
        notes: sentences about changes of the weights.
    """

    name: str
    model_class: type[Any]
    config: PreTrainedConfig
    weights: StateDict
    left_out: list[str]
    image_size: int | None = None
    notes: list[str] = field(default_factory=list)


def weight(weights: StateDict, name: str, family: str, dimensions: int) -> Tensor:
    """Return a weight.

    Raises:
        UserError: it is missing, or has another number of dimensions.
    """
    if name not in weights:
        raise UserError(
            f"checkpoint: expected all weights of a {family}, got none for {name}; download the file again"
        )
    if weights[name].ndim != dimensions:
        raise unsupported(family, f"{name} with {dimensions} dimensions", f"{tuple(weights[name].shape)}")
    return weights[name]


def unsupported(family: str, expected: str, got: str) -> UserError:
    """Return the error for a network that no class of transformers with the same features exists for."""
    return UserError(
        f"checkpoint: expected a {family} with {expected}, got {got}; transformers has no equal encoder. "
        f"{TIMM_ADVICE}"
    )


def unexpected(family: str, name: str) -> UserError:
    """Return the error for a weight that is neither a part of the encoder nor of a known head."""
    return UserError(
        f"checkpoint: expected the weights of a plain {family}, got also {name}, which would change the "
        f"features. {TIMM_ADVICE}"
    )
