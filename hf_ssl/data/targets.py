# SPDX-License-Identifier: Apache-2.0
"""The kinds of labels of images: classes, and targets (one item for each image, such as its mask).

The only kind of targets is masks of segmentation: the class number of each pixel of an image, from a second
column of images. A mask is an image with one channel, or with a palette whose indices are the class numbers.
Class numbers are from 0 to 255. A mask has the orientation and the size of its image.

A new kind of targets needs one file and one line in `TARGETS`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor

from hf_ssl.data.adapters import Items, item_features
from hf_ssl.data.columns import encoded_images, find_mask_column, without_decoding
from hf_ssl.data.config import DataConfig
from hf_ssl.data.decode import BrokenImage, StoredImage, read_pixels
from hf_ssl.data.further_columns import class_numbers, stored_further_image
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError

CLASS_KINDS = ("one", "several", "boxes")
"""Kinds of class labels: one class for each image, several classes, or boxes with classes."""


class Masks:
    """The masks of map-style data. They are decoded when they are requested.

    Args:
        source: N rows of images with masks.
        column: the column of masks; for items (image, mask) of a data set in Python, the position 1.
    """

    def __init__(self, source: Source, column: str | int) -> None:
        self._where, self._column = source.description, column
        self._items: Any = source.dataset
        self._folder = source.folder
        if isinstance(source.dataset, Dataset):
            columns = source.dataset.select_columns([str(column)])
            self._items = without_decoding(columns, str(column)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> Tensor:
        """Return the mask of a row, (H, W) uint8.

        Raises:
            UserError: the mask is missing, cannot be read, has colors, or has class numbers above 255.
        """
        try:
            return read_pixels(self._stored(int(row)).read(), class_numbers)[0]
        except BrokenImage as error:
            raise UserError(
                f"data.mask_column: expected a mask of class numbers in {self._where} row {row}, column "
                f"{self._column}, got another image ({error}); correct it, or use data.mask_column=NAME"
            ) from error

    def _stored(self, row: int) -> StoredImage:
        if isinstance(self._items, Dataset):
            (image,) = encoded_images(self._items[[row]], str(self._column), _stored_mask, self._folder)
            return image
        try:
            item = self._items.data[row][self._column]
        except Exception as error:  # the user's code can raise any error
            item = BrokenImage(f"{type(error).__name__}: {error}")
        return _stored_mask(item)


def _stored_mask(item: Any) -> StoredImage:
    return stored_further_image(item, "classes")


def find_masks(source: Source, config: DataConfig) -> Masks:
    """Return the masks of a source of map-style data.

    Args:
        source: the images.
        config: has `mask_column`.

    Raises:
        UserError: there is no column of masks, or there are several.
    """
    where, requested = source.description, config.mask_column
    if isinstance(source.dataset, Dataset):
        features = source.dataset.features
        return Masks(source, find_mask_column(features, requested, source.image_column, where))
    items: Items = source.dataset
    if items.column is not None:
        features = item_features(items.data[0])
        return Masks(source, find_mask_column(features, requested, items.column, where))
    first = items[0]
    if not (isinstance(first, tuple | list) and len(first) > 1 and _is_mask(first[1])):
        raise UserError(
            f"data.mask_column: expected items (image, mask) in {where}, got {type(first).__name__}; use "
            "items with two images, or dicts"
        )
    return Masks(source, 1)


def _is_mask(item: Any) -> bool:
    """Return whether an item is an image with one channel, and not, for example, a class number."""
    try:
        read_pixels(_stored_mask(item).read(), class_numbers)
    except BrokenImage:
        return False
    return True


class TargetKind(NamedTuple):
    """A kind of targets.

    Attributes:
        find: returns the targets of a source as a sequence, one item for each row. The sequence reads an item
            on request. The function raises UserError if the source has no such targets.
        column: returns the column that the user names; None: it is found by its name.
    """

    find: Callable[[Source, DataConfig], Any]
    column: Callable[[DataConfig], str | None]


TARGETS = {"masks": TargetKind(find_masks, lambda config: config.mask_column)}
"""Name of a kind of targets -> its functions."""


def uses_classes(kinds: Collection[str]) -> bool:
    """Return whether class labels are among the requested kinds of labels."""
    return not set(kinds).isdisjoint(CLASS_KINDS)


class SelectedRows(Sequence[Any]):
    """Targets of selected rows, in the given order. An item is read on request.

    Args:
        targets: N targets.
        rows: row numbers.
    """

    def __init__(self, targets: Sequence[Any], rows: np.ndarray) -> None:
        self._targets, self._rows = targets, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: Any) -> Any:
        return self._targets[int(self._rows[position])]


def find_targets(source: Source, config: DataConfig, kinds: Collection[str]) -> dict[str, Sequence[Any]]:
    """Return the targets of these kinds that a source of map-style data has.

    Args:
        source, config: the data.
        kinds: the requested kinds of labels, from `CLASS_KINDS` and `TARGETS`.

    Raises:
        UserError: the source has no targets in a column that the user names; or no kind of classes is
            requested, and the source has no targets of any requested kind.
    """
    found: dict[str, Sequence[Any]] = {}
    errors = []
    for kind in (kind for kind in TARGETS if kind in kinds):
        try:
            found[kind] = TARGETS[kind].find(source, config)
        except UserError as error:
            if TARGETS[kind].column(config) is not None:
                raise
            errors.append(error)
    if errors and not found and not uses_classes(kinds):
        raise errors[0]
    return found
