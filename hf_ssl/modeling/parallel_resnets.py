# SPDX-License-Identifier: Apache-2.0
"""Narrow ResNets for color views, which together are one ResNet for RGB images."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, ResNetModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.models.resnet.modeling_resnet import ResNetPreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.views.color_spaces import ColorViews

_FIRST = "embedder.embedder.convolution.weight"
_TOLERANCE = 1e-4  # relative to the largest weight; a published first convolution is rounded to float32


class ParallelResNets(ResNetPreTrainedModel):
    """A narrow ResNet for each color view of an image. It takes RGB images, and joins all outputs by channel.

    In a linear color space, `fold` returns a single `ResNetModel` with equal outputs. The linear map of each
    view becomes a part of the first convolution. The weights of each later convolution are a block-diagonal
    matrix, whose blocks are those of the narrow ResNets. BatchNorm treats each channel separately, so its
    values are only concatenated.

    Training uses the narrow ResNets, because they need fewer operations. With M views, the folded ResNet
    needs about M times as many operations, and the additional ones are multiplications by zero.

    Args:
        config: config of the folded `ResNetModel`.
        narrow: config of each narrow ResNet. Their widths add up to those of `config`.
        views: the division of images.

    Raises:
        UserError: an activation has parameters.
    """

    def __init__(self, config: Any, narrow: Sequence[PreTrainedConfig], views: ColorViews) -> None:
        super().__init__(config)
        self.views = views
        self.parts = nn.ModuleList(ResNetModel(cast(Any, each)) for each in narrow)
        self.feature_sizes = [cast(Any, each).hidden_sizes[-1] for each in narrow]
        for module in self.parts[0].modules():
            if list(module.parameters(recurse=False)) and not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                raise UserError(
                    "backbone.hidden_act: expected an activation without parameters, because only such "
                    f"narrow encoders fold into one, got {config.hidden_act}"
                )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the joined outputs of the narrow ResNets, see `ResNetModel`.

        Args:
            pixel_values: (B, 3, H, W) normalized RGB images.
            output_hidden_states: whether to return the outputs of all stages.
            output_attentions: has no effect, as in `ResNetModel`.
            return_dict: False returns a tuple. None uses the value of the config.
        """
        outputs = [
            part(pixel_values=view, output_hidden_states=output_hidden_states, return_dict=True)
            for part, view in zip(self.parts, self.views.divide(pixel_values), strict=True)
        ]
        states = None
        if outputs[0].hidden_states is not None:
            states = tuple(
                torch.cat(same, dim=1)
                for same in zip(*(output.hidden_states for output in outputs), strict=True)
            )
        joined = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=torch.cat([output.last_hidden_state for output in outputs], dim=1),
            pooler_output=torch.cat([output.pooler_output for output in outputs], dim=1),
            hidden_states=states,
        )
        return (
            joined if (self.config.return_dict if return_dict is None else return_dict) else joined.to_tuple()
        )

    @torch.no_grad()
    def fold(self) -> ResNetModel:
        """Return a new `ResNetModel` for RGB images with equal outputs.

        Raises:
            UserError: the color space is not linear.
        """
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
    def load_folded(self, encoder: nn.Module) -> None:
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
            raise UserError(
                "backbone.init_from: expected an encoder that CMC exported with the same color_space, "
                "channel_groups, views.mean and views.std, got another one"
            )

    def check_folding(self) -> None:
        """Raise `UserError` if the color space is not linear."""
        if self.views.matrices is None:
            raise UserError(
                "method.color_space: expected a linear color space (ydbdr, ycbcr or rgb), because only its "
                f"narrow encoders fold into one encoder that can be published, got {self.views.space}"
            )

    def _maps(self) -> list[Tensor]:
        """Return the linear map (c, 3) of each view in float64, which autocast and TF32 do not change."""
        self.check_folding()
        weight = self.parts[0].get_parameter(_FIRST)
        return [weight.new_tensor(matrix, dtype=torch.float64) for matrix in self.views.matrices or ()]


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
