# SPDX-License-Identifier: Apache-2.0
"""The rule for class labels of columns, lists, boxes, streams and items: int64, or -1 for a missing label."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_ssl.errors import UserError


def class_name(text: str) -> str:
    """Return a class name in the Unicode form NFC, without spaces at its ends.

    macOS and Linux can store the same name of a folder in different Unicode forms (NFD and NFC). These forms
    would be two classes, and so would `cat` and ` cat` in a table.
    """
    return unicodedata.normalize("NFC", text).strip()


def class_numbers(values: Sequence[Any], count: int, where: str, *, missing: bool = True) -> np.ndarray:
    """Return the class numbers (N,) int64 of a column that declares its classes.

    Args:
        values: N whole numbers. None or a negative number marks a missing label.
        count: number of classes.
        where: name of the data set, for messages.
        missing: whether labels can be missing. They become -1.

    Raises:
        UserError: a number is not below `count`, or a label is missing although `missing` is False.
    """
    labels = np.array([-1 if value is None else value for value in values], np.int64).clip(-1)
    wrong = (labels >= count) | ((labels < 0) & (not missing))
    if wrong.any():
        given = values[int(wrong.argmax())]
        raise UserError(
            f"{where}: expected class numbers from 0 to {count - 1}, got {given}; correct the column"
        )
    return labels


def number_classes(values: Sequence[Any], where: str) -> tuple[np.ndarray, list[str]]:
    """Return labels (N,) int64, -1 for a missing one, and the names of the classes in sorted order.

    Args:
        values: numbers, also in tensors and arrays, and texts. None, NaN, an empty text or a negative number
            marks a missing label.
        where: name of the data set, for messages.

    Raises:
        UserError: a label is something else.
    """
    checked = [_class(value, where) for value in values]
    known = np.array([value is not None for value in checked], bool)
    present = [value for value in checked if value is not None]
    classes, positions = np.unique(np.asarray(present), return_inverse=True)
    labels = np.full(len(checked), -1, np.int64)
    labels[known] = positions
    return labels, [str(value) for value in classes]


def _class(label: Any, where: str) -> int | str | None:
    """Return a class number or a name; None for a missing label."""
    if isinstance(label, Tensor | np.ndarray | np.generic) and len(label.reshape(-1)) == 1:
        label = label.item()
    if label is None or isinstance(label, bool):
        return label
    if isinstance(label, str):
        return class_name(label) or None
    if isinstance(label, float) and (math.isnan(label) or label.is_integer()):
        label = -1 if math.isnan(label) else int(label)
    if isinstance(label, int):
        return int(label) if label >= 0 else None
    raise UserError(
        f"{where}: expected whole numbers or texts as labels, got {label!r}; return one class for each image"
    )


def matching_numbers(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the number (K,) int64 of each class name in other classes, -1 for a class that is not there."""
    known = {class_name(name): number for number, name in enumerate(classes)}
    return np.array([known.get(class_name(name), -1) for name in names], np.int64)
