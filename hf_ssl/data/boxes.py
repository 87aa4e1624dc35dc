# SPDX-License-Identifier: Apache-2.0
"""Reads the boxes of objects from a column, in the usual forms of detection data sets on the Hub.

The column (usually `objects`) is a struct of lists or a list of structs, with one entry for each object of
the image. `BOX_NAMES`, `CLASS_NAMES` and `CROWD_NAMES` list the possible names of the fields. Other fields,
such as `id` and `area`, are ignored. Without a field of classes, all objects have the class "object".

A box is [x, y, width, height] in pixels of the image (COCO; cppe-5), or [x1, y1, x2, y2] (PASCAL VOC) with
`data.box_format=xyxy`. Images are rotated according to their EXIF tag, and boxes refer to the rotated image.

Legend: N images, O objects of an image.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value

from hf_ssl.data.class_numbers import class_numbers, matching_numbers, number_classes
from hf_ssl.data.config import BOX_FORMATS
from hf_ssl.errors import UserError, check_name

logger = logging.getLogger(__name__)

BOX_NAMES = ("bbox", "bboxes", "box", "boxes")
CLASS_NAMES = (
    "category", "categories", "category_id", "category_ids", "label", "labels", "label_id", "class",
    "classes",
)  # fmt: skip
CROWD_NAMES = ("iscrowd", "is_crowd", "crowd")
_OBJECT = "object"
_MOST_OUTSIDE = 0.5
# Normalized corners (in fractions of the image's width and height) are at most 1. If [x1, y1, x2, y2] is read
# as [x, y, width, height], the corner is a sum of two fractions, at most 2. Rounding can add a little.
_LARGEST_SHARE = 2.01
_ROWS_AT_ONCE = 1000


class ImageObjects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (O, 4) float32, [x1, y1, x2, y2] in pixels.
        classes: (O,) int64 class numbers.
        crowd: (O,) bool, whether a box contains many objects (`iscrowd` of COCO). The training ignores such
            a box. A detection in it counts neither as correct nor as wrong, as in COCO.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


@dataclass
class Objects:
    """The objects of N images.

    Attributes:
        images: the objects of each image; None for an image whose objects are not known.
        class_names: names of the classes.
        box_format: the format of the column, for messages.
        where: name of the data set, for messages.
    """

    images: list[ImageObjects | None]
    class_names: list[str]
    box_format: str
    where: str

    def matrix(self) -> np.ndarray:
        """Return which classes each image shows, (N, K) int64: 1 or 0; -1 if its objects are not known."""
        found = np.zeros((len(self.images), len(self.class_names)), np.int64)
        for row, image in enumerate(self.images):
            if image is None:
                found[row] = -1
            else:
                found[row, image.classes] = 1
        return found

    def select(self, rows: np.ndarray) -> "Objects":
        """Return the objects of the images with these row numbers, in the given order."""
        chosen = [self.images[row] for row in rows.tolist()]
        return Objects(chosen, self.class_names, self.box_format, self.where)

    def renumbered(self, class_names: list[str]) -> "Objects":
        """Return the objects with the class numbers of another list of names, which has all used classes."""
        numbers = matching_numbers(self.class_names, class_names)
        images = [
            None if image is None else image._replace(classes=numbers[image.classes]) for image in self.images
        ]
        return Objects(images, list(class_names), self.box_format, self.where)

    def inside(self, sizes: np.ndarray) -> list[ImageObjects]:
        """Return the objects of each image, with boxes clipped to the image.

        A box that lies completely outside of its image is left out, and a warning gives the number of such
        boxes.

        Args:
            sizes: (N, 2), height and width of each image in pixels.

        Raises:
            UserError: more than half of the boxes extend beyond their image by more than one pixel. They
                probably have another format.
        """
        found, outside, total, left_out = [], 0, 0, []
        other = "xyxy" if self.box_format == "xywh" else "xywh"
        for row, (image, (height, width)) in enumerate(zip(self.images, sizes.tolist(), strict=True)):
            assert image is not None  # `LabeledImages` omits the others
            limits = np.array([width, height, width, height], np.float32)
            clipped = image.boxes.clip(0, limits)
            total += len(clipped)
            outside += int((np.abs(clipped - image.boxes) > 1).any(axis=1).sum())
            inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
            for each in image.boxes[~inside].round(1).tolist():
                left_out.append(f"[x1, y1, x2, y2] = {each} in image {row} of {width} x {height} pixels")
            found.append(ImageObjects(clipped[inside], image.classes[inside], image.crowd[inside]))
        if outside > _MOST_OUTSIDE * total:
            raise UserError(
                f"data.box_format: expected the format of the boxes of {self.where}, got {self.box_format}, "
                f"with which {outside:,} of {total:,} boxes extend beyond their image; use {other}"
            )
        if left_out:
            logger.warning(
                "%s of %s boxes of %s are left out, because they lie outside of their image; the first is %s",
                f"{len(left_out):,}", f"{total:,}", self.where, left_out[0],
            )  # fmt: skip
        return found


def object_fields(feature: Any) -> dict[str, Any] | None:
    """Return {field: type} for the objects of a column of this type; None if the column has no boxes."""
    fields: Any = None
    if isinstance(feature, List | LargeList) and isinstance(feature.feature, Mapping):
        fields = feature.feature
    elif isinstance(feature, Mapping):
        lists = {name: each for name, each in feature.items() if isinstance(each, List | LargeList)}
        fields = {name: each.feature for name, each in lists.items()}
    if fields is None:
        return None
    name = _first(BOX_NAMES, fields)
    box = None if name is None else fields[name]
    is_box = isinstance(box, List | LargeList) and isinstance(box.feature, Value)
    return dict(fields) if is_box else None


def object_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the names of the columns that contain boxes."""
    return [name for name, feature in features.items() if object_fields(feature) is not None]


