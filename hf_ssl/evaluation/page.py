# SPDX-License-Identifier: Apache-2.0
"""An HTML page with interactive maps of several encoders (layer 1).

The page contains its data and small images, and loads no other files. `points.html` is its template.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from hf_ssl.evaluation.maps import shape_of
from hf_ssl.evaluation.plots import color_of
from hf_ssl.evaluation.retrieval import thumbnail

THUMBNAIL_SIDE = 48  # a JPEG of about 2 kB
_TEMPLATE = Path(__file__).with_name("points.html")


def points_page(
    maps: Mapping[str, Mapping[str, np.ndarray]],
    images: Iterable[Tensor],
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> str:
    """Return the text of the page.

    Args:
        maps: {encoder: {name of the map: points (N, 2) or (N, 3)}}. All encoders have the same maps.
        images: N images, uint8 (1 or 3, H, W).
        labels: (N,) class numbers.
        class_names: names of the classes; an empty list: no legend.
        title: title of the page.
    """
    data = {
        "title": title,
        "encoders": [
            {"name": name, "maps": {key: _scaled(points).tolist() for key, points in found.items()}}
            for name, found in maps.items()
        ],
        "labels": [int(label) for label in labels],
        "classes": list(class_names),
        "styles": {label: [color_of(label), shape_of(label)] for label in np.unique(labels).tolist()},
        "thumbnails": [_data_address(image) for image in images],
    }
    # A class name may contain "</script>".
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)


def _scaled(points: np.ndarray) -> np.ndarray:
    """Return centered points whose largest distance from the center is 1, with four decimals."""
    centered = points - (points.max(axis=0) + points.min(axis=0)) / 2
    largest = np.sqrt((centered**2).sum(axis=1)).max()
    return np.round(centered / (largest or 1.0), 4)


def _data_address(image: Tensor) -> str:
    content = thumbnail(image, THUMBNAIL_SIDE)
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
