# SPDX-License-Identifier: Apache-2.0
"""Narrow ResNets for color views, which together are one ResNet for RGB images."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, ResNetModel

from hf_ssl.errors import UserError
from hf_ssl.modeling.narrow_encoders import narrow_configs
from hf_ssl.modeling.parallel_encoders import OTHER_ENCODER, ParallelEncoders
from hf_ssl.views.color_spaces import ColorViews

_FIRST = "embedder.embedder.convolution.weight"
_TOLERANCE = 1e-4  # relative to the largest weight; a published first convolution is rounded to float32


class ParallelResNets(ParallelEncoders):
    """Narrow ResNets that fold exactly into one ResNet for RGB images.

    The linear map of each view becomes a part of the first convolution. The weights of each later convolution
    are a block-diagonal matrix, whose blocks are those of the narrow ResNets. BatchNorm treats each channel
    separately, so its values are only concatenated.

    Training uses the narrow ResNets, because they need fewer operations. With M views, the folded ResNet
    needs about M times as many operations, and the additional ones are multiplications by zero.
    """

    @classmethod
    def is_exact(cls, config: Any, parts: Sequence[PreTrainedModel], views: ColorViews) -> bool:
        """Return whether narrow encoders fold into one encoder with this config.

        They must be ResNets of a linear color space, whose activations have no parameters. The first block of
        all of them must have a shortcut convolution if that of the folded encoder has one, and else none.
        """
        if config.model_type != "resnet" or views.matrices is None:
            return False
        own = [module for module in parts[0].modules() if list(module.parameters(recurse=False))]
        shortcuts = {
            each.downsample_in_first_stage or each.embedding_size != each.hidden_sizes[0]
            for each in (config, *(cast(Any, part).config for part in parts))
        }
        return len(shortcuts) == 1 and all(isinstance(layer, nn.Conv2d | nn.BatchNorm2d) for layer in own)

    def exported(self) -> PreTrainedModel:
        """Return the encoder that is published: the folded one."""
        return self.fold()

    @torch.no_grad()
    def fold(self) -> ResNetModel:
        """Return a new `ResNetModel` for RGB images with equal outputs."""
        maps, parts = self._maps(), [part.state_dict() for part in self.parts]
        example, config = parts[0][_FIRST], copy.deepcopy(cast(Any, self.config))
        config._attn_implementation = "eager"  # `choose_attention` changes it, and a ResNet knows no other
        with torch.inference_mode(False):  # the monitor calls this function in inference mode
            with torch.device("meta"):
                full = ResNetModel(config)
            full = full.to_empty(device=example.device).to(example.dtype)
        for name, value in full.state_dict().items():
            value.zero_()
            blocks = [part[name] for part in parts]
            for block, region, matrix in zip(blocks, _regions(name, blocks), maps, strict=True):
                value[region] = (
                    torch.einsum("oikl,ic->ockl", block.double(), matrix) if name == _FIRST else block
                )
        return full.train(self.training)

    @torch.no_grad()
    def load_exported(self, encoder: nn.Module) -> None:
        """Copy the weights of a folded encoder to the narrow ResNets: the inverse of `fold`.

        Raises:
            UserError: the encoder is not a folded one with the same color space, division and normalization.
        """
        maps, given = self._maps(), encoder.state_dict()
        folded = self.fold().state_dict()
        fits = folded.keys() == given.keys() and all(
            value.shape == given[name].shape for name, value in folded.items()
        )
        if fits:
            parts = [part.state_dict() for part in self.parts]
            for name in folded:
                blocks = [part[name] for part in parts]
                for block, region, matrix in zip(blocks, _regions(name, blocks), maps, strict=True):
                    found = given[name][region]
                    if name == _FIRST:
                        found = torch.einsum("ockl,ci->oikl", found.double(), torch.linalg.pinv(matrix))
                    block.copy_(found)
            fits = all(_is_close(value, given[name]) for name, value in self.fold().state_dict().items())
        if not fits:
            raise UserError(OTHER_ENCODER)

    def _maps(self) -> list[Tensor]:
        """Return the linear map (c, 3) of each view in float64, which autocast and TF32 do not change."""
        weight = self.parts[0].get_parameter(_FIRST)
        return [weight.new_tensor(matrix, dtype=torch.float64) for matrix in self.views.matrices or ()]


def new_parallel_encoders(config: Any, views: ColorViews) -> ParallelEncoders:
    """Return new narrow encoders of color views: `ParallelResNets` if they fold exactly into one encoder.

    Args:
        config: config of the encoder whose widths they share.
        views: the division of images.

    Raises:
        UserError: a width cannot be divided.
    """
    parts = [AutoModel.from_config(narrow) for narrow in narrow_configs(config, views.groups)]
    kind = ParallelResNets if ParallelResNets.is_exact(config, parts, views) else ParallelEncoders
    return kind(config, parts, views)


def _regions(name: str, blocks: Sequence[Tensor]) -> list[tuple[slice, ...]]:
    """Return the part of a folded tensor that the tensor of each narrow ResNet fills."""
    regions: list[tuple[slice, ...]] = []
    ends = [0] * 2
    for block in blocks:
        dims = min(block.ndim, 1 if name == _FIRST else 2)  # the first convolution reads all colors
        starts = ends
        ends = [start + size for start, size in zip(starts, (*block.shape, 0, 0), strict=False)]
        regions.append(tuple(slice(starts[dim], ends[dim]) for dim in range(dims)))
    return regions


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of the first convolution."""
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    return bool(((found - expected).abs() <= _TOLERANCE * largest).all())
