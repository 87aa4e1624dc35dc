# SPDX-License-Identifier: Apache-2.0
"""Types of the results of an evaluation. This module imports no torch, because writing cards needs none."""

from typing import Any, NotRequired, TypedDict


class KnnResult(TypedDict):
    """k-NN result: the headline accuracy, and {neighbours, temperature, accuracy} for the complete grid."""

    neighbours: int
    temperature: float
    accuracy: float
    grid: list[dict[str, float]]


class EncoderResult(TypedDict):
    """Result of one encoder. Accuracies are in [0, 1]. `protocol` describes each measurement in words."""

    protocol: dict[str, str]
    images: dict[str, int]  # train, test
    classes: int
    feature_size: int
    knn: KnnResult
    linear: dict[str, Any] | None  # the fields of LinearProbe
    few_labels: list[dict[str, float]]  # labels_per_class, mean, std, draws
    skipped: list[str]  # measurements for which there were too few images
    statistics: dict[str, float]  # of the test features: embedding_std, rank_me, uniformity, images
    seconds: dict[str, float]
    precision: NotRequired[str]  # precision of the features: "float32", "bfloat16" or "float16"
    pooling: NotRequired[str]
    poolings: NotRequired[dict[str, float]]  # headline k-NN accuracy by "cls" and by "mean", if compared
    image_size: NotRequired[int]
