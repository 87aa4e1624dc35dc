# SPDX-License-Identifier: Apache-2.0
"""Backbones: sizes, features, initialization and frozen parameters of encoders of transformers (layer 1)."""

import copy
import inspect
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ssl.errors import UserError, one_line
from hf_ssl.modeling.configuration import (
    CLS_POOLER_TYPES,
    as_pair,
    has_rectangular_table,
    patch_sides,
    size_arguments,
)
from hf_ssl.modeling.eval_mode import copy_without_values, evaluation_mode, unchanged_random_state
from hf_ssl.modeling.pooling import pool

_feature_sizes: dict[str, int] = {}


def input_channels(config: Any) -> int:
    """Return the number of channels that an encoder with this config expects."""
    if config.model_type == "timm_wrapper":
        return int((config.model_args or {}).get("in_chans", 3))
    return int(config.to_dict().get("num_channels", 3))


def feature_size(backbone: Any) -> int:
    """Return the number of dimensions of the pooled features.

    A forward pass on torch's meta device measures it, because configs name it differently or not at all
    (EfficientNet, MobileNetV2, MobileViT, timm's MobileNetV3). If operations of the encoder depend on values,
    the result is the config's `hidden_size`.

    Raises:
        UserError: the encoder has no output that can be pooled, or the pass fails and the config has no
            `hidden_size`.
    """
    key = f"{type(backbone)} {backbone.config.to_json_string(use_diff=False)}"
    if key not in _feature_sizes:
        copied: Any = copy_without_values(backbone)
        try:
            _feature_sizes[key] = encode(copied, example_images(copied)).shape[1]
        except RuntimeError as error:
            size = backbone.config.to_dict().get("hidden_size")
            if size is None:
                raise UserError(
                    "backbone: expected an encoder with a working forward pass, got "
                    f"{backbone.config.model_type} with the error: {str(error).partition(chr(10))[0][:150]}"
                ) from error
            return int(size)
    return _feature_sizes[key]


def example_images(copied: Any) -> Tensor:
    """Return images (2, C, H, W) on the meta device, of the size that an encoder expects."""
    config = copied.config
    if config.model_type == "timm_wrapper":
        size = (config.model_args or {}).get("img_size") or copied.timm_model.pretrained_cfg["input_size"][1:]
    else:
        size = config.to_dict().get("image_size") or 224
    return torch.empty(2, input_channels(config), *as_pair(size), device="meta")


def check_image_sizes(
    backbone: Any, sizes: Sequence[int], channels: int, published_size: int | None = None
) -> None:
    """Check by a forward pass on torch's meta device that an encoder can encode square images of these sizes.

    If this pass fails, the function repeats it with zeros on the encoder's device, because operations can
    depend on values. A transformer ignores the last pixels of an image if a side is not a multiple of its
    patch size.

    Args:
        backbone: the encoder, possibly on the device "meta".
        sizes: sides of the images, in pixels.
        channels: number of channels of the images.
        published_size: side in pixels of the images that the published encoder receives; None: not checked.

    Raises:
        UserError: the encoder cannot encode images of one of these sizes.
    """
    known, sides = backbone.config.to_dict(), sorted(set(sizes))
    patch = max(patch_sides(backbone.config))
    for side in sides:
        if side % patch:
            raise UserError(
                f"views.size: expected a multiple of backbone.patch_size={patch}, got {side}; use "
                f"{max(1, side // patch) * patch}"
            )
    # Users of the published encoder do not pass `interpolate_pos_encoding`.
    own = as_pair(known.get("image_size") or 0)
    if has_rectangular_table(backbone):
        raise UserError(
            "backbone.image_size: expected a square, because the views are squares, got "
            f"{own[0]} x {own[1]}; use {sides[-1]}, or start from an encoder of square images"
        )
    interpolates = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    if interpolates and published_size is not None and own not in ((0, 0), (published_size, published_size)):
        raise UserError(
            f"views.size: expected {own[0]}, the backbone.image_size, got {published_size}; use "
            f"views.size={own[0]}, or views.enlarge={own[0]} for smaller crops"
        )
    is_meta = next(backbone.parameters()).is_meta
    copied = copy_without_values(backbone)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(_require_pixels)
    for model in (copied, *([] if is_meta else [backbone])):
        device = next(model.parameters()).device
        try:
            with evaluation_mode(model):
                for side in sides:
                    encode(cast(Any, model), torch.zeros(2, channels, side, side, device=device))
        except Exception as error:  # the code of another library may raise anything
            # NotImplementedError: the encoder has an operation that cannot run on shapes alone.
            if model is backbone or (is_meta and not isinstance(error, NotImplementedError)):
                raise UserError(
                    f"backbone: expected an encoder for views of {sides} pixels, got "
                    f"{backbone.config.model_type}: {type(error).__name__} {one_line(error)[:200]}"
                ) from error
        else:
            return


