# SPDX-License-Identifier: Apache-2.0
"""Narrow encoders for color views, which together are one encoder for RGB images.

`ParallelResNets` fold into one stock encoder. Other narrow encoders are published in subfolders, which
`find_parts` finds.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ResNetModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.errors import UserError, loading_reason
from hf_ssl.files import write_json
from hf_ssl.modeling.configuration import size_arguments
from hf_ssl.modeling.encoder_parts import PARTS, describe_views, described_views, listed_subfolders
from hf_ssl.modeling.narrow_encoders import feature_width, joined_config, narrow_configs
from hf_ssl.modeling.pooling import pool
from hf_ssl.views.color_spaces import ColorViews

_FIRST = "embedder.embedder.convolution.weight"
_TOLERANCE = 1e-4  # relative to the largest weight; a published first convolution is rounded to float32


class ParallelEncoders(PreTrainedModel):
    """A narrow encoder for each color view of an image. It takes RGB images and joins all outputs by channel.

    `save_pretrained` writes each narrow encoder to a subfolder of its own, which transformers loads, and
    `encoders.json`. `hf_ssl.modeling.loading.load_weights` reads such a folder.

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
        wanted |= size_arguments(first, pixel_values)
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
        each narrow encoder must have a shortcut convolution if the first block of the folded encoder has one.
        Otherwise, it must not have one.
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
        config._attn_implementation = "eager"  # `choose_attention` changes it; a ResNet supports only this
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
    parts = [
        AutoModel.from_config(narrow, trust_remote_code=False)
        for narrow in narrow_configs(config, views.groups)
    ]
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


@dataclass(frozen=True)
class EncoderFolder:
    """A folder with `encoders.json`.

    Attributes:
        place: a folder or a Hub id.
        subfolders: the folder of each part.
        views: the division of images between the parts.
        options: arguments of `from_pretrained`. On the Hub, they name one commit for all parts.
    """

    place: str
    subfolders: list[str]
    views: ColorViews
    options: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """Return the config of an encoder that is as wide as all parts together.

        Raises:
            UserError: the parts do not belong together.
        """
        return self._joined(self._read(AutoConfig))

    def load(self) -> ParallelEncoders:
        """Return an encoder of RGB images that joins the parts. Errors: see `config`."""
        parts = self._read(AutoModel, dtype=torch.float32)
        encoder = ParallelEncoders(self._joined([part.config for part in parts]), parts, self.views)
        encoder.name_or_path = self.place  # `load_processor` reads it
        return encoder

    def _read(self, kind: Any, **options: Any) -> list[Any]:
        """Return the result of `from_pretrained` of each subfolder."""
        found = []
        for name in self.subfolders:
            try:
                given = options | self.options
                found.append(
                    kind.from_pretrained(self.place, subfolder=name, trust_remote_code=False, **given)
                )
            except Exception as error:  # see `hf_ssl.modeling.loading.loading_errors`
                raise UserError(f"{name}: {loading_reason(error)}") from error
        return found

    def _joined(self, configs: list[Any]) -> PreTrainedConfig:
        channels = [config.num_channels for config in configs]
        if channels != list(self.views.groups):
            raise UserError(
                f"{PARTS}: expected encoders of {list(self.views.groups)} channels, got {channels} in "
                f"{', '.join(self.subfolders)}"
            )
        config: PreTrainedConfig = joined_config(configs)
        config.name_or_path = self.place
        config._commit_hash = self.options.get("revision")
        return config


def find_parts(place: str, **options: Any) -> EncoderFolder | None:
    """Return the description of an encoder in parts; None if the folder or repository has no `encoders.json`.

    Args:
        place: a folder or a Hub id.
        options: arguments of `from_pretrained` that say where the files are, such as `revision`.

    Raises:
        UserError: `encoders.json` is damaged.
    """
    if os.path.isdir(place):
        file = os.path.join(place, PARTS)
        if not os.path.isfile(file):
            return None
    else:
        # Not `cached_file` of transformers, which finds the file of an older commit if the newest has none.
        known = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
        try:
            file = hf_hub_download(place, PARTS, **known)
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return None  # AutoConfig reports other errors than a missing file
        options = options | {"revision": Path(file).parent.name}
    return EncoderFolder(place, listed_subfolders(Path(file)), described_views(Path(file)), options)
