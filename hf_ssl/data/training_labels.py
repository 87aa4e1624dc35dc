# SPDX-License-Identifier: Apache-2.0
"""The labels of training images. Only the online probe uses them; methods do not."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from hf_ssl.data.batch import LoadedBatch
from hf_ssl.data.columns import label_values
from hf_ssl.data.config import DataConfig
from hf_ssl.data.sources import Source, label_column
from hf_ssl.errors import UserError

_ADVICE = "set data.label_column=NAME, or training.online_probe=false"


@dataclass(frozen=True)
class TrainingLabels:
    """The labels of training images.

    Attributes:
        class_names: names of the classes; label i has the name at index i.
        by_row: (N,) int64, the label of each row of map-style data, -1 for a row without a label; None for a
            stream.
        stream_column: the column of labels that the loader of a stream must read; None for map-style data.
    """

    class_names: list[str]
    by_row: Tensor | None = None
    stream_column: str | None = None

    def of(self, batch: LoadedBatch) -> Tensor:
        """Return the labels (B,) int64 of a batch, -1 for images without a label."""
        if self.by_row is None:
            return cast(Tensor, batch.labels)
        return self.by_row[cast(Tensor, batch.sample_index)]


def training_labels(source: Source, config: DataConfig) -> TrainingLabels:
    """Return the labels of training images.

    Args:
        source: the training images.
        config: `label_column`, see `hf_ssl.data.sources.label_column`.

    Raises:
        UserError: there are no labels, an image can have several labels, or a stream does not declare its
            classes.
    """
    where = source.description
    try:
        column = label_column(source, config)
        if not source.streaming and not isinstance(source.dataset, Dataset):
            labels, names = source.dataset.labels(column, where)
    except UserError as error:
        if config.label_column is not None:
            raise
        raise _no_labels(where) from error
    if not source.streaming:
        if isinstance(source.dataset, Dataset):
            labels, names = label_values(source.dataset, cast(str, column), where)
        return _of_rows(labels, names, where)
    feature = (source.dataset.features or {}).get(column)
    if not isinstance(feature, ClassLabel) or not feature.names:
        raise UserError(
            f"training.online_probe: expected a column of the type ClassLabel in the stream {where}, got "
            f"{column} without class names; use data.streaming=false, or cast the column"
        )
    return TrainingLabels(list(feature.names), stream_column=column)


def _of_rows(labels: Any, names: list[str], where: str) -> TrainingLabels:
    if labels.ndim != 1:
        raise UserError(
            f"training.online_probe: expected one class for each image of {where}, got lists of classes; use "
            "another data.label_column, or training.online_probe=false"
        )
    if not (labels >= 0).any():
        raise _no_labels(where)
    return TrainingLabels(names, torch.from_numpy(labels))


def _no_labels(where: str) -> UserError:
    return UserError(
        f"training.online_probe: expected one column of labels for training, got none or several in "
        f"{where}; {_ADVICE}"
    )
