# SPDX-License-Identifier: Apache-2.0
"""Class names that data sets in Python declare: those of torchvision, lightly, timm and `datasets`.

The same class can have different numbers in two data sets. For example, `ImageFolder` of torchvision numbers
the classes of one folder, so the numbers change if a folder lacks a class.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from torch.utils.data import ConcatDataset, Subset


def named_classes(data: Any, values: np.ndarray, column: str | None) -> tuple[np.ndarray, list[str]] | None:
    """Return the labels (N,) int64 and the class names of a data set that declares its classes.

    The parts of a `ConcatDataset` can declare different classes. The result then has the classes of all
    parts.

    Args:
        data: N items.
        values: (N,) the class numbers of the items; -1 for a missing label, which stays -1.
        column: the key of the label in each item, if the items are dicts.

    Returns:
        None if a part declares no classes, or not the class of one of its items.
    """
    parts, part_of_row = _parts(data)
    used = {number: _declared(parts[number], column) for number in np.unique(part_of_row).tolist()}
    if not used or not all(used.values()):
        return None
    ordered = (name for names in used.values() for _, name in sorted((names or {}).items()))
    places = {name: place for place, name in enumerate(dict.fromkeys(ordered))}
    tables = {
        part: {-1: -1} | {number: places[name] for number, name in (names or {}).items()}
        for part, names in used.items()
    }
    pairs = zip(part_of_row.tolist(), values.tolist(), strict=True)
    labels = [tables[part].get(value) for part, value in pairs]
    return None if None in labels else (np.array(labels, np.int64), list(places))


def _parts(data: Any) -> tuple[list[Any], np.ndarray]:
    """Return the data sets that `Subset` and `ConcatDataset` join, and the number of that of each row."""
    if type(data).__name__ == "LightlyDataset":
        return _parts(data.dataset)
    if isinstance(data, Subset):
        parts, part_of_row = _parts(data.dataset)
        return parts, part_of_row[np.array([int(row) for row in data.indices], np.int64)]
    if isinstance(data, ConcatDataset):
        parts, numbers = [], []
        for each in data.datasets:
            found, part_of_row = _parts(each)
            numbers.append(part_of_row + len(parts))
            parts += found
        return parts, np.concatenate(numbers)
    return [data], np.zeros(len(data), np.int64)


def _declared(data: Any, column: str | None) -> dict[int, str] | None:
    """Return the name of each class number, or None if the names are not known or not unique."""
    if isinstance(data, Dataset):
        feature = data.features.get(column)
        return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    if getattr(data, "target_transform", None) is not None:
        return None
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None)  # timm has a reader
    if isinstance(numbers, Mapping) and len({*numbers.values()}) == len(numbers):
        return {int(number): str(name) for name, number in numbers.items()}
    names = getattr(data, "classes", None)
    if not isinstance(names, list | tuple):
        return None
    # The names of ImageNet in torchvision are tuples of synonyms.
    texts = [", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names]
    return dict(enumerate(texts)) if len({*texts}) == len(texts) else None
