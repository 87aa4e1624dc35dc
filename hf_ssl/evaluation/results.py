# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation: plain data for JSON (layer 1). This module does not import torch."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeGuard

from hf_ssl.errors import UserError, counted

ACCURACY = "accuracy"


def in_percent(value: float) -> str:
    """Return a fraction in percent, for tables that name the unit: "61.2" for 0.6123."""
    return f"{100 * value:.1f}"


def percent(value: float) -> str:
    """Return a fraction as a percentage: "61.2 %" for 0.6123."""
    return f"{in_percent(value)} %"


class ProtocolResult(TypedDict):
    """One number of one protocol, with everything that is needed to understand and to repeat it.

    Numbers with different `id` are not comparable. Accuracies are in [0, 1].
    """

    protocol: str  # its name in PROTOCOLS: "knn"
    id: str  # "knn-1-3fb2a9c4": name, version and fingerprint of the settings
    key: str  # the number's name for programs: "knn_20"
    metric: NotRequired[str]  # what `value` is: "mean_average_precision"; missing: ACCURACY
    title: str  # the number's name in a sentence: "20-NN accuracy"
    column: str  # the heading of its column: "20-NN, all labels"
    text: str  # how it was measured, without a final full stop
    value: float
    standard_error: float
    metrics: dict[str, float]  # further metrics of the same predictions: top_5, mean_per_class, ...
    selection: dict[str, Any]  # the selected settings, {"learning_rate": 0.1}
    selected_on: str | None  # the images on which they were selected; None: nothing was selected
    details: dict[str, Any]  # what only this protocol has


class Quality(TypedDict):
    """Measurements of the protocol `quality`. Numbers with different `id` are not comparable."""

    id: str
    text: str  # how they were measured, without a final full stop
    lidar: float  # from 1 to about the number of features
    alignment: float  # from 0 (equal features of both views) to about 2 (unrelated ones)
    images: int
    views: int


class EncoderResult(TypedDict):
    """The result of one encoder."""

    protocols: list[ProtocolResult]
    features: str  # the evaluated features in words
    images: dict[str, int]  # train, test
    revision: str | None  # of the test images: the commit on the Hub or a fingerprint; None: not known
    classes: int
    feature_size: int
    skipped: list[str]  # measurements that were not possible, with the reason
    statistics: dict[
        str, float
    ]  # of the test features: embedding_std, rank_me, alpha_req, uniformity, images
    quality: NotRequired[Quality]  # if it was measured
    seconds: dict[str, float]
    precision: NotRequired[str]  # of the features: "float32", "bfloat16", "float16" or "float64"
    pooling: NotRequired[str]
    # main k-NN accuracy by "cls" and "mean", by "image" (the published feature) and "grid", if compared
    poolings: NotRequired[dict[str, float]]
    pooling_neighbors: NotRequired[int]  # k of `poolings`
    image_size: NotRequired[int]


def check_result(result: Any, where: str) -> None:
    """Raise UserError unless a stored result has the parts of an `EncoderResult` that tables read.

    Args:
        result: the content of a file, which may have been edited.
        where: name of the file, for the message.
    """
    numbers = result.get("protocols") if isinstance(result, dict) else None
    images = result.get("images") if isinstance(result, dict) else None
    is_result = isinstance(numbers, list) and isinstance(images, dict) and {"train", "test"} <= images.keys()
    if not is_result or any(not isinstance(each, dict) or _NUMBER - each.keys() for each in numbers or []):
        raise UserError(
            f"{where}: expected results as hf_ssl wrote them, got other data; delete the file, and run the "
            "command again that wrote it"
        )


_NUMBER = frozenset(
    ("protocol", "id", "key", "column", "text", "value", "standard_error", "metrics", "selection", "details")
)


def is_measured(value: Any) -> TypeGuard[float]:
    """Return whether a stored value is a finite number. A file contains null for any other value."""
    return isinstance(value, int | float) and math.isfinite(value)


