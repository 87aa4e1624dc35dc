# SPDX-License-Identifier: Apache-2.0
"""Narrow encoders for color views, which together are one encoder for RGB images."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.errors import UserError
from hf_ssl.files import write_json
from hf_ssl.modeling.configuration import as_pair
from hf_ssl.modeling.encoder_parts import PARTS, describe_views
from hf_ssl.modeling.narrow_encoders import feature_width
from hf_ssl.modeling.pooling import pool
from hf_ssl.views.color_spaces import ColorViews


class ParallelEncoders(PreTrainedModel):
    """A narrow encoder for each color view of an image. It takes RGB images and joins all outputs by channel.

    `save_pretrained` writes each narrow encoder to a subfolder of its own, which transformers loads, and
    `encoders.json`. `hf_ssl.modeling.backbones.load_weights` reads such a folder.

    Args:
        config: config of an encoder whose widths are the sums of those of the narrow ones.
        parts: the narrow encoders.
        views: the division of images.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers' own form)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Any, parts: Sequence[PreTrainedModel], views: ColorViews) -> None:
        super().__init__(config)
        self.views = views
        self.parts = nn.ModuleList(parts)
        self.feature_sizes = [feature_width(part.config) for part in parts]
        # transformers would state "sdpa" here also for convolutional encoders.
        self.config._attn_implementation = parts[0].config._attn_implementation
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the joined outputs of the narrow encoders.

        `pooler_output` contains the features (B, D) that `pool` returns for each of them.

        Args:
            pixel_values: (B, 3, H, W) normalized RGB images. If they do not have the size of a vision
                transformer, its position table is interpolated.
            output_hidden_states: whether to return the outputs of all layers.
            output_attentions: whether to return the attention weights; they are joined by heads.
            return_dict: False returns a tuple. None uses the value of the config.
        """
        wanted: dict[str, bool] = {"return_dict": True}
        if output_hidden_states is not None:
            wanted["output_hidden_states"] = output_hidden_states
        first: Any = self.parts[0]
        if output_attentions and "attentions" in (type(first)._can_record_outputs or {}):
            wanted["output_attentions"] = True
        if "interpolate_pos_encoding" in inspect.signature(first.forward).parameters:
            own = as_pair(cast(Any, self.config).image_size)
            wanted["interpolate_pos_encoding"] = tuple(pixel_values.shape[-2:]) != own
        outputs = [
            part(pixel_values=view, **wanted)
            for part, view in zip(self.parts, self.views.divide(pixel_values), strict=True)
        ]
        joined = BaseModelOutputWithPooling(
            last_hidden_state=cast(Any, _join([output.last_hidden_state for output in outputs])),
            pooler_output=cast(Any, self._features(outputs)),
            hidden_states=_join_layers([output.hidden_states for output in outputs], dim=None),
            attentions=_join_layers([output.get("attentions") for output in outputs], dim=1),
        )
        return (
            joined if (self.config.return_dict if return_dict is None else return_dict) else joined.to_tuple()
        )

    def _features(self, outputs: Sequence[Any]) -> Tensor:
        features = [
            pool(output, model=cast(Any, part)) for output, part in zip(outputs, self.parts, strict=True)
        ]
        return torch.cat(features, dim=1)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """Write each narrow encoder to its subfolder, and `encoders.json` (`hf_ssl.modeling.encoder_parts`).

        Args:
            save_directory: created if it does not exist.
            kwargs: arguments of `save_pretrained` of each narrow encoder.
        """
        for part, name in zip(self.parts, self.subfolders, strict=True):
            cast(Any, part).save_pretrained(Path(save_directory) / name, **kwargs)
        write_json(Path(save_directory) / PARTS, describe_views(self.views))

    @property
    def subfolders(self) -> list[str]:
        """Return the name of the subfolder of each narrow encoder."""
        return [each["subfolder"] for each in describe_views(self.views)["encoders"]]

    def exported(self) -> PreTrainedModel:
        """Return the encoder that is published: this one."""
        return self

    @torch.no_grad()
    def load_exported(self, encoder: nn.Module) -> None:
        """Copy the weights of a published encoder to the narrow encoders: the inverse of `exported`.

        Raises:
            UserError: the encoder has other color views or other shapes.
        """
        given, own = encoder.state_dict(), self.state_dict()
        if not (
            isinstance(encoder, ParallelEncoders)
            and encoder.views == self.views
            and given.keys() == own.keys()
            and all(value.shape == given[name].shape for name, value in own.items())
        ):
            raise UserError(OTHER_ENCODER)
        self.load_state_dict(given)


OTHER_ENCODER = (
    "backbone.init_from: expected an encoder that CMC exported with the same color_space, channel_groups, "
    "views.mean and views.std, got another one"
)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    """Return tokens (B, T, D) or feature maps (B, D, H, W) with all features."""
    return torch.cat(list(tensors), dim=-1 if tensors[0].ndim == 3 else 1)


def _join_layers(parts: Sequence[Any], dim: int | None) -> tuple[Tensor, ...] | None:
    """Return the joined tensors of each layer, or None if the parts return none."""
    if parts[0] is None:
        return None
    layers = zip(*parts, strict=True)
    return tuple(_join(same) if dim is None else torch.cat(same, dim=dim) for same in layers)
