# SPDX-License-Identifier: Apache-2.0
"""Finds the data in a local folder, and opens plain images as tables; `datasets` opens all other files.

`hf_ssl.data.split_rules` divides the files into splits.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, ReadInstruction, concatenate_datasets

from hf_ssl.data.class_numbers import class_name
from hf_ssl.data.location import (
    IMAGE,
    TABLES,
    TEXT_TABLES,
    ZIP,
    File,
    Listing,
    Location,
    file_kind,
    file_state,
    fingerprint,
    is_utf8,
    list_folder,
    most_common_kind,
    state_of_files,
)
from hf_ssl.data.metadata_files import METADATA, declares_its_files, describes_images, require_known_files
from hf_ssl.data.split_rules import infer_splits, is_name_of_split
from hf_ssl.data.unread import IMAGE_FILES, FileCount, count_files
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_CACHE_SIZE = 8  # number of folders, and of splits, in the caches of a process
_NEGATIVE_PERCENT = re.compile(r"(?<=[\[:])-(100|\d{1,2})%")


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split.

    Attributes:
        dataset: N rows with the column "image" (`{"bytes", "path"}`, not decoded), and with the column
            "label" if the directories are classes.
        sizes: (N,) size of each file in bytes.
    """

    dataset: Dataset
    sizes: np.ndarray = field(repr=False)

    @property
    def paths(self) -> list[str]:
        return self.dataset.data.column("image").combine_chunks().field("path").to_pylist()

    @cached_property
    def revision(self) -> str:
        """The fingerprint of the files, independent of the place of the folder."""
        return fingerprint(self.paths, self.sizes.tolist())


@dataclass(frozen=True)
class LocalData:
    """The data in a local folder, in one of three forms.

    Attributes:
        images: the splits of a folder of plain images; else empty.
        files: the files of each split, which `datasets` opens; else empty.
        searched: all files of a folder that `datasets` searches itself; else empty.
        count: how many files of a folder are read; None if `datasets` searches the folder, and for a pattern.
    """

    images: dict[str, ImageSplit] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list, repr=False)
    count: FileCount | None = None

    @property
    def paths(self) -> list[str]:
        """The paths of all files."""
        images = (path for split in self.images.values() for path in split.paths)
        return [*images, *(path for files in self.files.values() for path in files), *self.searched]


class _Checked(NamedTuple):
    """Data of a folder whose files were checked.

    Attributes:
        listing: the directories of the folder.
        data: what the folder contains.
        state: hash of the states of the files.
        time: time of the check, as of `time.monotonic`.
        seconds: how long the check took.
    """

    listing: Listing
    data: LocalData
    state: str
    time: float
    seconds: float

    def is_fresh(self) -> bool:
        """Return whether the check was a short time ago, and takes too long to repeat it already."""
        return self.seconds > _SHORT_SECONDS and time.monotonic() - self.time < _FRESH_SECONDS


_folder_cache: dict[tuple[str, bool], _Checked] = {}
_FEW_FILES = 100_000
_SHORT_SECONDS = 0.1  # a check of the files that takes less is repeated whenever the folder is opened
_FRESH_SECONDS = 30.0  # in which a command opens a folder several times, for a longer check
_split_cache: dict[str, ImageSplit] = {}


def find_local_data(location: Location, whole: bool = False) -> LocalData:
    """Return the data at a local place. A process lists a folder again only if it has changed.

    A file that was overwritten in place is noticed at once if the check of all files is fast. Otherwise, it
    is noticed after half a minute, and not in a folder with many files.

    Args:
        location: the place.
        whole: whether all files of a folder belong to the split "train", whatever their names are. Metadata
            files are then not used, because they may name only some of the images.
    """
    if location.files:
        return _data_in_files(location)
    root = os.path.realpath(location.loader)
    key = (root, whole)
    if key in _folder_cache:
        before = _folder_cache[key]
        if before.listing.is_current():
            if before.is_fresh():
                return before.data
            now = _checked(before.listing, before.data)
            if now.state == before.state:
                _store(_folder_cache, key, now)
                return now.data
    listing = list_folder(root)
    found = _data_in_listing(listing, whole)
    # The tables hold the files now. A second list of millions of files would waste memory.
    _store(_folder_cache, key, _checked(replace(listing, files=[]), found))
    return found


