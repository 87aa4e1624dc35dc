# SPDX-License-Identifier: Apache-2.0
"""The image processor that goes out with an encoder: any photo in, what the encoder was trained on out."""

from typing import Any

from PIL.Image import Resampling
from transformers import BitImageProcessor

from hf_ssl.errors import UserError

FILTERS = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}


def image_processor(preset: dict[str, Any], channels: int) -> BitImageProcessor:
    """Shortest edge to the size of a final view, centre crop, the normalisation of training.

    The class is `BitImageProcessor`, because it converts gray, palette and transparent photos to RGB;
    `ViTImageProcessor` raises an error for them. From transformers 5.21 on, it lays transparency over white;
    5.20 drops transparency. The filter that enlarges views (bilinear) also enlarges small images, so an image
    with the size of the views reaches the encoder as in training. Without `enlarge`, the filter is that of
    the crops.

    Args:
        preset: a `ViewPreset` as a dict; `size`, `enlarge`, `interpolation`, `mean` and `std` count.
        channels: of the encoder's input. With 3, any photo is made RGB. transformers has no processor that
            makes photos grey, or of any other number of channels: with 1 the user opens them with
            `image.convert("L")`, with others passes (C, H, W) arrays and
            `input_data_format="channels_first"`. The encoder refuses another number of channels.

    Raises:
        UserError: mean or std do not fit the number of channels, or the filter is unknown.
    """
    for name in ("mean", "std"):
        if len(preset[name]) != channels:
            raise UserError(
                f"views.{name}: expected {channels} values, one a channel, got {list(preset[name])}."
            )
    filter_name = "bilinear" if preset["enlarge"] is not None else preset["interpolation"]
    if filter_name not in FILTERS:
        raise UserError(f"views.interpolation: expected one of {', '.join(FILTERS)}, got {filter_name!r}.")
    side = preset["size"] if preset["enlarge"] is None else preset["enlarge"]
    return BitImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=FILTERS[filter_name],
        image_mean=list(preset["mean"]),
        image_std=list(preset["std"]),
        do_convert_rgb=channels == 3,
    )
