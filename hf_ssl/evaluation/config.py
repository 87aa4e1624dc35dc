# SPDX-License-Identifier: Apache-2.0
"""The section `evaluation` of a recipe, the results of an evaluation, and the names of all measurements.

This module does not import torch, because recipes and cards need none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NotRequired, TypedDict, get_args

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError, check_values
from hf_ssl.modeling.pooling import Pooling
from hf_ssl.names import renamed_arguments

# The steps are half-decades. Published settings lie between 0.02 (VICReg) and 30 (MoCo). The norms of
# features differ by as much.
LEARNING_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
NEIGHBORS = (1, 5, 10, 20, 50, 100, 200)
MAIN_KNN = (20, 0.07)  # k and T that DINO recommends; a card shows this accuracy first
TEMPERATURES = (0.07, 0.1)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
POOLINGS = get_args(Pooling)


@renamed_arguments(neighbours="neighbors")
@dataclass
class EvaluationConfig:
    """Settings of an evaluation.

    The code that opens the data applies the path, the splits, the label column and the numbers of images.
    """

    path: str | None = None  # None: data.path
    train_split: str = "train"
    test_split: str = "test"
    label_column: str | None = None  # None: found by its feature type
    max_train_images: int | None = None
    max_test_images: int | None = None
    batch_size: int = 256  # images in one forward pass
    # Precision of the features: float32, bfloat16 or float16 (autocast). auto: the fastest one on the device.
    precision: str = "auto"
    pooling: str = "auto"  # see POOLINGS
    compare_poolings: bool = False  # k-NN both by class token and by mean of tokens
    # [patch, stride] in pixels of processed images: also k-NN by the mean feature of a grid of patches. None:
    # the grid of the method (CPC; other methods have none). []: no grid
    patch_grid: list[int] | None = None
    neighbors: list[int] = field(default_factory=lambda: list(NEIGHBORS))
    temperatures: list[float] = field(default_factory=lambda: list(TEMPERATURES))
    few_labels: list[int] = field(default_factory=list)  # labels per class
    draws: int = 20
    linear: bool = True
    linear_epochs: int = 100
    linear_batch_size: int = 256
    linear_standardize: bool = False  # see linear_probe
    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))
    baselines: bool = True  # also evaluate the untrained encoder and raw pixels
    raw_pixel_size: int = 32
    seed: int = 0
    results_dir: str | None = None  # folder of <recipe>.json; None: results/ in the output folder

    @classmethod
    def of(cls, given: Any) -> "EvaluationConfig":
        """Return checked settings.

        Args:
            given: an `EvaluationConfig`, a dict of its fields, or None for the defaults.

        Raises:
            UserError: a key is unknown, or a value has the wrong type or is outside its range.
        """
        from hf_ssl.sections import as_section  # OmegaConf is slow to import

        config = as_section(cls, given, "evaluation")
        config.check()
        return config

    def data(self, training: DataConfig) -> DataConfig:
        """Return the settings of the labeled images: those of the training images, unless `path` is set."""
        if self.path is not None:
            training = replace(
                training, path=self.path, name=None, revision=None, image_column=None, label_column=None
            )
        label_column = self.label_column or training.label_column
        return replace(training, label_column=label_column, max_images=None, streaming=False)

    def check(self) -> None:
        """Raise UserError for an invalid value, before any image is read."""
        split, other, few = self.test_split, self.test_split != self.train_split, list(self.few_labels)
        grid = self.patch_grid
        is_grid = not grid or (len(grid) == 2 and are_positive(grid))
        lists = ((key, list(getattr(self, key))) for key in ("neighbors", "temperatures", "learning_rates"))
        keys = ("batch_size", "draws", "linear_epochs", "linear_batch_size", "raw_pixel_size")
        numbers = ((key, getattr(self, key)) for key in keys)
        limits = ((key, getattr(self, key)) for key in ("max_train_images", "max_test_images"))
        advice = "two splits, otherwise each test image is its own nearest neighbor"
        check_values(
            "evaluation",
            ("test_split", split, other, "a split other than train_split", advice),
            ("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            ("pooling", self.pooling, self.pooling in POOLINGS, f"one of {', '.join(POOLINGS)}"),
            ("patch_grid", grid, is_grid, "the positive numbers [patch, stride], [] for none, or null"),
            *((key, given, are_positive(given), "one or more positive numbers") for key, given in lists),
            ("few_labels", few, min(few, default=1) > 0, "positive numbers"),
            *((key, number, number > 0, "a positive number") for key, number in numbers),
            *((key, most, most is None or most >= 2, "at least 2", "null for all") for key, most in limits),
        )


def check_patch_grid(patch: int, stride: int, *sides: int) -> None:
    """Raise UserError if a grid of patches does not cover images with these sides.

    Args:
        patch, stride: `evaluation.patch_grid`.
        sides: sides of the processed images, in pixels.
    """
    for side in sides:
        if side < patch or (side - patch) % stride:
            raise UserError(
                f"evaluation.patch_grid: expected patches that cover images of {side} pixels, got patches of "
                f"{patch} pixels with stride {stride}"
            )


def are_positive(values: Sequence[float]) -> bool:
    """Return whether there are values, and all of them are positive and finite."""
    return bool(values) and all(0 < value < math.inf for value in values)


def usable_neighbors(wanted: Sequence[int], images: int) -> list[int]:
    """Return the values of k up to the number of images. Without any, return one of `NEIGHBORS` up to 20."""
    most = min(images, MAIN_KNN[0])
    return [k for k in wanted if k <= images] or [max((k for k in NEIGHBORS if k <= most), default=1)]


class KnnResult(TypedDict):
    """k-NN result: the main accuracy, and {neighbors, temperature, accuracy} for the complete grid."""

    neighbors: int
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
    skipped: list[str]  # measurements that were not possible, most of them because of too few images
    statistics: dict[str, float]  # of the test features: embedding_std, rank_me, uniformity, images
    seconds: dict[str, float]
    precision: NotRequired[str]  # of the features: "float32", "bfloat16", "float16" or "float64"
    pooling: NotRequired[str]
    # main k-NN accuracy by "cls" and "mean", by "image" (the published feature) and "grid", if compared
    poolings: NotRequired[dict[str, float]]
    image_size: NotRequired[int]


class Description(NamedTuple):
    """How cards and curves describe a measurement that is made during training.

    Attributes:
        text: the description, with the best or the worst value.
        panel: title of its panel in the curves, which measurements can share. None: `text`; "": not drawn.
        lower_is_better: whether the best model has the lowest value.
    """

    text: str
    panel: str | None = None
    lower_is_better: bool = False


_STD, _PROTOTYPES = "standard deviation (isotropic: 1, collapsed: 0)", "prototypes (used equally: entropy 1)"
MEASUREMENTS = {
    "knn": Description("k-NN accuracy on images of the test split", panel="k-NN accuracy while training"),
    # The loss of the monitor is not comparable with the training loss: the number of images differs.
    "loss": Description("loss on fixed images", panel="", lower_is_better=True),
    "embedding_std": Description("standard deviation of embeddings (isotropic: 1, collapsed: 0)", _STD),
    "embedding_rank": Description("effective rank of embeddings (RankMe, centered)", "effective rank"),
    "feature_std": Description("standard deviation of features (isotropic: 1, collapsed: 0)", _STD),
    "rank_me": Description("effective rank of features (RankMe)", "effective rank"),
    "alignment": Description("alignment of two views (equal embeddings: 0)", lower_is_better=True),
    "uniformity": Description("uniformity (lower: more uniform)", lower_is_better=True),
    "predictor_rank": Description("effective rank of the predictor", "effective rank"),
    "eigenspace_alignment": Description(
        "alignment of predictor and correlation matrix (same eigenvectors: 1)"
    ),
    "prototype_entropy": Description("entropy of the use of prototypes (used equally: 1)", _PROTOTYPES),
    "prototypes_used": Description("share of the prototypes that are used", _PROTOTYPES),
    "off_diagonal_correlation": Description(
        "correlation of different dimensions (at best: 0)", lower_is_better=True
    ),
    "dimension_std": Description("mean standard deviation of the dimensions"),
    "explained_variance": Description("share of the targets' variance that is predicted"),
    "queue_age": Description("steps that a key stays in the queue"),
    "queue_filled": Description("share of the queue that holds keys"),
}
"""Name of a measurement of the monitor, without `eval_` -> its description. Methods may make further ones."""