def _checked(listing: Listing, data: LocalData) -> _Checked:
    begin = time.monotonic()
    state = _state(data)
    end = time.monotonic()
    return _Checked(listing, data, state, end, end - begin)


def _state(found: LocalData) -> str:
    """Return a hash of the states of few files; "" for many files."""
    return "" if len(found.paths) > _FEW_FILES else state_of_files(found.paths)


def _store(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Store a value in a cache, and delete the oldest values from a full cache."""
    cache.pop(key, None)
    while len(cache) >= _CACHE_SIZE:
        del cache[next(iter(cache))]
    cache[key] = value


def select_split(splits: dict[str, ImageSplit], split: str) -> tuple[Dataset, str]:
    """Return the images of a split, or of a part or a sum of splits (`train[:10%]+test`), and their revision.

    Raises:
        ValueError: the text in brackets is not a slice.
    """
    chosen = [splits[name] for name in split_names(split)]
    if len(chosen) == 1:
        revision = chosen[0].revision
    else:
        revision = fingerprint(
            [file for part in chosen for file in part.paths],
            [size for part in chosen for size in part.sizes.tolist()],
        )
    return select_rows({name: part.dataset for name, part in splits.items()}, split), revision


def select_rows(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """Return the rows of a split, or of a part or a sum of splits (`train[:10%]+test`).

    "-10%" is the same place as "90%". `datasets` (seen with 5.2) rounds both differently. So "train[:90%]"
    and "train[-10%:]" could share an image, and "train[-1%:]" of few images were all images
    (github.com/huggingface/datasets/issues/8473).

    Raises:
        ValueError: the text in brackets is not a slice.
    """
    if split in splits:
        return splits[split]
    lengths = {name: len(table) for name, table in splits.items()}
    places = _NEGATIVE_PERCENT.sub(lambda found: f"{100 - int(found[1])}%", split)
    parts = [
        # `select` (datasets 5.2) raises for an empty range at the end.
        splits[part.splitname].select(range(part.from_, part.to) or [])
        for part in ReadInstruction.from_spec(places).to_absolute(lengths)
    ]
    return concatenate_datasets(parts)


def split_names(split: str) -> list[str]:
    """Return the names of the splits in a request: ["train", "test"] for "train[:10%]+test"."""
    return [re.sub(r"\[.*\]$", "", part.strip()) for part in split.split("+")]


def _data_in_files(location: Location) -> LocalData:
    if file_kind(location.files[0]) == IMAGE:
        files = [_file_with_status(file) for file in location.files if is_utf8(file)]
        if len(files) < len(location.files):
            logger.warning(
                "%d files are not used: their paths are not valid UTF-8", len(location.files) - len(files)
            )
        if not files:
            raise UserError(
                f"data.path: expected files whose paths are valid UTF-8, got {location.files[0]!r}; rename "
                "the files"
            )
        return LocalData(images=_image_tables({"train": files}, os.sep))
    return LocalData(files={"train": list(location.files)})


def _data_in_listing(listing: Listing, whole: bool) -> LocalData:
    paths = [file.path for file in listing.files]
    if not paths:
        raise UserError(
            "data.path: expected a folder of Parquet files, images or WebDataset tars, got "
            f"{listing.root!r}, which contains no visible files with valid UTF-8 names; check the path"
        )
    named = [file for file in listing.files if os.path.basename(file.path) in METADATA]
    kinds = {file: file_kind(file.path) for file in listing.files if file not in named}
    kind = most_common_kind(kinds.values())
    if declares_its_files(listing.root):
        return LocalData(searched=paths)
    if kind is None:
        require_known_files(listing.root, paths)
        return LocalData(searched=paths)
    metadata = [] if whole else [file for file in named if describes_images(file.path)]
    wanted = (IMAGE, ZIP) if kind == ZIP else (kind,)
    files = [file for file, own in kinds.items() if own in wanted]
    if kind in (IMAGE, ZIP) and metadata:
        files = sorted(files + metadata)
    splits = {"train": files} if whole else infer_splits(files, listing.root)
    count = _count(listing, kind, kinds, splits)
    if kind == IMAGE and not metadata:
        return LocalData(images=_image_tables(splits, listing.root), count=count)
    return LocalData(
        files={name: [file.path for file in files] for name, files in splits.items()}, count=count
    )


def _count(
    listing: Listing, kind: str, kinds: dict[File, str | None], splits: dict[str, list[File]]
) -> FileCount:
    """Count the files of a folder, and log a warning if some files are in no split or cannot be read."""
    own = [file.path for file, each in kinds.items() if each == kind]
    paths = {name: [file.path for file in files if kinds.get(file) == kind] for name, files in splits.items()}
    others = [file.path for file, each in kinds.items() if each is None] if kind == IMAGE else []
    count = count_files(listing.root, IMAGE_FILES if kind == IMAGE else f"{kind} files", own, paths, others)
    if count.unread:
        logger.warning("%s", count)
    # A table of file names may belong to the images beside it.
    used = {kind, IMAGE, ZIP} if kind == ZIP or kind in TABLES else {kind}
    unused = {each: file.path for file, each in kinds.items() if each not in (*used, *TEXT_TABLES, None)}
    for path in unused.values():
        logger.warning(
            "%s is not used, because its folder contains more %s; use data.path=%s to read it",
            path, count.kind, path
        )  # fmt: skip
    return count


def _file_with_status(path: str) -> File:
    status = os.stat(path)
    return File(path, status.st_size, file_state(status))


def _image_tables(splits: dict[str, list[File]], root: str) -> dict[str, ImageSplit]:
    """Return the table of each split, with labels almost by the rule of `datasets`.

    The directories that contain images are classes if they all have the same depth and at least two different
    names. There are two differences from `datasets` (seen with 5.2): directories whose names are only those
    of splits (`train/a.png`, `test/b.png`) are not classes, and all splits have labels if one has
    (github.com/huggingface/datasets/issues/7880).
    """
    names = {
        split: [class_name(os.path.basename(os.path.dirname(file.path))) for file in files]
        for split, files in splits.items()
    }
    classes = {name for found in names.values() for name in found}
    depths = {os.path.dirname(file.path).count(os.sep) for files in splits.values() for file in files}
    labeled = len(classes) > 1 and len(depths) == 1 and not all(map(is_name_of_split, classes))
    label_names = sorted(classes) if labeled else None
    for split, files in splits.items() if labeled else ():
        _report_scattered_class(names[split], files, root)
    return {
        split: _image_split(files, names[split] if labeled else None, label_names, root, split)
        for split, files in splits.items()
    }


def _report_scattered_class(names: list[str], files: list[File], root: str) -> None:
    """Log a warning if the images of a class are in several folders, as in `cat/2020` and `dog/2020`."""
    places: dict[str, dict[str, None]] = {}
    for name, file in zip(names, files, strict=True):
        places.setdefault(name, {})[os.path.dirname(file.path)] = None
    name, folders = max(places.items(), key=lambda item: len(item[1]))
    if len(folders) > 1:
        first, second = (os.path.relpath(folder, root) for folder in list(folders)[:2])
        logger.warning(
            "%d folders in %s, such as %s and %s, are one class, %r, because the innermost folders are the "
            "classes; for other classes, use a metadata.csv with the columns file_name and label",
            len(folders), root, first, second, name,
        )  # fmt: skip


def _image_split(
    files: list[File], names: list[str] | None, label_names: list[str] | None, root: str, split: str
) -> ImageSplit:
    identity = _identity(files, label_names, root, split)
    known = _split_cache.get(identity)
    if known is not None:
        return known
    paths = pa.array([file.path for file in files], pa.string())
    missing = pa.nulls(len(files), pa.binary())
    columns = {"image": pa.StructArray.from_arrays([missing, paths], ["bytes", "path"])}
    features = Features(image=Image(decode=False))
    if label_names is not None:
        numbers = {name: number for number, name in enumerate(label_names)}
        labels = [numbers[name] for name in names or ()]
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = ClassLabel(names=label_names)
    dataset = Dataset(
        pa.table(columns),
        info=DatasetInfo(features=features),
        split=datasets.Split(split),
        fingerprint=identity,
    )
    found = ImageSplit(dataset, np.array([file.size for file in files], np.int64))
    _store(_split_cache, identity, found)
    return found


def _identity(files: Iterable[File], label_names: list[str] | None, root: str, split: str) -> str:
    """Return a fingerprint for `Dataset`. It changes if a file is added, removed, renamed or replaced."""
    digest = hashlib.blake2b(f"{root}\n{split}\n{label_names}\n".encode(), digest_size=8)
    for file in files:
        digest.update(f"{file.path}\0{file.state}\0".encode())
    return digest.hexdigest()
