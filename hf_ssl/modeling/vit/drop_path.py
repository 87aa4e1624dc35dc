# SPDX-License-Identifier: Apache-2.0
"""Stochastic depth (drop path) for stock vision transformers, most of which do not have it."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.modeling.backbones import layers
from hf_ssl.modeling.vit.patches import PATCH_SELECTION_TYPES


def add_drop_path(backbone: Any, rate: float) -> None:
    """Add stochastic depth to the residual branches of a vision transformer, separately for each image.

    The rate increases over the blocks from 0 to `rate`, and the remaining branches are scaled up. Both
    branches of a block end in a module without weights (a dropout, or DINOv2's own drop path). A hook
    replaces the output of that module, so the names of weights and the encoder's code do not change. Other
    encoders are not changed: ConvNeXt V2 has `backbone.drop_path_rate`.

    Source: Huang et al., arXiv:1603.09382; the schedule is that of facebookresearch/dino.
    """
    if rate == 0 or backbone.config.model_type not in PATCH_SELECTION_TYPES:
        return
    blocks: list[Any] = layers(backbone)
    for number, layer in enumerate(blocks):
        own = rate * number / max(1, len(blocks) - 1)
        end = layer.drop_path if "drop_path" in dict(layer.named_children()) else layer.dropout
        end.register_forward_hook(partial(_drop_path, own))


def without_drop_path(config: Any) -> Any:
    """Return a copy of the encoder's config without stochastic depth, for a teacher."""
    config = copy.deepcopy(config)
    if "drop_path_rate" in config.to_dict():
        config.drop_path_rate = 0.0
    return config


def _drop_path(rate: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Drop the output of a module for some images. With `functools.partial`, this is a forward hook."""
    if not module.training or rate == 0:
        return output
    kept = torch.rand(output.shape[0], *[1] * (output.ndim - 1), device=output.device) >= rate
    return output * kept.to(output.dtype) / (1 - rate)