def read_objects(dataset: Dataset, column: str, box_format: str, where: str) -> Objects:
    """Return the objects of all rows.

    Args:
        dataset, column: the data set, and a column with boxes.
        box_format: "xywh" or "xyxy".
        where: name of the data set, for messages.

    Raises:
        UserError: a box has a negative size or is not a list of four finite numbers, all boxes lie within two
            pixels, an object has no class, or a class number does not exist.
    """
    check_name("data.box_format", box_format, BOX_FORMATS, " or ".join(BOX_FORMATS))
    fields = object_fields(dataset.features[column])
    assert fields is not None
    key, class_key, crowd_key = (_first(names, fields) for names in (BOX_NAMES, CLASS_NAMES, CROWD_NAMES))
    names = [name for name in (key, class_key, crowd_key) if name is not None]
    # In parts, because other fields, such as polygons, can be large.
    parts = dataset.select_columns([column]).with_format(None).iter(_ROWS_AT_ONCE)
    tables = [_lists(row, names) for part in parts for row in part[column]]
    boxes = [
        None if table is None else _boxes(table[str(key)], box_format, f"row {row} of {where}")
        for row, table in enumerate(tables)
    ]
    largest = max((float(each.max(initial=0)) for each in boxes if each is not None), default=0)
    if 0 < largest < _LARGEST_SHARE:
        raise UserError(
            f"objects: expected boxes in pixels in {where}, got corners up to {largest:.3g} as {box_format}, "
            f"probably normalized boxes; multiply the column {column} by the width and height of each image"
        )
    for row, table in enumerate(tables):
        counts = {name: len(each) for name, each in (table or {}).items()}
        if len(set(counts.values())) > 1:
            words = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise UserError(
                f"objects: expected one value of each field for an object in row {row} of {where}, got "
                f"{words}; correct the column {column}"
            )
    values = [None if table is None or class_key is None else table[class_key] for table in tables]
    if class_key is None:
        names = [_OBJECT]
        classes = [np.zeros(len(found if found is not None else []), np.int64) for found in boxes]
    else:
        names, classes = _class_numbers(values, fields[class_key], column, where)
    images: list[ImageObjects | None] = []
    dropped = 0
    for found, numbers, table in zip(boxes, classes, tables, strict=True):
        if found is None or table is None:
            images.append(None)
            continue
        crowd = _flags(table[crowd_key] if crowd_key is not None else [0] * len(found), where)
        kept = (found[:, 2:] > found[:, :2]).all(axis=1)
        dropped += int((~kept).sum())
        images.append(ImageObjects(found[kept], numbers[kept], crowd[kept]))
    if dropped:
        logger.warning("%d boxes of %s are left out, because their width or height is 0", dropped, where)
    return Objects(images, names, box_format, where)


def _first(names: Sequence[str], fields: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in fields), None)


def _lists(row: Any, names: list[str]) -> dict[str, list[Any]] | None:
    """Return the fields of the objects of a row as lists; None if the row has no value."""
    if row is None:
        return None
    if isinstance(row, Mapping):
        return {name: list(row[name] or []) for name in names}
    return {name: [None if each is None else each[name] for each in row] for name in names}


def _boxes(given: list[Any], box_format: str, where: str) -> np.ndarray:
    """Return checked boxes (O, 4) float32 [x1, y1, x2, y2]."""
    if not given:
        return np.zeros((0, 4), np.float32)
    if any(box is None or len(box) != 4 or None in box for box in given):
        raise UserError(
            f"objects: expected boxes of four numbers in {where}, got another box; correct the column"
        )
    boxes = np.array(given, np.float32)
    if box_format == "xywh":
        sizes = boxes[:, 2:].copy()
        boxes[:, 2:] += boxes[:, :2]
    else:
        sizes = boxes[:, 2:] - boxes[:, :2]
    wrong = ~np.isfinite(boxes).all(axis=1) | (sizes < 0).any(axis=1)
    if wrong.any():
        number = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"objects: expected finite boxes of positive width and height in {where}, got {given[number]} as "
            f"{box_format}; correct it, or use data.box_format={'xywh' if box_format == 'xyxy' else 'xyxy'}"
        )
    return boxes


def _flags(given: list[Any], where: str) -> np.ndarray:
    """Return whether each object is a crowd (O,) bool. A missing value is False.

    Args:
        given: the values of a field with a name in `CROWD_NAMES`.
        where: name of the data set, for messages.
    """
    for value in given:
        if value not in (None, 0, 1):  # a text "0" would be true
            raise UserError(
                f"objects: expected 0, 1, true or false as {' or '.join(CROWD_NAMES)} in {where}, got "
                f"{value!r}; correct the column"
            )
    return np.array(given, bool)


def _class_numbers(
    values: list[list[Any] | None], feature: Any, column: str, where: str
) -> tuple[list[str], list[np.ndarray]]:
    """Return the names of the classes, and the class numbers of the objects of each row."""
    flat = [each for row in values if row is not None for each in row]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
        numbers = class_numbers(flat, len(names), f"{column} of {where}")
    else:
        numbers, names = number_classes(flat, f"{column} of {where}")
    if (numbers < 0).any():
        wrong = flat[int(numbers.argmin())]
        raise UserError(
            f"objects: expected a class number from 0 or a name for each object in {column} of {where}, got "
            f"{wrong} beside the {len(names)} classes {', '.join(names[:5])}; correct the column"
        )
    ends = np.cumsum([len(row or []) for row in values], dtype=np.int64)
    return names, np.split(numbers, ends)[: len(values)]
