# SPDX-License-Identifier: Apache-2.0
"""Opens a set of images, wherever it is, as a Hugging Face data set with one column of encoded images."""

import logging
import os
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow.parquet as pq
import yaml
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    Image,
    IterableDataset,
    load_dataset_builder,
)
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet

from hf_ssl.data.columns import find_image_column, find_label_column
from hf_ssl.data.config import DataConfig
from hf_ssl.data.digits import digits
from hf_ssl.data.folder import Contents, contents, images_of
from hf_ssl.data.location import IMAGE, Location, fingerprint, kind_of, locate
from hf_ssl.data.ordering import permutation
from hf_ssl.data.splits import split_names
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_OPENING_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError, yaml.YAMLError)
_SHARD_ROWS = 256  # of data that can be read anywhere and are therefore cut as we like


@dataclass(frozen=True)
class Source:
    """Images that can be read.

    Attributes:
        dataset: with all its columns; images are not decoded (`{"bytes", "path"}`). A stream is cut into as
            many shards as its files allow (Parquet: one for each row group).
        image_column: where the images are.
        label_column: where the classes are, if they were asked for.
        class_names: of a ClassLabel column, if labels were asked for.
        streaming: whether `dataset` is an IterableDataset.
        num_rows: None where a stream does not say.
        revision: the commit on the Hub, else a fingerprint of the data.
        description: path and split, for messages and cards.
        whole_shards: reading one row of a shard brings the whole shard into memory anyway, or costs nothing.
        numbers: of the rows in the data set that some were chosen from.
        stores: what loaders over this source find out or decode, kept for the next one.
    """

    dataset: Dataset | IterableDataset
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    streaming: bool
    num_rows: int | None
    revision: str
    description: str
    whole_shards: bool = True
    numbers: np.ndarray | None = field(default=None, repr=False, compare=False)
    stores: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def choose(self, rows: np.ndarray) -> "Source":
        """Some rows of map-style data, in this order."""
        numbers = rows if self.numbers is None else self.numbers[rows]
        chosen = cast(Dataset, self.dataset).select(rows)
        return replace(self, dataset=chosen, num_rows=len(rows), numbers=numbers, stores={})


def open_source(
    config: DataConfig, split: str | None = None, *, streaming: bool | None = None, labels: bool = False
) -> Source:
    """Opens one split.

    Args:
        config: says where the images are.
        split: None for `config.split`.
        streaming: None for `config.streaming`.
        labels: whether a column of classes is needed.

    Raises:
        UserError: no such path, data set, configuration or split; it cannot be reached; no or several columns
            to choose from; no rows.
    """
    config.check()
    split = config.split if split is None else split
    streaming = config.streaming if streaming is None else streaming
    location = locate(config.path)
    where = f"{config.path} ({split})"
    if location.kind == "digits":
        opened, revision = _digits(split, streaming), f"scikit-learn {metadata.version('scikit-learn')}"
    else:
        with _Explained(config.path, location):
            found = contents(location) if location.kind == "local" else Contents()
            if found.images and config.name is None:
                _check_split(list(found.images), split, streaming, config)
                table, revision = images_of(found.images, split)
                opened = _cut(_shuffled(table)) if streaming else _mapped(table)
            else:
                opened, revision = _built(location, config, found, split, streaming)
    dataset = opened.dataset
    features = dataset.features
    if features is None:
        raise UserError(f"the columns of {where} are not known before it is read: use data.streaming=false")
    image_column = find_image_column(features, config.image_column, where)
    label_column = find_label_column(features, config.label_column, where) if labels else None
    if isinstance(features[image_column], Image):
        dataset = dataset.cast_column(image_column, Image(decode=False))
    if opened.num_rows == 0:
        raise UserError(f"there are no images in {where}")
    source = Source(
        dataset=dataset,
        image_column=image_column,
        label_column=label_column,
        class_names=_class_names(features[label_column]) if label_column is not None else None,
        streaming=streaming,
        num_rows=opened.num_rows,
        revision=revision,
        description=where,
        whole_shards=opened.whole_shards,
    )
    if config.max_images is None or opened.num_rows is None or streaming:
        return source
    return source.choose(np.sort(permutation(opened.num_rows, 0)[: config.max_images]))


class _Opened(NamedTuple):
    dataset: Dataset | IterableDataset
    num_rows: int | None
    whole_shards: bool


def _built(
    location: Location, config: DataConfig, found: Contents, split: str, streaming: bool
) -> tuple[_Opened, str]:
    """Open the data through `datasets`; return them and their revision."""
    builder = _builder(location, config, found)
    known = builder.config.data_files or builder.info.splits
    _check_split([str(name) for name in known] if known else [], split, streaming, config)
    opened = _stream(builder, split) if streaming else _mapped(_table(builder, split))
    images = sum(kind_of(file) == IMAGE for file in found.files.get(split, ()))
    if opened.num_rows is not None and opened.num_rows < images:
        logger.warning(
            "%d of %d images in %s are not used, because a metadata file in the folder does not name them",
            images - opened.num_rows, images, config.path,
        )  # fmt: skip
    return opened, str(builder.hash) if location.kind == "hub" else _fingerprint(builder, split)


