# SPDX-License-Identifier: Apache-2.0
"""The file `encoders.json`, which describes an encoder that consists of parts in subfolders.

CMC writes such a folder if its narrow encoders do not fold into one. Each subfolder contains an encoder of
transformers. `encoders.json` states how an RGB image is divided between them, so that a user needs no hf_ssl.
This module imports neither torch nor transformers, unless it is used with a `ColorViews`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.errors import UserError
from hf_ssl.files import read_json

if TYPE_CHECKING:
    from hf_ssl.views.color_spaces import ColorViews

PARTS = "encoders.json"
SUBFOLDER = "view_[a-z]+"
"""Pattern of the names of subfolders. They contain the letters of the channels: "view_ab"."""


def describe_views(views: "ColorViews") -> dict[str, Any]:
    """Return the content of `encoders.json`.

    The keys are `color_space`; `image_mean` and `image_std`, the normalization of the images; and `encoders`.
    This is a list of the subfolder of each encoder, the names of its channels, and their `mean` and `std` in
    the color space. If the space is linear, channels are `matrix @ rgb + offset`, with colors in [0, 1].
    """
    from hf_ssl.views.color_spaces import COLOR_SPACES

    space = COLOR_SPACES[views.space]
    names, rows, offsets = list(space.channels), list(space.matrix or ()), list(space.offset)
    encoders = []
    for name, size, (mean, std) in zip(views.names, views.groups, views.statistics, strict=True):
        encoder: dict[str, Any] = {
            "subfolder": f"view_{name}",
            "channels": [names.pop(0) for _ in range(size)],
            "mean": mean,
            "std": std,
        }
        if space.matrix is not None:
            encoder["matrix"] = [list(rows.pop(0)) for _ in range(size)]
            encoder["offset"] = [offsets.pop(0) for _ in range(size)]
        encoders.append(encoder)
    return {
        "color_space": views.space,
        "image_mean": list(views.mean),
        "image_std": list(views.std),
        "encoders": encoders,
    }


def described_views(path: Path) -> "ColorViews":
    """Return the color views that an `encoders.json` describes.

    Raises:
        UserError: the file is damaged, or its values are not those of this version of hf_ssl.
    """
    from hf_ssl.views.color_spaces import ColorViews

    described = read_json(path)
    try:
        views = ColorViews(
            described["color_space"],
            tuple(len(each["channels"]) for each in described["encoders"]),
            tuple(described["image_mean"]),
            tuple(described["image_std"]),
        )
        expected = describe_views(views)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{PARTS}: expected a description of color views, got {path}") from error
    different = sorted(key for key, value in expected.items() if described.get(key) != value)
    if different:
        raise UserError(
            f"{PARTS}: expected {different[0]} of the color space {views.space}, got others in {path}"
        )
    return views


def listed_subfolders(path: Path) -> list[str]:
    """Return the names of the subfolders in an `encoders.json`.

    Raises:
        UserError: the file is damaged.
    """
    listed = read_json(path)
    try:
        names = [each["subfolder"] for each in listed["encoders"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a list of encoders, got none; export the encoder again") from error
    if not names or not all(isinstance(name, str) and re.fullmatch(SUBFOLDER, name) for name in names):
        raise UserError(f"{path}: expected subfolders such as view_l, got {names}; export the encoder again")
    return names
