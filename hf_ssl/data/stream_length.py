# SPDX-License-Identifier: Apache-2.0
"""Counts the images of a stream. Without their number, no epoch is known."""

import os
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ssl.data.tars import count_samples
from hf_ssl.errors import UserError
from hf_ssl.progress import progress


class StreamSize(NamedTuple):
    """The size of a stream.

    Attributes:
        rows: number of rows; None if it is not known.
        shards: a size of each shard, in rows or bytes; () if they are not known.
    """

    rows: int | None = None
    shards: Sequence[int] = ()


def size_of_stream(builder: DatasetBuilder, split: str, given: int | None) -> StreamSize:
    """Return the size of a stream.

    Local files contain the number of rows, and the card of a data set on the Hub can contain it. For tars,
    this function reads the headers of all members, unless the number is given.

    Args:
        builder: the data set.
        split: name of the split.
        given: `data.num_images`.

    Raises:
        UserError: a local tar is damaged.
    """
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    if any("://" in file for file in files):
        splits = builder.info.splits or {}
        return StreamSize(splits[split].num_examples or None if split in splits else None)
    try:
        if isinstance(builder, Parquet):
            rows = [rows for file in files for rows in _parquet_rows(file)]
        elif isinstance(builder, Arrow):
            rows = list(map(_arrow_rows, files))
        elif isinstance(builder, WebDataset) and given is None:
            with progress(f"counting the images of {len(files)} tars (data.num_images=N skips this)"):
                rows = list(map(count_samples, files))
        else:
            return StreamSize(shards=list(map(os.path.getsize, files)))
    except (OSError, pa.ArrowException, tarfile.TarError):  # the reader of the stream reports the file
        return StreamSize()
    return StreamSize(sum(rows), rows)


def length_of_stream(counted: int | None, given: int | None, where: str) -> int | None:
    """Return the number of images of a stream, counted or given (`data.num_images`), or None.

    Raises:
        UserError: both are known and differ.
    """
    if None not in (counted, given) and counted != given:
        raise UserError(
            f"data.num_images: expected {counted}, the number of images in {where}, got {given}; leave it out"
        )
    return given if counted is None else counted


def arrow_reader(opened: pa.MemoryMappedFile) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    """Return a reader of an Arrow file, which can have the format of streams or of files."""
    try:
        return pa.ipc.open_stream(opened)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(opened)


def _parquet_rows(file: str) -> list[int]:
    """Return the number of rows of each row group of a Parquet file."""
    metadata = pq.read_metadata(file)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _arrow_rows(file: str) -> int:
    """Return the number of rows of an Arrow file. It is mapped into memory, so no column is read."""
    with pa.memory_map(file) as opened:
        reader = arrow_reader(opened)
        if isinstance(reader, pa.RecordBatchFileReader):
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
        return sum(batch.num_rows for batch in reader)
