# SPDX-License-Identifier: Apache-2.0
"""The kinds of labels of images: classes, and targets (one item for each image, such as its mask).

A new kind of targets needs one file and one line in `TARGETS`.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_ssl.data.config import DataConfig
from hf_ssl.data.masks import find_masks
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError

CLASS_KINDS = ("one", "several", "boxes")
"""Kinds of class labels: one class for each image, several classes, or boxes with classes."""


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
