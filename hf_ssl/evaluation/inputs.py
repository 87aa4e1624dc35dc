# SPDX-License-Identifier: Apache-2.0
"""What every protocol receives: the features and the labels of both splits (layer 1).

Legend: M training images, N test images, D features, K classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_ssl.data import LabeledImages
from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.knn import as_labels, check_features
from hf_ssl.evaluation.results import Quality
from hf_ssl.progress import progress
from hf_ssl.random import permutation

Result = TypeVar("Result")
HELD_OUT = 0.1
"""Share of the training images on which protocols select their settings."""
SELECTED_ON = f"{100 * HELD_OUT:g} % of the training images"


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

    def measure_each(self, title: str, measurements: Mapping[str, Callable[[], Result]]) -> list[Result]:
        """Return the results of several measurements of a protocol, each of which may take long.

        A measurement that raises UserError is skipped with its reason. The others stay.

        Args:
            title: title of the protocol.
            measurements: {words for the reason: function that measures}.

        Raises:
            UserError: all measurements raise. The error is that of the first one.
        """
        results: list[Result] = []
        errors: list[UserError] = []
        for words, measure in measurements.items():
            try:
                results.append(measure())
            except UserError as error:
                errors.append(error)
                self.skipped.append(f"{title}: {words}: {error}")
        if errors and not results:
            del self.skipped[-len(errors) :]  # the caller reports the error
            raise errors[0]
        return results


def read_rows(images: Any, rows: Tensor, batch_size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield lists of row numbers with their images (C, H, W) uint8.

    Each list contains the requested images of one batch of `images.iter_batches(batch_size)`. No list is
    empty. `LabeledImages` decode only the requested images.

    Args:
        images: a `LabeledData`.
        rows: the row numbers, ascending.
        batch_size: number of images in a batch.
    """
    if isinstance(images, LabeledImages):
        for _, group in groupby(rows.tolist(), key=lambda row: row // batch_size):
            numbers = list(group)
            yield list(zip(numbers, images.read(np.array(numbers)), strict=True))
        return
    wanted, first = set(rows.tolist()), 0
    for batch in images.iter_batches(batch_size):
        chosen = [(row, image) for row, image in enumerate(batch, first) if row in wanted]
        first += len(batch)
        if chosen:
            yield chosen


def read_split(features: Any, labels: Any, name: str, argument: str, width: int | None = None) -> Split:
    """Return a checked split.

    Args:
        features, labels: (N, D) and (N,), tensors, arrays or lists. Labels of images with several labels are
            a tensor or an array (N, K).
        name: name of the split.
        argument: name of the argument with the features, for messages.
        width: expected D.

    Raises:
        UserError: there are fewer than 2 images, a number is not finite, or a label is not a class number.
    """
    rows = check_features(features, f"{argument} features", width)
    enough = f"at least 2 images in split {name!r}"
    check_values("evaluation", (f"{argument}_split", len(rows), len(rows) >= 2, enough, "another split"))
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
        generator: it draws the images instead of the seed. Only `linear` passes one: its published results
            were selected with these images, and another choice would change them.
    """
    if generator is None:
        order = torch.from_numpy(permutation(images, seed))
    else:
        order = torch.randperm(images, generator=generator)
    held_out = min(held_out_images(images), images if most is None else most)
    return order[held_out:], order[:held_out]
