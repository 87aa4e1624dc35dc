# SPDX-License-Identifier: Apache-2.0
"""Reads the images of map-style data by row number, and decodes them each time (layer 1)."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ssl.data.adapters import as_source
from hf_ssl.data.config import DataConfig
from hf_ssl.data.decode import BrokenImage
from hf_ssl.data.further_columns import AnyStored, decode, further_channels, table_rows
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError
from hf_ssl.progress import progress

logger = logging.getLogger(__name__)

CHUNK = 64  # number of images; even large ones are decoded in a few seconds at most


def broken_message(where: str, image: AnyStored, reason: object) -> str:
    """Return the message about a broken image: its data set and row, its file, and the reason."""
    return f"{where}{f' ({image.path})' if image.path else ''}: {reason}"


class EncodedRows:
    """The images of map-style data, read in batches and decoded each time.

    Args:
        source: the data.
        channels: channels of the image column.

    Attributes:
        channels: channels of the decoded images, with those of the further columns.

    Raises:
        UserError: the source is a stream.
    """

    def __init__(self, source: Source, channels: int) -> None:
        source.require_rows()
        self._items = source.dataset  # of another library than `datasets`
        if isinstance(source.dataset, Dataset):
            columns = [source.image_column, *source.further_columns]
            self._items = source.dataset.select_columns(columns).with_format("arrow")
        self._column, self._further = source.image_column, source.further_columns
        self._image_channels = channels
        self.channels = channels + further_channels(source.further_columns)
        self.description = source.description
        self._row_numbers, self._folder = source.row_numbers, source.folder
        self._value_range, self._is_gray = source.value_range, source.is_gray

    def __len__(self) -> int:
        return len(self._items)

    def describe(self, row: int) -> str:
        """Return the data set and the number of a row, for messages."""
        return f"{self.description} row {row if self._row_numbers is None else self._row_numbers[row]}"

    def stored(self, rows: Sequence[int] | np.ndarray) -> list[AnyStored]:
        """Return the images of rows, as the data set stores them."""
        if isinstance(self._items, Dataset):
            return table_rows(self._items[rows], self._column, self._further, self._folder)
        return [self._items.stored(int(row)) for row in rows]

    def read(self, rows: np.ndarray) -> tuple[list[Tensor], dict[int, str]]:
        """Decode the images of rows (B,).

        Returns:
            images: B tensors (C, H, W) uint8; an empty tensor (C, 0, 0) for a broken image.
            broken: position in `rows` -> message, for each broken image.
        """
        images: list[Tensor] = []
        broken: dict[int, str] = {}
        for position, image in enumerate(self.stored(rows)):
            try:
                channels, values, is_gray = self._image_channels, self._value_range, self._is_gray
                images.append(decode(image.read(), channels, values, is_gray=is_gray))
            except BrokenImage as error:
                broken[position] = broken_message(self.describe(int(rows[position])), image, error)
                images.append(torch.empty(self.channels, 0, 0, dtype=torch.uint8))
        return images, broken


def all_images(source: Source, channels: int, batch_size: int) -> Iterator[list[Tensor]]:
    """Yield all images of map-style data in order, in lists of `batch_size` (C, H, W) uint8 tensors.

    Raises:
        UserError: the source is a stream, or an image is broken.
    """
    rows = EncodedRows(source, channels)
    for start in range(0, len(rows), batch_size):
        images, broken = rows.read(np.arange(start, min(start + batch_size, len(rows))))
        if broken:
            raise UserError(
                f"{source.description}: expected images that can be read, got {next(iter(broken.values()))}; "
                "use hf_ssl.data.without_broken_images(dataset)"
            )
        yield images


def without_broken_images(dataset: Dataset, config: DataConfig | None = None) -> Dataset:
    """Return a data set without the rows whose image cannot be read, and log a warning that names them.

    Training skips such images. `SSLTrainer.predict` raises an error, because its rows must match the data
    set.

    Args:
        dataset: the images.
        config: see `as_source`.

    Raises:
        UserError: `dataset` is not a `datasets.Dataset`, or has no column of images.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}; load the images"
        )
    config = DataConfig.of(config)
    rows = EncodedRows(as_source(dataset, config, "dataset"), config.channels)
    messages: dict[int, str] = {}
    with progress("reading all images", len(rows)) as bar:
        for start in range(0, len(rows), CHUNK):
            numbers = np.arange(start, min(start + CHUNK, len(rows)))
            messages |= {start + at: message for at, message in rows.read(numbers)[1].items()}
            bar.update(len(numbers))
    if messages:
        named = "; ".join(list(messages.values())[:5])
        logger.warning("left out %d of %d images: %s", len(messages), len(rows), named)
    return dataset.select([row for row in range(len(rows)) if row not in messages])
