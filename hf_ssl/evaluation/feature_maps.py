# SPDX-License-Identifier: Apache-2.0
"""Feature maps of an encoder for images of any size, for protocols that localize objects (layer 1).

Legend: B images, C channels, H height and W width of an image.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from hf_ssl.errors import UserError, first_line
from hf_ssl.evaluation.classifiers import trainable_copy
from hf_ssl.modeling.backbones import input_channels
from hf_ssl.modeling.configuration import patch_sides, size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode, unchanged_random_state

_PROBE = 256
"""Smallest side in pixels of the test input that measures the strides. 128 is too small for Swin."""
_MOST_PREFIX_TOKENS = 16


class FeatureMaps(nn.Module):
    """Base class: `forward` returns one feature map (B, C, H / stride, W / stride) per stride.

    Args:
        encoder: the encoder or its backbone, which becomes a submodule.
        divisor: see below.

    Attributes:
        divisor: a number that must divide H and W.
        strides: stride of each map in pixels, ascending.
        channels: C of each map.
        kept: indices of the maps of `all_maps` that `forward` returns.
    """

    def __init__(self, encoder: Any, divisor: int = 1) -> None:
        super().__init__()
        self.encoder, self.divisor = encoder, divisor
        self.strides: list[float] = []
        self.channels: list[int] = []
        self.kept: list[int] = []

    @property
    def is_plain(self) -> bool:
        """Whether the encoder is a plain vision transformer, which has one map."""
        return isinstance(self, TokenMap)

    def all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return all maps of images (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} defines no all_maps")

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the chosen maps of images (B, C, H, W)."""
        found = self.all_maps(pixel_values)
        return [found[number] for number in self.kept]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that come from the encoder."""
        return list(self.encoder.parameters())

    def choose(self, pixel_values: Tensor, smallest_stride: float) -> None:
        """Choose the last map of each stride that is not below the smallest stride.

        If all strides are smaller, choose the map with the largest stride.

        Args:
            pixel_values: a square image (1, C, H, H), which measures the strides.
            smallest_stride: in pixels. Strides are compared after rounding to powers of two.

        Raises:
            UserError: there is no map, or a map is not square.
        """
        with evaluation_mode(self):
            found = self.all_maps(pixel_values)
        side = pixel_values.shape[-1]
        by_level = {round(math.log2(side / each.shape[-1])): number for number, each in enumerate(found)}
        if not found or any(each.shape[-1] != each.shape[-2] for each in found):
            shapes = ", ".join(str(tuple(each.shape)) for each in found) or "none"
            raise _no_map(self.encoder, f"the maps {shapes}")
        lowest = min(round(math.log2(smallest_stride)), max(by_level))
        self.kept = [number for level, number in sorted(by_level.items()) if level >= lowest]
        self.strides = [side / found[number].shape[-1] for number in self.kept]
        self.channels = [found[number].shape[1] for number in self.kept]


class StageMaps(FeatureMaps):
    """The maps of the stages, from the class of `AutoBackbone` (ResNet, ConvNeXt, Swin and others).

    Some of these classes add a new LayerNorm for each map. For the last map of Swin, it gets the weights of
    the encoder's final LayerNorm. The others start with weight 1 and bias 0. These layers are not part of
    the encoder, so they are also trained if the encoder is frozen.

    Args:
        encoder: the encoder, which does not change.
        stages: names of the stages; None for all.
    """

    def __init__(self, encoder: Any, stages: list[str] | None = None) -> None:
        config = copy.deepcopy(encoder.config)
        chosen = list(config.stage_names[1:]) if stages is None else stages
        config.out_features = chosen
        with unchanged_random_state(torch.device("cpu")):
            backbone = AutoBackbone.from_config(config, trust_remote_code=False)
        target = getattr(backbone, backbone.base_model_prefix, backbone)
        report = target.load_state_dict(encoder.state_dict(), strict=False)
        missing = [name for name in report.missing_keys if not name.startswith("hidden_states_norms.")]
        if missing:
            raise UserError(
                f"detection: expected the weights of {type(backbone).__name__}, got {type(encoder).__name__} "
                f"without {', '.join(missing[:3])}; use an encoder from AutoModel"
            )
        super().__init__(backbone)
        self.stages = chosen
        norms = getattr(backbone, "hidden_states_norms", {})
        self._new = {id(each) for norm in norms.values() for each in norm.parameters()}
        if target is not backbone:  # Swin: the maps do not pass the final LayerNorm of the encoder
            target.layernorm.requires_grad_(False)
            if config.stage_names[-1] in norms:
                norms[config.stage_names[-1]].load_state_dict(target.layernorm.state_dict())

    def all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return all maps of images (B, C, H, W)."""
        return list(self.encoder(pixel_values=pixel_values).feature_maps)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that come from the encoder, without those of the new LayerNorms."""
        return [each for each in self.encoder.parameters() if id(each) not in self._new]


class StateMaps(FeatureMaps):
    """The hidden states of a convolutional network without a class of `AutoBackbone`.

    Args:
        encoder: the encoder, which does not change.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__(trainable_copy(encoder))

    def all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return all maps of images (B, C, H, W)."""
        outputs = self.encoder(pixel_values=pixel_values, output_hidden_states=True)
        states = [*(outputs.get("hidden_states") or ()), outputs["last_hidden_state"]]
        return [each for each in states if each.ndim == 4]


class TokenMap(FeatureMaps):
    """The map of the patch tokens of a vision transformer, with interpolated position tables.

    Args:
        encoder: the encoder, which does not change.
        patch: its patch size in pixels.
    """

    def __init__(self, encoder: Any, patch: int) -> None:
        super().__init__(trainable_copy(encoder), patch)
        self.patch = patch

    def all_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the map of images (B, C, H, W) in a list."""
        height, width = (side // self.patch for side in pixel_values.shape[-2:])
        outputs = self.encoder(pixel_values=pixel_values, **size_arguments(self.encoder, pixel_values))
        patches = outputs.last_hidden_state[:, -height * width :]  # after the class token and registers
        return [patches.transpose(1, 2).unflatten(2, (height, width))]


def feature_maps(encoder: Any, smallest_stride: float) -> FeatureMaps:
    """Return the feature maps of a copy of an encoder. The encoder itself does not change.

    Args:
        encoder: a vision encoder of transformers.
        smallest_stride: see `FeatureMaps.choose`.

    Raises:
        UserError: the encoder has no map of features, or accepts only images of one size.
    """
    config = getattr(encoder, "config", None)
    if config is None:
        raise _no_map(encoder, "a module without config")
    patch = max(patch_sides(config))
    side = patch * math.ceil(_PROBE / patch)
    pixels = torch.zeros(1, input_channels(config), side, side, device=next(encoder.parameters()).device)
    try:
        probed = copy.deepcopy(encoder).float()  # the forward pass of Swin changes its windows
        with evaluation_mode(probed):
            outputs = probed(pixel_values=pixels, output_hidden_states=True, **size_arguments(probed, pixels))
            last = outputs.get("last_hidden_state")
        del probed
        shape = () if last is None else tuple(last.shape)
        has_stages = len(shape) == 4 or outputs.get("reshaped_hidden_states") is not None
        prefix = shape[1] - (side // patch) ** 2 if len(shape) == 3 else -1
        maps: FeatureMaps
        if has_stages and type(config) in MODEL_FOR_BACKBONE_MAPPING:
            maps = StageMaps(encoder).to(pixels.device)
            maps.choose(pixels, smallest_stride)
            maps = StageMaps(encoder, [maps.stages[number] for number in maps.kept]).to(pixels.device)
        elif len(shape) == 4:
            maps = StateMaps(encoder)
        elif patch > 1 and 0 <= prefix <= _MOST_PREFIX_TOKENS:
            maps = TokenMap(encoder, patch)
        else:
            raise _no_map(encoder, f"last_hidden_state {shape}" if shape else "no last_hidden_state")
        maps.choose(pixels, smallest_stride)
    except UserError:
        raise
    except Exception as error:  # the code of another library may raise anything
        raise UserError(
            f"detection: expected an encoder that accepts images of {side} pixels, got "
            f"{type(encoder).__name__} with the error: {first_line(error)[:150]}; use another encoder"
        ) from error
    return maps


def _no_map(encoder: Any, got: str) -> UserError:
    return UserError(
        f"detection: expected an encoder with a spatial map of features, got {got} of "
        f"{type(encoder).__name__}; use a convolutional network or a vision transformer"
    )
