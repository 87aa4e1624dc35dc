# SPDX-License-Identifier: Apache-2.0
"""Counts the images of a stream. Without their number, no epoch is known."""

import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ssl.data.tars import count_samples
from hf_ssl.errors import UserError
from hf_ssl.progress import progress


def count_streamed(builder: DatasetBuilder, split: str, given: int | None) -> int | None:
    """Return the number of rows of a stream, or None.

    Local files contain the number, and the card of a data set on the Hub can contain it. For tars, this
    function reads the headers of all members, unless the number is given.

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
        return splits[split].num_examples or None if split in splits else None
    try:
        if isinstance(builder, Parquet):
            return sum(pq.read_metadata(file).num_rows for file in files)
        if isinstance(builder, Arrow):
            return sum(map(_arrow_rows, files))
        if isinstance(builder, WebDataset) and given is None:
            with progress(f"counting the images of {len(files)} tars (data.num_images=N skips this)"):
                return sum(map(count_samples, files))
    except (OSError, pa.ArrowException, tarfile.TarError):  # the reader of the stream reports the file
        return None
    return None


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


def _arrow_rows(file: str) -> int:
    """Return the number of rows of an Arrow file. It is mapped into memory, so no column is read."""
    with pa.memory_map(file) as opened:
        reader = arrow_reader(opened)
        if isinstance(reader, pa.RecordBatchFileReader):
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
        return sum(batch.num_rows for batch in reader)
