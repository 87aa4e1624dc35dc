# SPDX-License-Identifier: Apache-2.0
"""Reads the labels of all rows of a source."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from datasets import Dataset

from hf_ssl.data.boxes import Objects, object_columns, read_objects
from hf_ssl.data.columns import label_values
from hf_ssl.data.config import DataConfig
from hf_ssl.data.sources import Source, label_column
from hf_ssl.data.targets import CLASS_KINDS, SelectedRows, find_targets, uses_classes
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabeledRows:
    """Rows with labels. `hf_ssl.data.labeled.LabeledImages` describes the fields."""

    source: Source
    labels: np.ndarray
    class_names: list[str]
    targets: dict[str, Sequence[Any]]
    objects: Objects | None

    def select(self, rows: np.ndarray) -> "LabeledRows":
        """Return some rows, in the given order."""
        targets: dict[str, Sequence[Any]] = {
            kind: SelectedRows(each, rows) for kind, each in self.targets.items()
        }
        objects = None if self.objects is None else self.objects.select(rows)
        return LabeledRows(self.source.select(rows), self.labels[rows], self.class_names, targets, objects)


def only_classes(kinds: Collection[str]) -> bool:
    """Return whether all requested kinds of labels are classes, so that the images must have classes."""
    return set(kinds) <= set(CLASS_KINDS)


def read_labels(source: Source, config: DataConfig, kinds: Collection[str] = CLASS_KINDS) -> LabeledRows:
    """Return the rows of a source of map-style data that have a label. Log a warning if some rows have none.

    `hf_ssl.data.adapters.Items.labels` explains the labels of a data set in Python.

    Args:
        source: the images.
        config: has `label_column`, `mask_column` and `box_format`.
        kinds: kinds of labels from `CLASS_KINDS` and `TARGETS` in `hf_ssl.data.targets`. The images need at
            least one of them. If they have no classes, or if no requested kind is one of `CLASS_KINDS`,
            `labels` has the shape (N, 0).

    Raises:
        UserError: the source is a stream or has no labels.
    """
    source.require_rows()
    targets, objects = find_targets(source, config, kinds), None
    labels = np.zeros((len(source.dataset), 0), np.int64)
    class_names: list[str] = []
    if uses_classes(kinds):  # otherwise, images without a class are also used
        try:
            if targets and not isinstance(source.dataset, Dataset):
                # The second part of an item may be a mask. One item is enough to find out.
                _class_labels(source.select(np.arange(1)), config, kinds)
            labels, class_names, objects = _class_labels(source, config, kinds)
        except UserError:
            if not targets or config.label_column is not None:
                raise
    chosen = np.flatnonzero(labels >= 0 if labels.ndim == 1 else (labels >= 0).all(axis=1))
    if not len(chosen):
        raise UserError(
            f"data.label_column: expected a label from 0 for some images of {source.description}, got "
            "none; use another split or column"
        )
    found = LabeledRows(source, labels, class_names, targets, objects)
    if len(chosen) == len(labels):
        return found
    # `datasets` (seen with 5.2) reads these texts in CSV files as missing values, also if they name a class
    # (github.com/huggingface/datasets/issues/4467).
    logger.warning(
        "%d of %d images in %s have no label and are not used; an empty text means no label, and so do the "
        "texts NA, None, nan and null in a CSV file, so rename a class with such a name",
        len(labels) - len(chosen), len(labels), source.description,
    )  # fmt: skip
    return found.select(chosen)


def _class_labels(
    source: Source, config: DataConfig, kinds: Collection[str]
) -> tuple[np.ndarray, list[str], Objects | None]:
    """Return the labels of all rows, the names of the classes, and the boxes if the column has some.

    If boxes are the only requested kind of class labels, a single column of boxes takes precedence over
    columns of classes.
    """
    dataset, where = source.dataset, source.description
    if not isinstance(dataset, Dataset):
        return *dataset.labels(label_column(source, config), where), None
    boxes = object_columns(dataset.features)
    only_boxes = config.label_column is None and {*kinds} & {*CLASS_KINDS} == {"boxes"} and len(boxes) == 1
    requested = replace(config, label_column=boxes[0]) if only_boxes else config
    column = cast(str, label_column(source, requested))
    if column in boxes:
        objects = read_objects(dataset, column, config.box_format, where)
        return objects.matrix(), objects.class_names, objects
    return *label_values(dataset, column, where), None
