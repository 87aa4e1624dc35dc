# SPDX-License-Identifier: Apache-2.0
"""Opens images from any place as a Hugging Face data set with one column of encoded images."""

import hashlib
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from textwrap import shorten
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import yaml
from datasets import Dataset, DatasetBuilder, Image, IterableDataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet

from hf_ssl.data.archives import images_in_archives, reads_archives
from hf_ssl.data.builders import open_builder
from hf_ssl.data.class_files import files_with_classes, require_same_classes
from hf_ssl.data.columns import (
    LABEL_NAMES,
    declares_gray,
    find_image_columns,
    find_label_column,
    first_relative_name,
    named_files,
    resolved,
    without_decoding,
)
from hf_ssl.data.config import DataConfig
from hf_ssl.data.digits import digits
from hf_ssl.data.folder import LocalData, find_local_data, select_rows, select_split, split_names
from hf_ssl.data.location import (
    IMAGE,
    TABLES,
    Location,
    damaged_archives_named,
    file_kind,
    fingerprint,
    folder_of_names,
    locate,
    state_of_files,
)
from hf_ssl.data.metadata_files import folders_are_no_classes, report_listed_files
from hf_ssl.data.pixels import ValueRange
from hf_ssl.data.stream_length import length_of_stream, size_of_stream
from hf_ssl.data.unread import ALL, FileCount
from hf_ssl.data.value_range import chosen_range, probed_images
from hf_ssl.errors import UserError, first_line
from hf_ssl.random import permutation, random_rows

logger = logging.getLogger(__name__)