def find_results(result: EncoderResult, protocol: str) -> list[ProtocolResult]:
    """Return the results of a protocol. The list is empty if the protocol was not run."""
    return [each for each in result["protocols"] if each["protocol"] == protocol]


def metric_of(result: ProtocolResult) -> str:
    """Return the name of a result's metric, also for a result that an older version stored."""
    multi_label = "mean_average_precision"
    return result.get("metric", multi_label if result["key"] == multi_label else ACCURACY)


def result_id(protocol: str, version: int, settings: Mapping[str, Any]) -> str:
    """Return the id of a protocol with these settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{protocol}-{version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def standard_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy that was measured on this number of images."""
    return (accuracy * (1 - accuracy) / images) ** 0.5


def mean_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of at least two values: of images, draws or seeds."""
    return stdev(values) / len(values) ** 0.5


class Draws(NamedTuple):
    """The accuracy over several random choices of the labeled images.

    Attributes:
        mean: the mean accuracy.
        standard_error: standard error of this mean. For a single choice, it is computed over the test images.
        details: `draws`, the number of choices. If there are several, also `std`, their standard deviation
            (with n - 1).
    """

    mean: float
    standard_error: float
    details: dict[str, Any]

    @classmethod
    def of(cls, accuracies: Sequence[float], images: int) -> "Draws":
        """Return the summary of the accuracies of all choices on this number of test images."""
        draws, value = len(accuracies), mean(accuracies)
        if draws == 1:
            return cls(value, standard_error(value, images), {"draws": 1})
        return cls(value, mean_error(accuracies), {"draws": draws, "std": stdev(accuracies)})


def with_current_layout(result: Any) -> Any:
    """Return a result in the layout of `EncoderResult`, also one that version 0.1 stored.

    Such results of version 0.1 have the keys `knn`, `few_labels`, `linear` and `protocol`. The settings of
    their protocols were not stored, so their ids end with "0".
    """
    if not isinstance(result, dict) or "knn" not in result:
        return result
    old = dict(result)
    words, knn, linear, few = (old.pop(key) for key in ("protocol", "knn", "linear", "few_labels"))
    images = old["images"]["test"]
    k, temperature = knn["neighbors"], knn["temperature"]
    found = [
        ProtocolResult(
            protocol="knn",
            id="knn-0",
            key=f"knn_{k}",
            title=f"{k}-NN accuracy",
            column=f"{k}-NN, all labels",
            text=words["knn"],
            value=knn["accuracy"],
            standard_error=standard_error(knn["accuracy"], images),
            metrics={},
            selection={},
            selected_on=None,
            details={"neighbors": k, "temperature": temperature, "grid": knn["grid"]},
        )
    ]
    for draw in few:
        labels = draw["labels_per_class"]
        found.append(
            ProtocolResult(
                protocol="few_label_knn",
                id="few_label_knn-0",
                key=f"few_labels_{labels}",
                title=f"1-NN accuracy, {counted(labels, 'labeled image')} per class",
                column=f"1-NN, {counted(labels, 'label')} per class",
                text=words["few_labels"],
                value=draw["mean"],
                standard_error=draw["std"] / draw["draws"] ** 0.5
                if draw["draws"] > 1
                else standard_error(draw["mean"], images),
                metrics={},
                selection={},
                selected_on=None,
                details={"labels_per_class": labels, "std": draw["std"], "draws": draw["draws"]},
            )
        )
    if linear is not None:
        found.append(
            ProtocolResult(
                protocol="linear",
                id="linear-0",
                key="linear_probe",
                title="Linear probe accuracy",
                column="linear probe",
                text=words["linear"],
                value=linear["accuracy"],
                standard_error=standard_error(linear["accuracy"], images),
                metrics={},
                selection={"learning_rate": linear["learning_rate"]},
                selected_on="10 % of the training images",
                details={key: value for key, value in linear.items() if key != "accuracy"},
            )
        )
    return {"protocols": found, "features": words["features"], "revision": None, **old}