def _require_pixels(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Raise an error for an output without pixels. On the meta device, torch 2.6 raises none."""
    if not output.numel():
        raise RuntimeError(f"the kernel {module.kernel_size} is larger than its input {inputs[0].shape[2:]}")


def encode(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Return the pooled features (N, D) of images (N, C, H, W).

    Position tables are interpolated if the images do not have the encoder's own size. Images are passed in
    channels-last format. Convolutions are fastest in this format (1.3 times on a CPU). Other layers are not
    affected.
    """
    pixels = images.contiguous(memory_format=torch.channels_last)
    return pool(backbone(pixel_values=pixels, **size_arguments(backbone, images)), model=backbone)


def encode_without_columns(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Return `encode` of images (N, C, H, W) whose channels may include those of further image columns."""
    return encode(backbone, images[:, : input_channels(backbone.config)])


@torch.no_grad()
def set_identity_pooler(backbone: Any) -> None:
    """Make a ViT's pooler the identity, so that `pooler_output` is the class token.

    `AutoModel` always builds the pooler. An encoder saved without one would load with a random
    `pooler_output`, a different one each time.
    """
    for pooler in _class_token_poolers(backbone):
        nn.init.eye_(pooler.dense.weight)
        nn.init.zeros_(pooler.dense.bias)


def _class_token_poolers(backbone: nn.Module) -> list[Any]:
    """Return the poolers of `CLS_POOLER_TYPES` in an encoder, or in each of its parts."""
    found = [
        getattr(module, "pooler", None)
        for module in backbone.modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type in CLS_POOLER_TYPES
    ]
    return [pooler for pooler in found if pooler is not None]


def layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a vision transformer, first to last: the members of its first list of modules."""
    lists = (list(m) for m in backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    return next(filter(None, lists), [])


def freeze_unused(backbone: PreTrainedModel) -> None:
    """Freeze the parameters that no loss depends on.

    These are the pooler of `set_identity_pooler`, and the mask token of DINOv2 and DINOv3, which hides no
    patch here.
    """
    for pooler in _class_token_poolers(backbone):
        pooler.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def initialize_as_timm(backbone: Any) -> None:
    """Initialize a new timm encoder as timm does.

    transformers' wrapper samples the weights of every layer from N(0, 0.02). In a ResNet, timm's standard
    deviation of a convolution is up to nine times as large. timm also starts the last BatchNorm gain of a
    residual branch at zero, and the wrapper at one. Therefore, timm builds the architecture again, and this
    function copies its weights.
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


def with_new_weights(backbone: Any, seed: int) -> Any:
    """Return an encoder with the same configuration and new random weights, in evaluation mode."""
    device = next(backbone.parameters()).device
    with unchanged_random_state(torch.device("cpu")):
        torch.manual_seed(seed)
        created = type(backbone)(copy.deepcopy(backbone.config))
        initialize_as_timm(created)
    set_identity_pooler(created)
    return created.eval().to(device)


def freeze_patch_embedding(backbone: PreTrainedModel) -> None:
    """Freeze a vision transformer's patch embedding at its random initialization (MoCo v3, section 4.2).

    Other encoders are not changed.
    """
    attention = any("attn" in name or "attention" in name for name, _ in backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        if attention and re.search(r"(^|\.)patch_embed(ding|dings)?\.", name):
            parameter.requires_grad_(False)
