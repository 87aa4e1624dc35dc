# SPDX-License-Identifier: Apache-2.0
"""The results of classifiers: metrics of their scores of the test images, and selected settings (layer 1).

Legend: N test images, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.average_precision import mean_average_precision
from hf_ssl.evaluation.bootstrap import MOST_PACKED, bootstrap_error, pack_right
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs
from hf_ssl.evaluation.knn import as_labels
from hf_ssl.evaluation.results import ProtocolResult, result_id, standard_error

EDGE = " (at the edge of the sweep)"


def accuracy_result(
    protocol: str,
    version: int,
    settings: dict[str, Any],
    scores: Tensor,
    labels: Tensor,
    **others: Any,
) -> ProtocolResult:
    """Return the result of a classifier: top-1 accuracy, top-5 accuracy and the mean accuracy of the classes.

    Args:
        protocol, version, settings: see `result_id`.
        scores: (N, K) of the test images. If scores are equal, the lowest class number is predicted.
        labels: (N,) class numbers.
        others: the other fields of `ProtocolResult`; selection, selected_on and details may be missing.
    """
    metrics = class_metrics(scores, labels)
    accuracy = metrics.pop("top_1")
    result: Any = others | {
        "protocol": protocol,
        "id": result_id(protocol, version, settings),
        "value": accuracy,
        "standard_error": standard_error(accuracy, len(labels)),
        "metrics": metrics,
    }
    optional: dict[str, Any] = {"selection": {}, "selected_on": None, "details": {}}
    found = optional | result
    if len(labels) <= MOST_PACKED:
        right = (_ranks(scores, labels) == 0).cpu().numpy()
        found["details"] = found["details"] | {"right": pack_right(right)}
    return cast(ProtocolResult, found)


def swept_result(
    inputs: Inputs,
    protocol: str,
    version: int,
    settings: dict[str, Any],
    scores: Tensor,
    *,
    method: str,
    setting: str,
    values: Sequence[float],
    validation: Sequence[float],
    best: int,
    selected_on: str = SELECTED_ON,
    selection: dict[str, float],
    unit: str = "",
    details: dict[str, Any] | None = None,
    **names: str,
) -> ProtocolResult:
    """Return the result of a classifier whose setting was selected from several values on training images.

    Args:
        inputs: the images.
        protocol, version, settings, scores: see `accuracy_result`.
        method: a sentence about the classifier and its training, without a full stop.
        setting: name of the setting at the start of a sentence, such as "C".
        values: the tested values, ascending.
        validation: accuracy for each value.
        best: index of the selected value.
        selected_on: the images on which it was selected. `SELECTED_ON` means held-out images.
        selection: {name: the selected value}.
        unit: text after the tested values, if their unit differs from that of the selected value.
        details: further details.
        names: key, title and column of the result.
    """
    (value,) = selection.values()
    at_edge = is_at_edge(values, values[best])
    where = f"{'a held-out ' * (selected_on == SELECTED_ON)}{selected_on}"
    return accuracy_result(
        protocol,
        version,
        settings,
        scores,
        inputs.test.labels.to(scores.device),
        text=f"{method}. {setting} {value:.3g}{EDGE * at_edge} had the highest accuracy on {where} "
        f"({len(values)} tested, {values[0]:.3g} to {values[-1]:.3g}{unit}). The final classifier was "
        f"trained on all {inputs.train} and tested on {inputs.test}",
        selection=selection,
        selected_on=selected_on,
        details={
            "at_edge": at_edge,
            "validation": by_setting(dict(zip(values, validation, strict=True))),
        }
        | (details or {}),
        **names,
    )


def by_setting(validation: Mapping[float, float]) -> dict[str, float]:
    """Return the value of each tested setting for JSON, {"0.03": 0.61}, as `details["validation"]` has it."""
    return {f"{setting:.6g}": value for setting, value in validation.items()}


def is_at_edge(values: Sequence[float], value: float) -> bool:
    """Return whether a selected value is the lowest or the highest of several tested values."""
    return min(values) < max(values) and value in (min(values), max(values))


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """Return whether the class with the highest score is the correct one, (...,) bool.

    If the highest score is infinite or NaN, the training diverged, and the prediction counts as wrong.
    Otherwise, the settings of such a training could be selected.

    Args:
        scores: (..., K). If scores are equal, the lowest class number is predicted. -inf excludes a class.
        labels: class numbers, (...,) or of a shape that can be broadcast to it.
    """
    highest = scores.max(dim=-1)
    return (highest.indices == labels) & highest.values.isfinite()


def precision_result(
    protocol: str,
    version: int,
    settings: dict[str, Any],
    scores: Tensor,
    labels: Tensor,
    *,
    seed: int,
    **others: Any,
) -> ProtocolResult:
    """Return the result of a classifier of images with several labels: the 11-point mean average precision.

    The standard error is that of a bootstrap over test images.

    Args:
        protocol, version, settings: see `result_id`.
        scores: (N, K) of the test images.
        labels: (N, K), see `Split`.
        seed: seed of the bootstrap.
        others: the other fields of `ProtocolResult`; selection, selected_on and details may be missing.
    """
    scores, labels = scores.cpu(), labels.cpu()

    def value(rows: np.ndarray) -> float:
        known = bool((labels[rows] == 1).any())
        return mean_average_precision(scores[rows], labels[rows]) if known else math.nan

    found = mean_average_precision(scores, labels)
    area = mean_average_precision(scores, labels, None)
    result: Any = {"selection": {}, "selected_on": None, "details": {}} | others
    return result | {
        "protocol": protocol,
        "id": result_id(protocol, version, settings),
        "metric": "mean_average_precision",
        "value": found,
        "standard_error": bootstrap_error(value, len(scores), seed),
        "metrics": {"area": area},
    }


def metric_words(labels: Tensor) -> str:
    """Return the name of the metric of `precision_result` for test labels (N, K)."""
    shown, classes = int((labels == 1).any(dim=0).sum()), labels.shape[1]
    words = counted(shown, "class", "classes")
    if shown < classes:
        words = f"{shown:,} of {classes:,} classes (those with a test image)"
    return f"11-point mean average precision (VOC2007) over {words}"


def check_converged(values: Tensor, learning_rate: float, key: str) -> None:
    """Raise UserError for a training that diverged.

    Args:
        values: scores of the test images, weights or a loss, which are finite if the training converged.
        learning_rate: learning rate in the settings of the training.
        key: key of the learning rate, for the message.
    """
    if not values.isfinite().all():
        raise UserError(
            f"{key}: expected a rate with which training converges, got {learning_rate:g}; use a smaller one"
        )


def class_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracies of predicted classes: `top_1`, `top_5` and `mean_per_class`.

    Args:
        scores: (N, K). If scores are equal, the lower class number ranks first. -inf excludes a class.
        labels: (N,) class numbers. A label of at least K is always wrong.

    Raises:
        UserError: there is no image, a score is NaN, or `as_labels` raises: a label is no class number.

    Source: top-5 as in ImageNet; mean per class as in Kornblith et al. (1805.08974), for Aircraft,
    Caltech101, Flowers and Pets.
    """
    scores = torch.as_tensor(scores)
    broken = int(scores.isnan().any(dim=1).sum()) if len(scores) else 0
    if broken or not len(scores):
        raise UserError(
            f"scores: expected a number for each class, got NaN in {broken} of "
            f"{counted(len(scores), 'image')}; check the model"
        )
    labels = as_labels(labels, len(scores), "labels")
    rank = _ranks(scores, labels)
    labels = labels.to(rank.device)
    top = {k: rank < k for k in (1, 5)}
    counts = labels.bincount()
    right = torch.zeros(len(counts), dtype=torch.float64, device=rank.device)
    right.index_add_(0, labels, top[1].double())
    used = counts > 0
    return {
        "top_1": int(top[1].sum()) / len(labels),
        "top_5": int(top[5].sum()) / len(labels),
        "mean_per_class": float((right[used] / counts[used]).mean()),
    }


def _ranks(scores: Any, labels: Any) -> Tensor:
    """Return the rank (N,) of the class of each image, 0 for the predicted one; see `class_metrics`.

    The rank is a large number for a class without a score, and for a class that the score -inf excludes.
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels).to(scores.device)
    index = labels.clamp(max=scores.shape[1] - 1)[:, None]
    own = scores.gather(1, index)
    lower = torch.arange(scores.shape[1], device=scores.device) < index
    rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    has_score = (labels < scores.shape[1]) & (own[:, 0] != -torch.inf)
    return torch.where(has_score, rank, 1 << 30)
