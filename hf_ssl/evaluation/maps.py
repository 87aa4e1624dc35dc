# SPDX-License-Identifier: Apache-2.0
"""Maps of features: t-SNE and UMAP place similar images near each other in 2-D or 3-D (layer 1).

A map becomes a picture, or part of an interactive HTML page. The page contains its data and small images, and
loads no other files. `points.html` is its template.
Legend: N images, D features.
"""

import base64
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.plots import COLORS, color_of
from hf_ssl.evaluation.retrieval import thumbnail
from hf_ssl.evaluation.statistics import unit_rows
from hf_ssl.resources import require

TITLES = {"tsne": "t-SNE", "umap": "UMAP"}
MARKERS = ("o", "^", "s", "D")
LEGEND_CLASSES = 20
COLUMNS = 3  # of panels
LEAST_IMAGES = 5
PERPLEXITY, NEIGHBORS = 30.0, 15  # the defaults of scikit-learn and umap-learn
THUMBNAIL_SIDE = 48  # a JPEG of about 2 kB
_TEMPLATE = Path(__file__).with_name("points.html")
_COMPONENTS = 50  # of the PCA before t-SNE, as van der Maaten and Hinton (2008) recommend


def map_points(features_ND: Tensor, method: str, dimensions: int, seed: int = 0) -> np.ndarray:
    """Return the points (N, 2) or (N, 3) of a map of features, float64.

    The features are L2-normalized, so that distances follow cosines as in k-NN. t-SNE begins with a PCA. The
    seed determines the result on one machine.

    Args:
        features_ND: (N, D) features.
        method: "tsne" or "umap".
        dimensions: 2 or 3.
        seed: seed of the method.

    Raises:
        UserError: there are fewer than 5 images, the features are not finite, or umap-learn is not installed.
    """
    rows = unit_rows(check_features(features_ND, "maps").float()).cpu().double().numpy()
    if len(rows) < LEAST_IMAGES:
        raise UserError(
            f"{TITLES[method]}: expected at least {LEAST_IMAGES} images, got {len(rows)}; use more images"
        )
    if np.ptp(rows, axis=0).max() < 1e-6:  # a collapsed encoder
        return np.zeros((len(rows), dimensions))
    return _tsne(rows, dimensions, seed) if method == "tsne" else _umap(rows, dimensions, seed)


def perplexity(images: int) -> float:
    """Return the perplexity of t-SNE: 30, or (images - 1) / 3 if this is smaller."""
    return min(PERPLEXITY, (images - 1) / 3)


def _tsne(rows: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE

    if rows.shape[1] < dimensions:  # PCA cannot return more components than features
        rows = np.pad(rows, ((0, 0), (0, dimensions - rows.shape[1])))
    if min(rows.shape) > _COMPONENTS:
        rows = PCA(_COMPONENTS, svd_solver="full").fit_transform(rows)
    tsne = TSNE(
        dimensions, perplexity=perplexity(len(rows)), init="pca", learning_rate="auto", random_state=seed
    )
    return tsne.fit_transform(rows).astype(np.float64)


def _umap(rows: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    check_umap()
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns that a seed prevents parallel computation
        # The spectral initialization needs more images than dimensions.
        start = "spectral" if len(rows) > 2 * NEIGHBORS else "random"
        neighbors = min(NEIGHBORS, len(rows) - 1)
        fit = UMAP(neighbors, dimensions, init=start, random_state=seed, n_jobs=1).fit_transform(rows)
    return np.asarray(fit, dtype=np.float64)


def check_umap() -> None:
    """Raise UserError if the optional package umap-learn cannot be imported."""
    require("UMAP", "plots", {"umap-learn": "umap"})


def draw_maps(
    maps: Mapping[str, np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str,
    columns: int = COLUMNS,
) -> Any:
    """Return a figure with one panel per encoder.

    Args:
        maps: {title of the panel: points (N, 2) or (N, 3)}.
        labels: (N,) class numbers.
        class_names: names of the classes; an empty list: no legend.
        title: title of the figure.
        columns: largest number of panels in a row.
    """
    from matplotlib.figure import Figure  # pyplot would need global state

    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    shown = _shown_classes(labels, class_names)
    width = 4.4 * columns + (1.8 if shown else 0)
    figure = Figure(figsize=(width, 4.7 * rows + 0.3), layout="constrained", dpi=110)
    # The title is above the panels only, so that it does not touch the legend.
    figure.suptitle(fill(title, 50 * columns), fontsize=10, x=0.02, horizontalalignment="left")
    panel: Any = None
    for position, (name, points) in enumerate(maps.items(), start=1):
        is_flat = points.shape[1] == 2
        panel = figure.add_subplot(rows, columns, position, projection=None if is_flat else "3d")
        for number in np.unique(labels):
            panel.scatter(
                *points[labels == number].T,
                s=12, linewidths=0, alpha=0.8,
                color=color_of(number), marker=MARKERS[shape_of(number)],
            )  # fmt: skip
        panel.set_title(name, fontsize=9)
        if is_flat:  # a square with one scale for both axes; the units have no meaning
            (left, bottom), (right, top) = points.min(axis=0), points.max(axis=0)
            half = 0.53 * max(right - left, top - bottom) or 1.0
            panel.set(xticks=[], yticks=[], aspect="equal")
            panel.set_xlim((left + right) / 2 - half, (left + right) / 2 + half)
            panel.set_ylim((bottom + top) / 2 - half, (bottom + top) / 2 + half)
        else:
            for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
                axis.set_ticklabels([])
            panel.set_box_aspect((1, 1, 1), zoom=1.05)
    if shown:
        figure.legend(
            handles=_legend(shown, class_names), loc="outside right upper", fontsize=8, frameon=False,
            title=_legend_title(labels, shown), title_fontsize=8,
        )  # fmt: skip
    return figure


def _shown_classes(labels: np.ndarray, class_names: Sequence[str]) -> list[int]:
    """Return the class numbers in the legend; an empty list without class names."""
    return [int(number) for number in np.unique(labels)][:LEGEND_CLASSES] if class_names else []


def _legend_title(labels: np.ndarray, shown: Sequence[int]) -> str | None:
    total = len(np.unique(labels))
    return f"the first {len(shown)} of {total} classes" if total > len(shown) else None


def _legend(shown: Sequence[int], class_names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [], [], linestyle="", markersize=5, label=shortened(class_names[number]),
            color=color_of(number), marker=MARKERS[shape_of(number)],
        )
        for number in shown
    ]  # fmt: skip


def shape_of(number: int) -> int:
    """Return the index of the marker of a class number. Color and marker together distinguish 40 classes."""
    return (number + number // len(COLORS)) % len(MARKERS)


def shortened(name: str, most: int = 22) -> str:
    """Return a class name, cut to at most `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


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
