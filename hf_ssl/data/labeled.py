# SPDX-License-Identifier: Apache-2.0
"""Images with labels, for the evaluation and the monitor."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor

from hf_ssl.data.batch import BrokenCounter
from hf_ssl.data.boxes import Objects
from hf_ssl.data.class_numbers import class_name, matching_numbers
from hf_ssl.data.contents import same_contents
from hf_ssl.data.decoded import DecodedRows
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.pixels import ValueRange
from hf_ssl.data.readers import decoder_state
from hf_ssl.data.sources import Source
from hf_ssl.data.targets import SelectedRows
from hf_ssl.errors import UserError, counted

_CHUNK = 256


class LabeledImages:
    """Labeled images in a fixed order, decoded when they are requested.

    `iter_batches` and `labels` omit broken images. Broken images are known only after all images were
    decoded, so read `labels` after `iter_batches`. If `labels` is read first, it decodes all images once.

    Args:
        source: N rows of map-style data.
        rows: reads the N images.
        labels: (N,) int64. For images with several labels: (N, K), 1: yes, 0: no. Without classes: (N, 0).
        class_names: names of the classes; label i has the name at index i.
        max_broken_fraction: largest share of images that may be unreadable.
        channels: number of channels of the images.
        targets: {kind: N targets of the images}, with the kinds of `hf_ssl.data.targets.TARGETS`.
        objects: the boxes of the N images; `labels` then contain the classes that each image shows. None: no
            boxes.

    Attributes:
        class_names: names of the classes; label i has the name at index i.
        revision: the commit on the Hub, or a fingerprint of the local data.
        description: path and split.
        broken: "where: reason" of each broken image that was found so far.
    """

    def __init__(
        self,
        source: Source,
        rows: EncodedRows | DecodedRows,
        labels: np.ndarray,
        class_names: list[str],
        max_broken_fraction: float,
        channels: int = 3,
        targets: Mapping[str, Sequence[Any]] | None = None,
        objects: Objects | None = None,
    ) -> None:
        self._targets, self._objects = dict(targets or {}), objects
        self.class_names = class_names
        self.revision = source.revision
        self.description = source.description
        self._source = source
        self._channels = channels
        self._rows = rows
        self._labels = labels
        self._broken: dict[int, str] = {}
        self._complete = False
        self._readable_rows: np.ndarray | None = None
        self._counter = BrokenCounter(max_broken_fraction, len(labels))
        self._shared: WeakKeyDictionary[LabeledImages, int | None] = WeakKeyDictionary()

    @property
    def selection(self) -> str | None:
        """A fingerprint of the numbers of the chosen rows; None if all rows of the data set are used."""
        rows = self._source.row_numbers
        return None if rows is None else hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()

    def classified_by(self, other: "LabeledImages") -> None:
        """Use the class numbers of `other`, the images that classify these images.

        The two data sets can have different orders of the classes.

        Raises:
            UserError: the other images have only one class, they do not have the class of an image, or they
                have no image of any of these classes.
        """
        if self._objects is not None and other._objects is not None:
            self._match_objects(self._objects, other)
            return
        if self.has_several_labels or other.has_several_labels:
            self._match_columns(other)
            return
        if len(np.unique(other._labels)) < 2:
            raise UserError(
                f"labels: expected images of at least 2 classes in {other.description}, got "
                f"{counted(len(other._labels), 'image')} of one class; use another split or column"
            )
        names = other.class_names
        used, images = np.unique(self._labels, return_counts=True)
        self._require_classes({self.class_names[k]: n for k, n in zip(used, images, strict=True)}, other)
        if self.class_names != names:
            self._labels = matching_numbers(self.class_names, names)[self._labels]
            self.class_names = list(names)
        if self.unknown_to(other) == len(self._labels):
            raise UserError(
                f"labels: expected classes of {other.description} in {self.description}, got other classes "
                f"for all {counted(len(self._labels), 'image')}; if the images are sorted by class, use "
                "evaluation.test_fraction=0.2"
            )

    def shared_with(self, other: "LabeledImages") -> int | None:
        """Return how many of these images have the same content as an image of `other`.

        None: not known, because the images are a data set in Python or very large (`same_contents`).
        """
        if other not in self._shared:
            found = same_contents([self._source, other._source])
            self._shared[other] = None if found is None else int(np.isin(found[0], found[1]).sum())
        return self._shared[other]

    def unknown_to(self, other: "LabeledImages") -> int:
        """Return how many of these images have a class without images in `other`, after `classified_by`."""
        if self.has_several_labels:
            return 0
        return int((~np.isin(self._labels, other._labels)).sum())

    def _require_classes(self, used: dict[str, int], other: "LabeledImages") -> None:
        """Raise UserError if other images do not have all used classes {name: number of images}."""
        names = other.class_names
        known = {class_name(name) for name in names}
        missing = {name: count for name, count in used.items() if class_name(name) not in known}
        if missing:
            raise UserError(
                f"labels: expected the classes of {other.description}, {shorten(', '.join(names), 80)}, got "
                f"{next(iter(missing))} in {self.description} ({sum(missing.values()):,} of "
                f"{len(self._labels):,} images have such classes); use data sets with the same classes, "
                "or evaluation.test_fraction=0.2"
            )

    def _match_objects(self, objects: Objects, other: "LabeledImages") -> None:
        """Use the class numbers of other images for the boxes. The errors are those of `_require_classes`."""
        counts = (self._labels == 1).sum(axis=0)
        self._require_classes({self.class_names[k]: counts[k] for k in np.flatnonzero(counts)}, other)
        self._objects = objects.renumbered(other.class_names)
        self._labels, self.class_names = self._objects.matrix(), list(other.class_names)

    def _match_columns(self, other: "LabeledImages") -> None:
        """Order the columns of labels as in other images.

        Raises:
            UserError: only one of the two has several labels for an image, or their classes differ.
        """
        names, own = other.class_names, self.class_names
        if self.has_several_labels != other.has_several_labels:
            pair = (self, other) if self.has_several_labels else (other, self)
            raise UserError(
                "labels: expected one class for each image in both splits, or lists of classes in both, got "
                f"lists in {pair[0].description} and one class in {pair[1].description}; use other columns"
            )
        if sorted(names) != sorted(own):
            raise UserError(
                f"labels: expected lists of the {len(names)} classes of {other.description}, got others "
                f"in {self.description}; use data sets with the same classes"
            )
        self._labels, self.class_names = self._labels[:, [own.index(name) for name in names]], list(names)

    @property
    def objects(self) -> Objects | None:
        """The boxes of the images that can be read; None if the images have no boxes."""
        return None if self._objects is None else self._objects.select(self._readable())

    @property
    def has_boxes(self) -> bool:
        """Whether the images have boxes of objects."""
        return self._objects is not None

    @property
    def has_several_labels(self) -> bool:
        """Whether an image can have several labels. `labels` are then a matrix (N, K)."""
        return self._labels.ndim == 2

    @property
    def kinds(self) -> set[str]:
        """The kinds of labels that the images have, of `hf_ssl.data.targets`."""
        found = {*self._targets, *(["boxes"] if self.has_boxes else [])}
        if not self.has_several_labels:
            return found | {"one"}
        return found | {"several"} if self._labels.shape[1] else found

    def require_one_label(self, what: str) -> None:
        """Raise UserError if an image can have several labels, which `what` cannot use."""
        if self.has_several_labels:
            raise UserError(
                f"data.label_column: expected one class for each image of {self.description} for {what}, got "
                "lists of classes; use a column with one class, if there is one"
            )

    def __len__(self) -> int:
        """Return the number of images without the broken ones that were found so far."""
        return len(self._labels) - len(self._broken)

    def __getitem__(self, index: int) -> Tensor:
        """Return the image (C, H, W) uint8 that belongs to `labels[index]`."""
        return self.read(np.array([index]))[0]

    def read(self, rows: np.ndarray) -> list[Tensor]:
        """Return the images (C, H, W) uint8 that belong to `labels[rows]`."""
        images, _ = self._rows.read(self._readable()[rows])
        return list(images)

    @property
    def broken(self) -> list[str]:
        return list(self._broken.values())

    @property
    def broken_rows(self) -> dict[int, str]:
        """The positions of the broken images that were found so far, with "where: reason"."""
        return dict(self._broken)

    @property
    def fingerprint(self) -> str | None:
        """A text that identifies the images; None for a data set in Python, whose items may change.

        It covers the revision, the split, the column and the chosen rows in their order, but no labels.
        """
        source = self._source
        if not isinstance(source.dataset, Dataset):
            return None
        decoding = f" {source.value_range} {decoder_state()}"
        return f"{source.revision} {source.identity} {source.image_column} {self._channels}{decoding}"

    @property
    def value_range(self) -> ValueRange | None:
        """The values that became black and white, see `Source`."""
        return self._source.value_range

    @property
    def names(self) -> list[str]:
        """The names of the files of the images that can be read; none if an image has no name."""
        dataset, column = self._source.dataset, self._source.image_column
        if not isinstance(dataset, Dataset) or not isinstance(dataset.features[column], Image):
            return []
        paths = dataset.select_columns([column]).flatten().with_format(None)[f"{column}.path"][:]
        return [paths[row] for row in self._readable()] if all(paths) else []

    def omit_broken(self, broken: dict[int, str]) -> None:
        """Omit the given broken images, the `broken_rows` of an earlier pass, without reading all images.

        Raises:
            UserError: the share of broken images is too large.
        """
        new = [text for row, text in broken.items() if row not in self._broken]
        self._broken.update(broken)
        self._counter.count(len(self._labels) - len(broken), new)
        self._complete = True

    @property
    def labels(self) -> Tensor:
        """The labels (N,) int64, or (N, K), of the images that can be read."""
        return torch.from_numpy(self._labels[self._readable()])

    @property
    def targets(self) -> dict[str, Sequence[Any]]:
        """The targets of the images that can be read, by kind, such as "masks"."""
        return {kind: SelectedRows(each, self._readable()) for kind, each in self._targets.items()}

    def iter_batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """Yield all images in lists of `batch_size` (C, H, W) uint8 tensors; the last list may be shorter.

        Raises:
            UserError: the share of broken images is too large.
        """
        waiting: list[Tensor] = []
        for start in range(0, len(self._labels), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(self._labels)))
            images, broken = self._rows.read(rows)
            if not self._complete:
                self._broken.update({start + position: text for position, text in broken.items()})
                self._counter.count(len(rows) - len(broken), list(broken.values()))
            waiting += [image for position, image in enumerate(images) if position not in broken]
            while len(waiting) >= batch_size:
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]
        self._complete = True
        if waiting:
            yield waiting

    def iter_rows(self, rows: range, batch_size: int, broken: dict[int, str]) -> Iterator[list[Tensor]]:
        """Yield images (C, H, W) uint8 in lists. Call `omit_broken` after all rows have been read.

        Args:
            rows: positions in the split, including broken images.
            batch_size: number of rows in one list. A list with broken images is shorter.
            broken: a dict. The method adds the reason for each broken image among these rows.
        """
        for start in rows[::batch_size]:
            read = np.arange(start, min(start + batch_size, rows.stop))
            images, found = self._rows.read(read)
            broken.update({start + position: text for position, text in found.items()})
            yield [image for position, image in enumerate(images) if position not in found]

    def _readable(self) -> np.ndarray:
        """Return the positions of the images that can be read."""
        if not self._complete:
            for _ in self.iter_batches(_CHUNK):
                pass
        if self._readable_rows is None:
            self._readable_rows = np.setdiff1d(np.arange(len(self._labels)), list(self._broken))
        return self._readable_rows
