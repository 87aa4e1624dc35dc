# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices of classifiers on frozen features (layer 1).

Legend: N images, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_ssl.evaluation.maps import shortened
from hf_ssl.evaluation.results import percent

MOST_CLASSES = 50
"""With more classes, the figure shows the most confused pairs of classes instead of a matrix."""
SHOWN_PAIRS = 25


def confusion_matrix(scores: Tensor, labels: Tensor, classes: int) -> np.ndarray:
    """Return the number of images of each class (row) that are predicted as each class (column), (K, K).

    Args:
        scores: (N, at most K). If scores are equal, the lowest class number is predicted.
        labels: (N,) class numbers.
        classes: K.
    """
    predicted = scores.argmax(dim=1).cpu().numpy()
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (labels.cpu().numpy(), predicted), 1)
    return counts


def most_confused(counts: np.ndarray, most: int = SHOWN_PAIRS) -> list[tuple[int, int, int]]:
    """Return (class, predicted class, images) of the most frequent errors, most frequent first.

    Args:
        counts: (K, K), see `confusion_matrix`.
        most: largest number of pairs.
    """
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    pairs = (divmod(int(place), len(counts)) for place in order)
    return [(row, column, int(errors[row, column])) for row, column in pairs if errors[row, column]]


def draw_confusion(
    matrices: Mapping[str, Mapping[str, np.ndarray]], class_names: Sequence[str], title: str
) -> Any:
    """Return a figure with one column per encoder and one row per classifier.

    A color shows a share of the images of a class, and a number is a number of images.

    Args:
        matrices: {encoder: {classifier: (K, K)}}. All encoders have the same classifiers.
        class_names: K names.
        title: title of the figure.
    """
    from matplotlib.figure import Figure  # pyplot would need global state

    classifiers = list(next(iter(matrices.values())))
    classes = len(class_names)
    side = max(3.8, 0.24 * min(classes, MOST_CLASSES) + 2.2)
    figure = Figure(
        figsize=(side * len(matrices), 0.3 + (side + 0.1) * len(classifiers)), layout="constrained", dpi=110
    )
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(classifiers), len(matrices), squeeze=False)
    for column, (encoder, by_classifier) in enumerate(matrices.items()):
        for row, (classifier, counts) in enumerate(by_classifier.items()):
            axes = panels[row, column]
            accuracy = np.trace(counts) / max(1, counts.sum())
            axes.set_title(f"{encoder}\n{classifier}, accuracy {percent(accuracy)}", fontsize=9)
            if classes > MOST_CLASSES:
                _draw_pairs(axes, counts, class_names)
            else:
                _draw_matrix(axes, counts, class_names, is_first=column == 0)
    return figure


def _draw_matrix(axes: Any, counts: np.ndarray, class_names: Sequence[str], is_first: bool) -> None:
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 8 if len(counts) <= 12 else 6 if len(counts) <= 25 else 4
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=size, color=color)
    names = [shortened(name, 18) for name in class_names]
    size = 8 if len(counts) <= 25 else 6
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names if is_first else [], fontsize=size)
    axes.set_xlabel("predicted class", fontsize=8)
    if is_first:
        axes.set_ylabel("class", fontsize=8)


def _draw_pairs(axes: Any, counts: np.ndarray, class_names: Sequence[str]) -> None:
    pairs = most_confused(counts)
    words = [f"{shortened(class_names[a], 18)} → {shortened(class_names[b], 18)}" for a, b, _ in pairs]
    values = [count for _, _, count in pairs]
    bars = axes.barh(range(len(pairs)), values, color="#4477aa")
    shares = [f" {count} of {counts[a].sum()}" for a, _, count in pairs]
    axes.bar_label(bars, shares, fontsize=6)
    axes.set_yticks(range(len(pairs)), words, fontsize=6)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("images of a class (left) that are predicted as another class (right)", fontsize=8)
