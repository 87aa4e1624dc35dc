# SPDX-License-Identifier: Apache-2.0
"""Backbones: initialize and freeze transformers vision encoders, return one feature vector for each image."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ssl.modeling.configuration import CLS_POOLER_TYPES
from hf_ssl.modeling.pooling import pool


def feature_size(backbone: Any) -> int:
    """Return the number of dimensions of the pooled features."""
    config = backbone.config
    if config.model_type == "timm_wrapper":
        return int(backbone.timm_model.num_features)
    attributes = config.to_dict()
    if "hidden_sizes" in attributes:
        return int(attributes["hidden_sizes"][-1])
    return int(config.hidden_size)


def encode(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Return the pooled features (N, D) of images (N, C, H, W).

    Position tables are interpolated if the images do not have the encoder's own size. Images are passed in
    channels-last format. Convolutions are fastest with it (1.3 times on a CPU), other layers are not
    affected.
    """
    arguments: dict[str, object] = {}
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        size = backbone.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        arguments["interpolate_pos_encoding"] = tuple(images.shape[-2:]) != (height, width)
    outputs = backbone(pixel_values=images.contiguous(memory_format=torch.channels_last), **arguments)
    return pool(outputs, model=backbone)


@torch.no_grad()
def set_identity_pooler(backbone: Any) -> None:
    """Make a ViT's pooler the identity, so that `pooler_output` is the class token.

    `AutoModel` always builds the pooler. An encoder saved without one would load with a random
    `pooler_output`, a different one each time.
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        nn.init.eye_(backbone.pooler.dense.weight)
        nn.init.zeros_(backbone.pooler.dense.bias)


def freeze_unused(backbone: PreTrainedModel) -> None:
    """Freeze the parameters that no loss depends on.

    These are the pooler of `set_identity_pooler`, and the mask token of DINOv2 and DINOv3, which hides no
    patch here.
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        backbone.pooler.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def initialize_as_timm(backbone: Any) -> None:
    """Initialize a new timm encoder as timm does.

    transformers' wrapper samples the weights of every layer from N(0, 0.02). In a ResNet, timm's standard
    deviation of a convolution is up to nine times as large. timm also starts the last BatchNorm gain of a
    residual branch at zero, and the wrapper at one. So timm builds the architecture again, and this function
    copies its weights.
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
    """Freeze a vision transformer's patch embedding at its random initialization (MoCo v3, section 4.2).

    Other encoders are not changed.
    """
    attention = any("attn" in name or "attention" in name for name, _ in backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        if attention and re.search(r"(^|\.)patch_embed(ding|dings)?\.", name):
            parameter.requires_grad_(False)
