# SPDX-License-Identifier: Apache-2.0
"""The kinds of labels of images: classes, and targets such as masks, which have one item for each image.

A new kind of targets is one file and one line in `TARGETS`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from hf_ssl.data.config import DataConfig
from hf_ssl.data.masks import find_masks
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError

CLASS_KINDS = ("one", "several", "boxes")
"""Kinds of class labels: one class of each image, several, or boxes with classes."""

TARGETS: dict[str, Callable[[Source, DataConfig], Any]] = {"masks": find_masks}
"""Kind of targets -> function that returns the targets of a source, a sequence with one item for each row.

The function raises UserError if the source has none. The items are read when they are requested.
"""


class SelectedRows(Sequence[Any]):
    """Some rows of targets, in the given order, which are read when they are requested.

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
        kinds: the wanted kinds of labels, of `CLASS_KINDS` and `TARGETS`.

    Raises:
        UserError: classes are not among the wanted kinds, and the source has no targets of any wanted kind.
    """
    found: dict[str, Sequence[Any]] = {}
    errors = []
    for kind in (kind for kind in TARGETS if kind in kinds):
        try:
            found[kind] = TARGETS[kind](source, config)
        except UserError as error:
            errors.append(error)
    if errors and not found and not set(kinds) & set(CLASS_KINDS):
        raise errors[0]
    return found