_last_builder: dict[tuple, tuple[Contents, DatasetBuilder]] = {}
"""The builder of the local data that were opened last. The next split of these data reuses it."""


def _builder(location: Location, config: DataConfig, found: Contents) -> DatasetBuilder:
    if location.kind == "hub":
        return load_dataset_builder(location.loader, name=config.name, revision=config.revision)
    options: dict[str, Any] = {"name": config.name}
    state: tuple = (id(found),)  # does not change as long as the folder does not change
    if found.files and config.name is None:
        options["data_files"] = DataFilesDict(
            {
                name: DataFilesList(files, [(str(os.stat(file).st_mtime),) for file in files])
                for name, files in found.files.items()
            }
        )
        state = tuple((*files, *files.origin_metadata) for files in options["data_files"].values())
    key = (location.loader, config.name, datasets.config.HF_DATASETS_CACHE, state)
    if key not in _last_builder:
        builder = load_dataset_builder(location.loader, **options)
        _last_builder.clear()
        _last_builder[key] = (found, builder)
    return _last_builder[key][1]


def _check_split(names: list[str], split: str, streaming: bool, config: DataConfig) -> None:
    unknown = [name for name in split_names(split) if names and name not in names]
    if unknown:
        choice = f"; use data.split={names[0]}" if split == config.split else ""
        raise UserError(
            f"expected one of the splits {', '.join(names)} of {config.path}, got {unknown[0]!r}{choice}"
        )
    if streaming and split_names(split) != [split]:
        raise UserError(
            f"expected one whole split of {config.path} to stream, got {split!r}; use data.streaming=false"
        )


def _table(builder: DatasetBuilder, split: str) -> Dataset:
    builder.download_and_prepare()
    return cast(Dataset, builder.as_dataset(split))


def _mapped(table: Dataset) -> _Opened:
    return _Opened(table, len(table), True)


def _cut(table: Dataset) -> _Opened:
    """A stream of data that can be read anywhere, in as many shards as we like."""
    shards = max(1, len(table) // _SHARD_ROWS)
    return _Opened(table.to_iterable_dataset(num_shards=shards), len(table), True)


def _stream(builder: DatasetBuilder, split: str) -> _Opened:
    if isinstance(builder, FolderBasedBuilder):
        return _cut(_shuffled(_file_list(builder, split)))
    if isinstance(builder, Cache):  # the Hub is out of reach, but the data set was downloaded before
        return _cut(_table(builder, split))
    stream = cast(IterableDataset, builder.as_streaming_dataset(split))
    return _Opened(stream.reshard(), _streamed_rows(builder, split), isinstance(builder, Parquet))


def _streamed_rows(builder: DatasetBuilder, split: str) -> int | None:
    """How many rows a stream has, if its files or the card on the Hub tell."""
    files = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
    if isinstance(builder, Parquet) and not any("://" in file for file in files):
        return sum(pq.read_metadata(file).num_rows for file in files)
    splits = builder.info.splits if any("://" in file for file in files) else None
    return splits[split].num_examples or None if splits is not None and split in splits else None


def _file_list(builder: FolderBasedBuilder, split: str) -> Dataset:
    """A folder of images as a list of files, each of which is read only when it is needed.

    `datasets` streams a folder as one shard in the order of the file names, thus class by class, which can be
    neither mixed nor divided.
    """
    files = [str(file) for file in (builder.config.data_files or {})[split]]
    images = [file for file in files if os.path.splitext(file)[1].lower() in builder.EXTENSIONS]
    if "://" in files[0] and len(images) == len(files):  # on the Hub, without an archive or other columns
        return Dataset.from_dict({"image": images}).cast_column("image", Image(decode=False))
    return _table(builder, split)


def _shuffled(table: Dataset) -> Dataset:
    return Dataset(table.with_format("arrow")[:].take(permutation(len(table), 0)), info=table.info)


def _digits(split: str, streaming: bool) -> _Opened:
    splits = digits()
    if split not in splits:
        raise UserError(f"digits has no split {split!r}; its splits are {', '.join(splits)}")
    return _cut(splits[split]) if streaming else _mapped(splits[split])


def _fingerprint(builder: DatasetBuilder, split: str) -> str:
    data_files = builder.config.data_files or {}
    return fingerprint([str(file) for name in split_names(split) for file in data_files[name]])


def _class_names(feature: Any) -> list[str] | None:
    return feature.names if isinstance(feature, ClassLabel) else None


class _Explained:
    """Turns what `datasets` raises on data that it cannot find, reach or read into one sentence."""

    def __init__(self, path: str, location: Location) -> None:
        if location.kind == "hub":
            self.what = f"{path!r} is neither a folder here nor a data set that can be opened on the Hub"
        else:
            expected = "Parquet files, images or WebDataset tars"
            self.what = f"expected data.path={path!r} to hold {expected}, but it cannot be opened"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) or not isinstance(error, _OPENING_ERRORS):
            return
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = str(cause or error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{self.what}: {reason}") from error
