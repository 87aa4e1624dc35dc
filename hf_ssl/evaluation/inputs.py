# SPDX-License-Identifier: Apache-2.0
"""What every protocol receives: the features and the labels of both splits (layer 1).

Legend: M training images, N test images, D features, K classes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.average_precision import mean_average_precision
from hf_ssl.evaluation.bootstrap import MOST_PACKED, bootstrap_error, pack_right
from hf_ssl.evaluation.knn import as_labels, check_features
from hf_ssl.evaluation.results import ProtocolResult, Quality, result_id, standard_error
from hf_ssl.progress import progress
from hf_ssl.random import permutation

HELD_OUT = 0.1
"""Share of the training images on which protocols select their settings."""
SELECTED_ON = f"{100 * HELD_OUT:g} % of the training images"
EDGE = " (at the edge of the sweep)"


class LabeledData(Protocol):
    """Interface of the data of an evaluation; `hf_ssl.data.labeled_images` implements it.

    The evaluation reads the labels after the images, because a broken image also removes its label. All
    images must have labels. The label -1, which means "no label" in a data set, raises an error. The data can
    also have `targets`: {"masks": N masks (H, W) of class numbers}. Data without classes have labels (N, 0).
    """

    @property
    def labels(self) -> Any:
        """Return the class numbers, int64 (N,)."""

    def __len__(self) -> int: ...

    def iter_batches(self, batch_size: int) -> Iterable[list[Tensor]]:
        """Return batches, which are lists of uint8 tensors (C, H, W)."""


@dataclass
class Split:
    """One split of the labeled images.

    Attributes:
        features: (N, D) float32, the evaluated features.
        labels: (N,) int64. For images with several labels: (N, K), 1: yes, 0: no, -1: ignored. For images
            without classes, which have only `targets`: (N, 0).
        name: name of the split.
        further: further features (N, ...) that a protocol has requested with `features(config)`, by name. A
            name is missing if the encoder does not have these features.
        images: the images, a `LabeledData`; None: only features were given.
        targets: {kind: N further labels}, with the kinds of `hf_ssl.data.targets`, such as "masks".
    """

    features: Tensor
    labels: Tensor
    name: str
    further: dict[str, Tensor] = field(default_factory=dict)
    images: Any = None
    targets: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{counted(len(self), 'image')} of split {self.name}"

    @property
    def kinds(self) -> set[str]:
        """Return the kinds of labels that the images have, see `hf_ssl.evaluation.protocols.Protocol`."""
        classes = {"several"} if has_several_labels(self.labels) else {"one"}
        if self.labels.ndim == 2 and self.labels.shape[1] == 0:
            classes = set()
        boxes = {"boxes"} if getattr(self.images, "has_boxes", False) else set()
        return classes | boxes | set(self.targets)


@dataclass
class Inputs:
    """Both splits, and what the protocols of one evaluation share.

    Attributes:
        train, test: the images. Nothing may be selected on those of `test`.
        device: device of the computation.
        seed: seed of all random choices.
        description: first text of the progress bars; None: no bars.
        skipped: measurements that were not possible, with the reason, in words. Protocols append to it.
        seconds: duration of each protocol.
        encoder, processor: the frozen encoder in evaluation mode and its image processor; None: only features
            were given.
        dtype: precision of the encoder under autocast; None: that of its weights.
        batch_size: number of images in one forward pass of the encoder.
        pooling: the pooling of the evaluated features.
        image_size, channels: of the processed images.
        preset: augmentation of the training, a `ViewPreset`; None: not known.
        quality: measurements without labels; the protocol `quality` stores them here.
    """

    train: Split
    test: Split
    device: torch.device
    seed: int = 0
    description: str | None = None
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    encoder: Any = None
    processor: Any = None
    dtype: torch.dtype | None = None
    batch_size: int = 256
    pooling: Any = "auto"
    image_size: int = 0
    channels: int = 3
    preset: Any = None
    quality: Quality | None = None

    @property
    def classes(self) -> int:
        """Return the number of classes K, which is one more than the largest class number."""
        return int(max(self.train.labels.max(), self.test.labels.max())) + 1

    @contextmanager
    def progress(self, part: str, total: int | None = None, unit: str = "image") -> Iterator[Any]:
        """Show a progress bar for a part of the evaluation, unless there is no description."""
        with progress(
            None if self.description is None else f"{self.description}, {part}", total, unit=unit
        ) as bar:
            yield bar


def read_split(features: Any, labels: Any, name: str, argument: str, width: int | None = None) -> Split:
    """Return a checked split.

    Args:
        features, labels: (N, D) and (N,), tensors, arrays or lists. Labels of images with several labels are
            a tensor or an array (N, K).
        name: name of the split.
        argument: name of the argument with the features, for messages.
        width: expected D.

    Raises:
        UserError: there are fewer than 2 images, a number is not finite, or the labels are no class numbers.
    """
    rows = check_features(features, f"{argument} features", width)
    if len(rows) < 2:
        raise UserError(f"evaluation: expected at least 2 images in split {name!r}, got {len(rows)}")
    where = f"evaluation, split {name!r}"
    if has_several_labels(labels):
        return Split(rows.float(), _label_matrix(labels, len(rows), where), name)
    return Split(rows.float(), as_labels(labels, len(rows), where), name)


def has_several_labels(labels: Any) -> bool:
    """Return whether labels are a matrix (N, K), for images with several labels."""
    return isinstance(labels, Tensor | np.ndarray) and labels.ndim == 2


def _label_matrix(labels: Any, images: int, where: str) -> Tensor:
    matrix = torch.as_tensor(labels)
    if len(matrix) != images or not bool(((matrix == 0) | (matrix == 1) | (matrix == -1)).all()):
        raise UserError(
            f"{where}: expected labels 1, 0 or -1 (ignored) of {counted(images, 'image')}, got "
            f"{tuple(matrix.shape)}"
        )
    return matrix.long()


def held_out_images(images: int) -> int:
    """Return how many of the training images are held out for a selection."""
    return max(1, round(HELD_OUT * images))


def hold_out(
    images: int, seed: int, most: int | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return the row numbers of the training images to train on, and of those to select settings on.

    Args:
        images: number of training images, at least 2. 10 % of them and at least one are held out.
        seed: seed of the random choice.
        most: largest number of held-out images.
        generator: it draws the images in place of the seed. Only `linear` passes one: its published results
            were selected with these images, and another choice would change them.
    """
    if generator is None:
        order = torch.from_numpy(permutation(images, seed))
    else:
        order = torch.randperm(images, generator=generator)
    held_out = min(held_out_images(images), images if most is None else most)
    return order[held_out:], order[:held_out]


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


def check_converged(scores: Tensor, learning_rate: float, key: str) -> None:
    """Raise UserError for a training that diverged.

    Args:
        scores: (N, K) of the test images.
        learning_rate: learning rate of the training.
        key: key of the learning rates, for the message.
    """
    if not scores.isfinite().all():
        raise UserError(
            f"{key}: expected a rate with which training converges, got {learning_rate:g}; use a smaller one"
        )


def class_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the accuracies of predicted classes: `top_1`, `top_5` and `mean_per_class`.

    Args:
        scores: (N, K). If scores are equal, the lower class number ranks first.
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

    The rank of a class that has no score is a large number.
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels).to(scores.device)
    index = labels.clamp(max=scores.shape[1] - 1)[:, None]
    own = scores.gather(1, index)
    lower = torch.arange(scores.shape[1], device=scores.device) < index
    rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    return torch.where(labels < scores.shape[1], rank, 1 << 30)
