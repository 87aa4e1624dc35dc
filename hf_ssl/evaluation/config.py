# SPDX-License-Identifier: Apache-2.0
"""The section `evaluation` of a recipe, and the names of all measurements of the monitor.

This module does not import torch, because recipes and cards need none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError, check_name, check_values
from hf_ssl.evaluation.protocols import (
    DEFAULT_PROTOCOLS,
    PROTOCOLS,
    SEVERAL_LABELS_PROTOCOLS,
    load_protocol,
)
from hf_ssl.modeling.pooling import POOLINGS
from hf_ssl.names import renamed_arguments, warn_deprecated
from hf_ssl.precision import AUTO, PRECISIONS
from hf_ssl.sections import as_section, wrong_type

# The steps are half-decades. Published settings lie between 0.02 (VICReg) and 30 (MoCo). The norms of
# features differ by as much.
LEARNING_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
MOMENTUM = 0.9  # of SGD in all protocols
NEIGHBORS = (1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
TEMPERATURES = (0.07, 0.1)
MAIN_KNN = (20, 0.07)  # k and T that DINO recommends; a card shows this accuracy first
DEPRECATED = {
    "neighbors": "knn.neighbors",
    "temperatures": "knn.temperatures",
    "few_labels": "few_label_knn.labels_per_class",
    "draws": "few_label_knn.draws",
    "linear": "linear",
    "linear_epochs": "linear.epochs",
    "linear_batch_size": "linear.batch_size",
    "linear_standardize": "linear.standardize",
    "learning_rates": "linear.learning_rates",
}
"""Deprecated key of the section -> the key in `settings` that replaces it."""


@renamed_arguments(neighbours="neighbors")
@dataclass
class EvaluationConfig:
    """Settings of an evaluation.

    The code that opens the data applies the path, the splits, the label column and the numbers of images.
    """

    path: str | None = None  # None: data.path
    train_split: str = "train"
    test_split: str = "test"
    # Share of the images of train_split that are the test images, for data without a test split or sorted by
    # class. Both parts have the class shares of the split, and images with the same content are in one part.
    # The parts are random but fixed: they depend on the images and the share, not on `seed`. test_split has
    # no effect. Training without labels uses all images of data.split, also those of the test part.
    # None: test_split
    test_fraction: float | None = None
    # The columns. None: those of `data`, or found by their types if `path` is set.
    image_column: str | None = None
    label_column: str | None = None
    # Largest numbers of images. They are drawn at random, with the class shares of all images.
    max_train_images: int | None = None
    max_test_images: int | None = None
    batch_size: int = 256  # images in one forward pass
    # Precision of the features: float32, bfloat16 or float16 (autocast). auto: the fastest one on the device.
    precision: str = "auto"
    pooling: str = "auto"  # see `hf_ssl.modeling.pooling.pool`
    compare_poolings: bool = False  # k-NN both by class token and by mean of tokens
    # [patch, stride] in pixels of processed images: also k-NN by the mean feature of a grid of patches. None:
    # the grid of the method (CPC; other methods have none). []: no grid
    patch_grid: list[int] | None = None
    # Names of PROTOCOLS, in the order of the table, and the settings of protocols: {linear: {epochs: 10}}
    protocols: list[str] = field(default_factory=lambda: list(DEFAULT_PROTOCOLS))
    settings: dict[str, Any] = field(default_factory=dict)
    # Store the features of encoders in cache_dir (null: hf_ssl/features in HF_HOME). Another evaluation then
    # reads them. The least recently used features are deleted if all need more than cache_size GiB.
    cache: bool = True
    cache_dir: str | None = None
    cache_size: float = 20.0
    baselines: bool = True  # also evaluate the untrained encoder and raw pixels
    raw_pixel_size: int = 32
    seed: int = 0
    results_dir: str | None = None  # folder of <recipe>.json; None: results/ in the output folder
    # Deprecated keys; they move to `protocols` and `settings`.
    neighbors: list[int] | None = None
    temperatures: list[float] | None = None
    few_labels: list[int] | None = None
    draws: int | None = None
    linear: bool | None = None
    linear_epochs: int | None = None
    linear_batch_size: int | None = None
    linear_standardize: bool | None = None
    learning_rates: list[float] | None = None

    def __post_init__(self) -> None:
        """Move the values of deprecated keys."""
        moved = [name for name in DEPRECATED if getattr(self, name) is not None]
        if not moved:
            return
        keys = ", ".join(f"evaluation.{name}" for name in moved)
        new = ", ".join(f"evaluation.settings.{DEPRECATED[name]}" for name in moved if name != "linear")
        new = ", ".join(filter(None, (new, "evaluation.protocols" if "linear" in moved else "")))
        warn_deprecated(f"{keys}: deprecated; use {new}")
        settings = {
            name: dict(values) if isinstance(values, Mapping) else values
            for name, values in self.settings.items()
        }
        names = [name for name in self.protocols if name != "linear" or self.linear is not False]
        if self.few_labels and "few_label_knn" not in names:
            names.insert(1, "few_label_knn")
        if self.few_labels == []:
            names = [name for name in names if name != "few_label_knn"]
        for name in moved:
            protocol, _, key = DEPRECATED[name].partition(".")
            if name != "linear" and not (name == "few_labels" and not self.few_labels):
                own = settings.setdefault(protocol, {})
                if isinstance(own, dict):  # `check` reports other values
                    own.setdefault(key, getattr(self, name))
            setattr(self, name, None)
        self.protocols, self.settings = names, settings

    @classmethod
    def of(cls, given: Any) -> "EvaluationConfig":
        """Return checked settings.

        Args:
            given: an `EvaluationConfig`, a dict of its fields, or None for the defaults.

        Raises:
            UserError: a key is unknown, or a value has the wrong type or is outside its range.
        """
        config = as_section(cls, given, "evaluation")
        config.check()
        return config

    def data(self, training: DataConfig) -> DataConfig:
        """Return the settings of the labeled images: those of the training images, unless `path` is set."""
        if self.path is not None:
            training = replace(
                training, path=self.path, name=None, revision=None, image_column=None, label_column=None
            )
        columns = {
            name: getattr(self, name) or getattr(training, name) for name in ("image_column", "label_column")
        }
        return replace(training, **columns, max_images=None, streaming=False)

    @property
    def split_names(self) -> tuple[str, str]:
        """Return the names of the training images and of the test images, for texts and facts."""
        if self.test_fraction is None:
            return self.train_split, self.test_split
        shares = (100 * (1 - self.test_fraction), 100 * self.test_fraction)
        first, second = (f"{share:.6g} % of {self.train_split}" for share in shares)
        return first, second

    def check(self) -> None:
        """Raise UserError for an invalid value, before any image is read."""
        precisions = (AUTO, *PRECISIONS)
        split, share = self.test_split, self.test_fraction
        other = self.test_split != self.train_split or share is not None
        grid = self.patch_grid
        is_grid = not grid or (len(grid) == 2 and are_positive(grid))
        numbers = ((key, getattr(self, key)) for key in ("batch_size", "raw_pixel_size", "cache_size"))
        limits = ((key, getattr(self, key)) for key in ("max_train_images", "max_test_images"))
        advice = "two splits, otherwise each test image is its own nearest neighbor"
        check_values(
            "evaluation",
            ("test_split", split, other, "a split other than train_split", advice),
            (
                "test_fraction",
                share,
                share is None or 0 < share < 1,
                "a share between 0 and 1",
                "evaluation.test_fraction=0.2, or null for evaluation.test_split",
            ),
            ("precision", self.precision, self.precision in precisions, f"one of {', '.join(precisions)}"),
            ("pooling", self.pooling, self.pooling in POOLINGS, f"one of {', '.join(POOLINGS)}"),
            ("patch_grid", grid, is_grid, "the positive numbers [patch, stride], [] for none, or null"),
            ("protocols", list(self.protocols), bool(self.protocols), "one or more protocols"),
            *((key, number, number > 0, "a positive number") for key, number in numbers),
            ("seed", self.seed, 0 <= self.seed < 2**32, "a number from 0 to 4294967295"),
            *((key, most, most is None or most >= 2, "at least 2", "null for all") for key, most in limits),
        )
        for name in self.protocols:
            check_name("evaluation.protocols", name, PROTOCOLS, "known protocols")
        for name in self.settings:
            self.of_protocol(name)

    def for_labels(self, several: bool, chosen: bool) -> "EvaluationConfig":
        """Return the settings, with `SEVERAL_LABELS_PROTOCOLS` if the images have several labels.

        The protocols stay if the user chose them, or if one of them accepts several labels.

        Args:
            several: whether an image can have several labels.
            chosen: whether the user chose the protocols.
        """
        if chosen or not several or any("several" in PROTOCOLS[name].labels for name in self.protocols):
            return self
        return replace(self, protocols=list(SEVERAL_LABELS_PROTOCOLS))

    def of_protocol(self, name: str) -> Any:
        """Return the checked settings of a protocol, an instance of its `Config`. This imports torch.

        Raises:
            UserError: the protocol or a key is unknown, or a value is invalid.
        """
        where = f"evaluation.settings.{name}"
        check_name("evaluation.settings", name, PROTOCOLS, "a known protocol")
        cls, values = load_protocol(name).Config, self.settings.get(name)
        if not isinstance(values, Mapping | cls | None):
            raise UserError(f"{wrong_type(where, dict, values)}; use {where}={{key: value}}")
        settings = as_section(cls, values, where)
        settings.check(where)
        return settings


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
    """Return whether there are values, and all of them are positive and far from the limits of float32."""
    return bool(values) and all(1e-35 <= value <= 1e35 for value in values)


def usable_neighbors(wanted: Sequence[int], images: int) -> list[int]:
    """Return the values of k that do not exceed the number of images.

    If there are none, return the largest of `NEIGHBORS` that exceeds neither this number nor 20.
    """
    most = min(images, MAIN_KNN[0])
    return [k for k in wanted if k <= images] or [max((k for k in NEIGHBORS if k <= most), default=1)]


def main_knn(settings: Any, images: int) -> tuple[int, float]:
    """Return the main k and temperature, which are the same wherever one k-NN accuracy is measured.

    k is the largest usable one up to 20, or the smallest one if all are above 20. The temperature is 0.07 if
    it is among the settings, otherwise the first one.

    Args:
        settings: settings of the protocol `knn`.
        images: number of images in the bank.
    """
    counts = usable_neighbors(settings.neighbors or NEIGHBORS, images)
    below = [k for k in counts if k <= MAIN_KNN[0]]
    temperatures = settings.temperatures
    temperature = MAIN_KNN[1] if MAIN_KNN[1] in temperatures else temperatures[0]
    return max(below) if below else min(counts), temperature


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
    "knn_projector": Description(
        "k-NN accuracy of the projector's output on images of the test split",
        panel="k-NN accuracy while training",
    ),
    "online_probe": Description(
        "accuracy of the online probe on images of the test split (a classifier trained beside the encoder; "
        "not comparable with the linear probe)",
        panel="accuracy of the online probe",
    ),
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
    "queue_age": Description("number of steps that a key stays in the queue"),
    "queue_filled": Description("share of the queue that holds keys"),
}
"""Name of a measurement of the monitor, without `eval_` -> its description. Methods may make further ones."""
