# SPDX-License-Identifier: Apache-2.0
"""Encoders: built from any transformers vision config, run on images of any size, asked for one vector an
image.
"""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from hf_ssl.modeling.configuration import CLS_POOLER_TYPES
from hf_ssl.modeling.pooling import pool


def build_backbone(config: Any) -> PreTrainedModel:
    """A new encoder with random weights; they are initialised by `post_init` of the model that holds it."""
    return AutoModel.from_config(config)


def feature_size(backbone: Any) -> int:
    """Dimensions of one image's pooled features."""
    config = backbone.config
    if config.model_type == "timm_wrapper":
        return int(backbone.timm_model.num_features)
    attributes = config.to_dict()
    if "hidden_sizes" in attributes:
        return int(attributes["hidden_sizes"][-1])
    return int(config.hidden_size)


def encode(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Pooled features (N, D) of images (N, C, H, W); position tables are interpolated where the size is not
    the encoder's own.

    Images are handed over channels-last, which is what convolutions are fastest with (1.3 times on a CPU)
    and others do not mind.
    """
    arguments: dict[str, object] = {}
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        size = backbone.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        arguments["interpolate_pos_encoding"] = tuple(images.shape[-2:]) != (height, width)
    outputs = backbone(pixel_values=images.contiguous(memory_format=torch.channels_last), **arguments)
    return pool(outputs, model=backbone)


@torch.no_grad()
def hand_out_cls_token(backbone: Any) -> None:
    """Make a ViT's pooler the identity on the CLS token.

    `AutoModel` always builds the pooler: an encoder saved without one reloads with a random
    `pooler_output`, a different one each time.
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        nn.init.eye_(backbone.pooler.dense.weight)
        nn.init.zeros_(backbone.pooler.dense.bias)


def freeze_unused(backbone: PreTrainedModel) -> None:
    """Freeze what pretraining never reaches: the pooler of `hand_out_cls_token`, and a mask token that
    hides no patch (DINOv2, DINOv3).
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        backbone.pooler.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def initialize_as_timm(backbone: Any) -> None:
    """Give a new timm encoder timm's own initialisation.

    transformers' wrapper draws every weight from N(0, 0.02): convolutions start at a third of their scale
    and residual branches at full strength. A deep copy of the architecture is built by timm and its weights
    are taken.
    """
    if backbone.config.model_type == "timm_wrapper" and not next(backbone.parameters()).is_meta:
        import timm

        fresh = timm.create_model(
            backbone.config.architecture,
            pretrained=False,
            num_classes=0,
            **(backbone.config.model_args or {}),
        )
        backbone.timm_model.load_state_dict(fresh.state_dict())


def freeze_patch_embedding(backbone: PreTrainedModel) -> None:
    """Keep a vision transformer's patch embedding as it was drawn (MoCo v3, section 4.2); others are left
    alone.
    """
    attention = any("attn" in name or "attention" in name for name, _ in backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        if attention and re.search(r"(^|\.)patch_embed(ding|dings)?\.", name):
            parameter.requires_grad_(False)
