# SPDX-License-Identifier: Apache-2.0
"""What an evaluation reports, as plain data. Loads no torch: cards are written and published without it."""

from typing import Any, NotRequired, TypedDict


class KnnResult(TypedDict):
    """Headline accuracy, and a list of {neighbours, temperature, accuracy}, the whole grid."""

    neighbours: int
    temperature: float
    accuracy: float
    grid: list[dict[str, float]]


class EncoderResult(TypedDict):
    """What one encoder reached. Accuracies in [0, 1]. `protocol` says how, in words and numbers."""

    protocol: dict[str, str]
    images: dict[str, int]  # train, test
    classes: int
    feature_size: int
    knn: KnnResult
    linear: dict[str, Any] | None  # the fields of LinearProbe
    few_labels: list[dict[str, float]]  # labels_per_class, mean, std, draws
    skipped: list[str]  # what the data was too small for
    statistics: dict[str, float]  # of the test features: embedding_std, rank_me, uniformity, images
    seconds: dict[str, float]
    precision: NotRequired[str]  # precision of the features: "float32", "bfloat16" or "float16"
    pooling: NotRequired[str]
    poolings: NotRequired[dict[str, float]]  # headline k-NN by "cls" and by "mean", where both were compared
    image_size: NotRequired[int]
