# SPDX-License-Identifier: Apache-2.0
"""Divides the config of an encoder into configs of narrow encoders, and joins such configs again."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hf_ssl.errors import UserError

_WIDTHS: dict[str, tuple[str, ...]] = {
    "resnet": ("embedding_size", "hidden_sizes"),
    "convnext": ("hidden_sizes",),
    "convnextv2": ("hidden_sizes",),
    "vit": ("hidden_size", "num_attention_heads", "intermediate_size"),
    "dinov2": ("hidden_size", "num_attention_heads"),
}
"""The fields of each model type that narrow encoders share. Other fields are the same in all of them."""
DIVISIBLE_TYPES = tuple(_WIDTHS)
_REDUCTION = 4  # a bottleneck of transformers' ResNet has a quarter of the channels of its output


def narrow_configs(full: Any, groups: Sequence[int]) -> list[PreTrainedConfig]:
    """Return the config of a narrow encoder for each group of channels.

    Each width of the full encoder is the sum of the widths of the narrow ones. In transformers with
    attention, the narrow encoders share the heads, and each head keeps its width. In other encoders, the
    widths differ by at most 1. In a ResNet of bottlenecks, they differ by at most 4, because the channels
    inside a bottleneck must add up, too.

    Args:
        full: config of an encoder whose model type is one of `DIVISIBLE_TYPES`.
        groups: numbers of channels.

    Raises:
        UserError: the images have other than 3 channels, or a width cannot be divided.
    """
    if full.num_channels != 3:
        raise UserError(
            f"data.channels: expected 3, because CMC divides the colors of an image, got {full.num_channels}"
        )
    names, count = _WIDTHS[full.model_type], len(groups)
    for name in names:
        for size in _as_list(getattr(full, name)):
            _check_width(full, name, size, count)
    configs = []
    for number, channels in enumerate(groups):
        narrow = copy.deepcopy(full)
        narrow.num_channels = channels
        for name in names:
            value = getattr(full, name)
            shares = [_share(size, _unit(full, size), number, count) for size in _as_list(value)]
            setattr(narrow, name, shares if isinstance(value, list | tuple) else shares[0])
        if narrow.model_type == "vit":
            narrow.pooler_output_size = narrow.hidden_size
        configs.append(narrow)
    return configs


def further_config(full: Any, groups: Sequence[int], channels: int) -> PreTrainedConfig:
    """Return the config of the narrow encoder of a further view, which is as wide as that of the first one.

    Args:
        full, groups: see `narrow_configs`.
        channels: number of channels of the view.
    """
    config: Any = narrow_configs(full, groups)[0]
    config.num_channels = channels
    return config


def joined_config(narrow: Sequence[Any]) -> Any:
    """Return the config of the encoder whose widths narrow encoders share: the reverse of `narrow_configs`.

    Raises:
        UserError: the configs are not those of narrow encoders of one type.
    """
    types = sorted({each.model_type for each in narrow})
    if len(types) != 1 or types[0] not in _WIDTHS:
        raise UserError(
            f"expected narrow encoders of one type among {', '.join(DIVISIBLE_TYPES)}, got {', '.join(types)}"
        )
    full = copy.deepcopy(narrow[0])
    for name in ("num_channels", *_WIDTHS[types[0]]):
        values = [getattr(each, name) for each in narrow]
        is_list = isinstance(values[0], list | tuple)
        setattr(full, name, [sum(sizes) for sizes in zip(*values, strict=True)] if is_list else sum(values))
    if full.model_type == "vit":
        full.pooler_output_size = full.hidden_size
    return full


def feature_width(config: Any) -> int:
    """Return the number of features of an encoder whose type is one of `DIVISIBLE_TYPES`."""
    return config.hidden_sizes[-1] if "hidden_sizes" in _WIDTHS[config.model_type] else config.hidden_size


def _heads(full: Any) -> int | None:
    return full.to_dict().get("num_attention_heads")


def _check_width(full: Any, name: str, size: int, count: int) -> None:
    """Raise `UserError` if `count` narrow encoders cannot share a width."""
    heads = _heads(full)
    if heads is not None and name != "num_attention_heads":
        if size % heads or size < heads:
            raise UserError(
                f"backbone.{name}: expected a multiple of backbone.num_attention_heads={heads}, got {size}"
            )
        return
    unit = 1 if heads is not None else _unit(full, size)
    if size % unit or size < unit * count:
        kind = "number" if unit == 1 else f"multiple of {unit}"
        raise UserError(
            f"backbone.{name}: expected a {kind} of at least {unit * count}, because {count} narrow encoders "
            f"share it, got {size}"
        )


def _unit(full: Any, size: int) -> int:
    """Return the number that each share of a width is a multiple of."""
    heads = _heads(full)
    if heads is not None:
        return size // heads
    return _REDUCTION if full.to_dict().get("layer_type") == "bottleneck" else 1


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _share(size: int, unit: int, number: int, count: int) -> int:
    """Return the share of one narrow encoder; the first ones get the remainder."""
    each, rest = divmod(size // unit, count)
    return unit * (each + (number < rest))