_OPENING_ERRORS = (
    OSError, ValueError, RuntimeError, DatasetsError, EOFError, pa.ArrowException,
    tarfile.TarError, yaml.YAMLError, zipfile.BadZipFile,
)  # fmt: skip
_SHARD_ROWS = 256  # rows of a shard, for data with random access, whose shards may have any size
_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Source:
    """An open set of images.

    Attributes:
        dataset: all columns; the images are not decoded (`{"bytes", "path"}`). A stream has as many shards as
            its files allow (one for each row group of a Parquet file).
        image_column: the column of images.
        label_column: the column of classes; None if labels were not requested.
        streaming: whether `dataset` is an IterableDataset.
        num_rows: number of rows; None for a stream of unknown length.
        revision: the commit on the Hub, or a fingerprint of the local data.
        description: path and split, for messages and cards.
        whole_shards: whether a reader loads whole shards. It does so if reading one row loads the whole shard
            anyway, or if the rows are only file names.
        one_shard: whether a stream is read as one shard, because its shards would contain other rows.
        shard_sizes: sizes of the shards of a stream, in rows or bytes; () if they are not known or equal.
        further_columns: further columns of images, {name: kind} in the order of their names.
        is_listed: whether the fingerprint of `dataset` covers the files of its rows, as for a folder.
        files: files of all splits, for `require_same_classes`.
        folder: where the relative file names in `dataset` start; "" for the working folder.
        count: the files of a local folder, with the reasons why some are not read; else None.
        row_numbers: the numbers of selected rows in the data set; None without a selection.
        value_range: the values of the image column that become black and white (`data.value_range`); None:
            the limits of the type of numbers.
        is_gray: whether the image column declares gray images, see `hf_ssl.data.columns.declares_gray`.
        cache: results of loaders that the next loader of this source uses again, e.g. decoded images.
    """

    dataset: Any  # Dataset, IterableDataset or `hf_ssl.data.adapters.Items`
    image_column: str
    label_column: str | None
    streaming: bool
    num_rows: int | None
    revision: str
    description: str
    whole_shards: bool = True
    one_shard: bool = False
    shard_sizes: Sequence[int] = field(default=(), repr=False)
    further_columns: dict[str, str] = field(default_factory=dict)
    is_listed: bool = False
    files: Sequence[str] = field(default=(), repr=False)
    folder: str = ""
    count: FileCount | None = None
    row_numbers: np.ndarray | None = field(default=None, repr=False, compare=False)
    value_range: ValueRange | None = None
    is_gray: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the rows of a `Dataset` and of the files that they name, for caches of images.

        The fingerprint of `Dataset` covers only the names of the files. A file may be replaced.
        """
        dataset = cast(Dataset, self.dataset)
        fingerprint = f"{dataset._fingerprint}{'-gray' * self.is_gray}"
        if self.is_listed:
            return fingerprint
        names = named_files(dataset, [self.image_column, *self.further_columns])
        files = [str(resolved(name, self.folder)) for name in names]
        return f"{fingerprint}-{state_of_files(files)}" if files else fingerprint

    def select(self, rows: np.ndarray) -> "Source":
        """Return some rows of map-style data, in the given order."""
        numbers = rows if self.row_numbers is None else self.row_numbers[rows]
        selected = cast(Dataset, self.dataset).select(rows)
        return replace(self, dataset=selected, num_rows=len(rows), row_numbers=numbers, cache={})

    def with_value_range(self, requested: Sequence[float] | str | None) -> "Source":
        """Return the same images with `data.value_range`, which can be "auto"."""
        images = partial(probed_images, self.dataset, self.image_column, self.folder)
        return replace(self, value_range=chosen_range(requested, images, self.description))

    def with_found_range(self, config: DataConfig) -> DataConfig:
        """Return the settings for other images, with the range that "auto" found in these images."""
        return replace(config, value_range=self.value_range)

    def limited(self, count: int | None) -> "Source":
        """Return a fixed random choice of `count` rows, in their order; all rows of a stream or for None."""
        if count is None or self.num_rows is None or self.streaming:
            return self
        return self.select(random_rows(self.num_rows, count, 0))

    def require_rows(self) -> None:
        """Raise UserError if the data are a stream."""
        if self.streaming:
            raise UserError(
                f"{self.description}: expected map-style data, got a stream; load them without streaming"
            )


def label_column(source: Source, config: DataConfig) -> str | None:
    """Return the column of the labels: `data.label_column`, or else the one that `source` found.

    None is possible only for items in Python, whose labels need no name.

    Raises:
        UserError: the errors of `find_label_column`, for data whose columns are known or streamed; or the
            files have different names for one class number.
    """
    column = config.label_column or source.label_column
    known = source.streaming or isinstance(source.dataset, Dataset)
    if known and (column is None or column != source.label_column):
        column = find_label_column(source.dataset.features or {}, column, source.description)
    if column is not None and source.files:
        require_same_classes(source.files, column)
    return column


def open_source(
    config: DataConfig,
    split: str | None = None,
    *,
    streaming: bool | None = None,
    labels: bool = False,
    only_image: bool = False,
) -> Source:
    """Open one split.

    Args:
        config: the images to open.
        split: name of the split; None for `config.split`.
        streaming: whether to open a stream; None for `config.streaming`.
        labels: whether a column of classes is required.
        only_image: whether not to read `config.further_image_columns`, as for evaluations. They are still no
            candidates for the column of images.

    Raises:
        UserError: the path, data set, configuration or split does not exist or cannot be opened; a column
            of images or labels is missing or ambiguous; there are no rows.
    """
    config.check()
    split = config.split if split is None else split
    streaming = config.streaming if streaming is None else streaming
    location = locate(config.path)
    where = f"{config.path} ({split})"
    is_listed = location.kind == "digits"
    found, count = LocalData(), None
    if location.kind == "digits":
        split = "+".join(digits()) if split == ALL else split
        _check_split(list(digits()), split, streaming, config)
        with _as_user_errors(config.path, location):
            opened = _open_table(select_rows(digits(), split), streaming)
        revision = f"scikit-learn {metadata.version('scikit-learn')}"
    else:
        with _as_user_errors(config.path, location):
            whole = split == ALL and location.kind == "local"
            if location.kind == "local":
                found = find_local_data(location, whole)
            split = "train" if whole and (found.images or found.files) else split
            if found.images and config.name is None:
                _check_split(list(found.images), split, streaming, config)
                table, revision = select_split(found.images, split)
                is_listed = True
                opened = _open_table(_shuffled(table) if streaming else table, streaming)
            else:
                with damaged_archives_named(lambda: found.paths):
                    opened, revision = _open_with_datasets(location, config, found, split, streaming)
    features = opened.dataset.features
    if features is None:
        raise UserError(
            f"data.streaming: expected a stream with known columns, got {where}, whose columns are not "
            "declared; use data.streaming=false"
        )
    if found.count is not None:
        count = found.count.for_split(split, split_names(split), opened.num_rows)
    image_column, further = find_image_columns(features, config, where, only_image=only_image)
    usual = config.label_column is not None or bool(features.keys() & set(LABEL_NAMES))
    described = () if usual else found.files.get(split, ())
    with folders_are_no_classes(described):
        column = find_label_column(features, config.label_column, where) if labels else None
    if opened.num_rows == 0:
        raise UserError(f"data.path: expected images, got no rows in {where}; choose another split")
    dataset = without_decoding(opened.dataset, image_column, *further)
    rows = length_of_stream(opened.num_rows, config.num_images, where) if streaming else opened.num_rows
    with _as_user_errors(config.path, location):  # reads the first row of a stream
        folder = _folder_of_names(dataset, [image_column, *further], found, split)
    if location.kind == "local" and not is_listed and isinstance(dataset, Dataset):
        names = named_files(dataset, [image_column, *further])
        revision = _with_named_files(revision, names, folder, found)
    source = Source(
        dataset=dataset,
        image_column=image_column,
        label_column=column,
        streaming=streaming,
        num_rows=rows,
        revision=revision,
        description=where,
        whole_shards=opened.whole_shards,
        shard_sizes=opened.shard_sizes,
        further_columns=further,
        is_listed=is_listed,
        files=opened.files,
        folder=folder,
        count=count,
        is_gray=declares_gray(features[image_column]),
    )
    with _as_user_errors(config.path, location):  # reads some images
        source = source.with_value_range(config.value_range)
    return source.limited(config.max_images)


def _folder_of_names(dataset: Any, columns: list[str], found: LocalData, split: str) -> str:
    """Return `Source.folder` for local tables; "" for all other data."""
    named = [file for name in split_names(split) for file in found.files.get(name, ())]
    tables = [file for file in named or found.searched if file.lower().endswith(TABLES)]
    name = first_relative_name(dataset, columns) if tables else None
    if name is None:
        return ""
    stored = named_files(dataset, columns) if isinstance(dataset, Dataset) else []
    others = (each for each in stored if "://" not in each and not os.path.isabs(each))
    return folder_of_names([name, *others], tables)


class _Opened(NamedTuple):
    """A data set with its number of rows (if known); see `Source` for the other attributes."""

    dataset: Dataset | IterableDataset
    num_rows: int | None
    whole_shards: bool = True
    files: Sequence[str] = ()
    shard_sizes: Sequence[int] = ()


def _open_with_datasets(
    location: Location, config: DataConfig, found: LocalData, split: str, streaming: bool
) -> tuple[_Opened, str]:
    """Open the data through `datasets`; return them and their revision."""
    builder = open_builder(location, config, found)
    known = builder.config.data_files or builder.info.splits
    names = [str(name) for name in known] if known else []
    if split == ALL and names:  # a stream of several splits is an error
        split = "+".join(names)
    _check_split(names, split, streaming, config)
    if streaming:
        opened = _open_stream(builder, split, config.num_images)
    else:
        opened = _open_table(_prepare(builder, split), False)
    opened = opened._replace(files=files_with_classes(builder.config.data_files or {}))
    images = sum(file_kind(file) == IMAGE for file in found.files.get(split, ()))
    if images and opened.num_rows is not None:
        report_listed_files(opened.dataset, opened.num_rows, images, config.path)
    return opened, str(builder.hash) if location.kind == "hub" else _fingerprint(builder, split)


class UnknownSplit(UserError):
    """A split does not exist.

    Attributes:
        splits: the names of the existing splits.
        path: path of the data.
        split: the unknown name.
    """

    def __init__(self, splits: list[str], path: str, split: str, key: str, advice: str) -> None:
        self.splits, self.path, self.split = splits, path, split
        names = ", ".join(splits)
        super().__init__(f"{key}: expected one of the splits {names} of {path}, got {split!r}; use {advice}")


def _with_named_files(revision: str, names: list[str], folder: str, found: LocalData) -> str:
    """Return a revision that also covers the files that the rows of `found` name, as of a Parquet file."""
    named = {os.path.abspath(str(resolved(name, folder))) for name in names if "://" not in name}
    files = sorted(named.difference(found.paths))
    if not files:
        return revision
    return hashlib.blake2b(f"{revision} {fingerprint(files)}".encode(), digest_size=8).hexdigest()


def _check_split(names: list[str], split: str, streaming: bool, config: DataConfig) -> None:
    """Raise UserError if a split does not exist, or if a stream needs a part or a sum of splits."""
    unknown = [name for name in split_names(split) if names and name not in names]
    if unknown:
        # If `split` differs from `config.split`, a caller chose it, which may know the key of the user.
        of_user = split == config.split
        of_data = "data.split", f"data.split={names[0]}, or data.split={ALL}"
        key, advice = of_data if of_user else ("split", names[0])
        raise UnknownSplit(names, config.path, unknown[0], key, advice)
    if streaming and split_names(split) != [split]:
        raise UserError(
            f"data.split: expected one whole split of {config.path} for a stream, got {split!r}; use "
            "data.streaming=false"
        )


def _prepare(builder: DatasetBuilder, split: str) -> Dataset:
    builder.download_and_prepare()
    splits = cast("dict[str, Dataset]", builder.as_dataset())
    table = select_rows(splits, "+".join(map(str, splits)) if split == ALL else split)
    return images_in_archives(table, splits) if reads_archives(builder) else table


def _open_table(table: Dataset, streaming: bool) -> _Opened:
    """Return data with random access, or a stream of them in shards of `_SHARD_ROWS` rows."""
    shards = max(1, len(table) // _SHARD_ROWS)
    return _Opened(table.to_iterable_dataset(num_shards=shards) if streaming else table, len(table))


def _open_stream(builder: DatasetBuilder, split: str, num_images: int | None) -> _Opened:
    if isinstance(builder, FolderBasedBuilder):
        return _open_table(_shuffled(_file_list(builder, split)), True)
    if isinstance(builder, Cache):  # the Hub cannot be reached, but the data set was downloaded before
        return _open_table(_prepare(builder, split), True)
    stream = cast(IterableDataset, builder.as_streaming_dataset(split))
    rows, sizes = size_of_stream(builder, split, num_images)
    return _Opened(stream.reshard(), rows, isinstance(builder, Parquet), shard_sizes=sizes)


def _file_list(builder: FolderBasedBuilder, split: str) -> Dataset:
    """Return a folder of images as a table of files; each file is read only when it is needed.

    `datasets` streams a folder as one shard in the order of the file names, so class by class. Such a stream
    can be neither shuffled nor divided.
    """
    files = [str(file) for file in (builder.config.data_files or {})[split]]
    images = [file for file in files if file_kind(file) == IMAGE]
    others = {os.path.splitext(file)[1].lower() for file in files} - set(builder.EXTENSIONS)
    if "://" in files[0] and not others:  # on the Hub, without an archive or other columns
        return Dataset.from_dict({"image": images}).cast_column("image", Image(decode=False))
    return _prepare(builder, split)


def _shuffled(table: Dataset) -> Dataset:
    return Dataset(table.with_format("arrow")[:].take(permutation(len(table), 0)), info=table.info)


def _fingerprint(builder: DatasetBuilder, split: str) -> str:
    data_files = builder.config.data_files or {}
    return fingerprint([str(file) for name in split_names(split) for file in data_files[name]])


@contextmanager
def _as_user_errors(path: str, location: Location) -> Iterator[None]:
    """Turn the errors of `datasets` about data that it cannot find, reach or read into a UserError."""
    try:
        yield
    except _OPENING_ERRORS as error:
        if isinstance(error, UserError):
            raise
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = first_line(cause or error).rstrip(".")
        if location.kind == "hub":
            expected = "a folder or a data set on the Hub"
        else:
            expected = "Parquet files, images or WebDataset tars"
        raise UserError(
            f"data.path: expected {expected}, got {path!r}, which cannot be opened: "
            f"{shorten(reason, _REASON_CHARACTERS, placeholder=' ...')}; check the path and the split"
        ) from error
