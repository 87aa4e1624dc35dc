# SPDX-License-Identifier: Apache-2.0
"""Finds the splits of a local folder, and opens plain images as tables; `datasets` opens all other files.

Files belong to splits by the rules of `datasets` 5, applied to a list of files. `datasets` tries these rules
in order, and uses the first rule that any file matches. It omits files that match no split of that rule:

1. `data/NAME-00000-of-00001.ending` belongs to the split NAME.
2. A file belongs to the split that a directory above it is named after.
3. A file belongs to the split that the file is named after.
4. All files belong to the split "train".

A file or directory is named after a split if its name contains a keyword of the split between delimiters.
Delimiters are `-`, `.`, `_`, a space, a digit, and the end of a directory's name.

There is one difference: upper case does not matter (`Training`, `TEST`) if rule 2 or 3 then gives exactly one
split to each file. `datasets` would train on the test images.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

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
from hf_ssl.data.unread import IMAGE_FILES, FileCount, count_files
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_CACHE_SIZE = 8  # number of folders, and of splits, in the caches of a process
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ANY_KEYWORD = re.compile("train|valid|dev|val|test|eval")
_DELIMITER = "[-._ 0-9]"
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\..*", re.DOTALL)
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
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


_folder_cache: dict[tuple[str, bool], tuple[Listing, LocalData, str, float]] = {}
_FEW_FILES = 100_000
_FRESH_SECONDS = 30.0  # in which a command opens a folder several times
_split_cache: dict[str, ImageSplit] = {}


def find_local_data(location: Location, whole: bool = False) -> LocalData:
    """Return the data at a local place. A process lists a folder again only if it has changed.

    A file that was overwritten in place is noticed after half a minute, and not in a folder with many files.

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
        listing, found, state, checked = _folder_cache[key]
        if listing.is_current():
            if time.monotonic() - checked < _FRESH_SECONDS:
                return found
            if state == _state(found):
                _store(_folder_cache, key, (listing, found, state, time.monotonic()))
                return found
    listing = list_folder(root)
    found = _data_in_listing(listing, whole)
    # The tables hold the files now. A second list of millions of files would waste memory.
    _store(_folder_cache, key, (replace(listing, files=[]), found, _state(found), time.monotonic()))
    return found


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
    splits = {"train": files} if whole else _infer_splits(files, listing.root)
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


def _infer_splits(files: list[File], root: str) -> dict[str, list[File]]:
    """Divide files into splits.

    Args:
        files: the files, sorted by path.
        root: the folder that contains them. Its own name has no influence.

    Returns:
        The files of each split that is not empty, in the order of `datasets`. Each file occurs once in a
        split. (`datasets` repeats a file in a split if several of its patterns match.)
    """
    by_directory: dict[str, list[File]] = {}
    for file in files:
        by_directory.setdefault(os.path.dirname(file.path), []).append(file)
    directories = [(os.path.relpath(path, root).split(os.sep), found) for path, found in by_directory.items()]
    names = [([os.path.basename(file.path)], [file]) for file in files]
    return (
        _splits_by_shards(files, root)
        or _splits_in_any_case(directories, directories=True)
        or _splits_by_keywords(directories, directories=True)
        or _splits_in_any_case(names, directories=False)
        or _splits_by_keywords(names, directories=False)
        or {"train": files}
    )


def _splits_by_shards(files: list[File], root: str) -> dict[str, list[File]]:
    splits: dict[str, list[File]] = {}
    data = os.path.join(root, "data", "")
    for file in files:
        name = file.path.removeprefix(data) if file.path.startswith(data) else os.sep
        found = None if os.sep in name else _SHARD.fullmatch(name)
        if found:
            splits.setdefault(found["split"], []).append(file)
    if not all(_SPLIT_NAME.fullmatch(name) for name in splits):
        return {}  # `datasets` raises an error here, but photos may have such names by chance
    others = sorted(splits.keys() - _KEYWORDS.keys())
    return {name: splits[name] for name in (*_KEYWORDS, *others) if name in splits}


def _splits_by_keywords(
    groups: list[tuple[list[str], list[File]]], directories: bool
) -> dict[str, list[File]]:
    """Divide groups of files into splits by the keywords in their names.

    Args:
        groups: the names of each group, and its files.
        directories: whether the names are those of directories.
    """
    groups = [(names, files) for names, files in groups if any(map(_ANY_KEYWORD.search, names))]
    splits = {}
    for split, keywords in _KEYWORDS.items():
        chosen: dict[File, None] = {}
        for pattern in _patterns(keywords, directories):
            matching = (files for names, files in groups if any(map(pattern.fullmatch, names)))
            chosen |= dict.fromkeys(sorted(file for files in matching for file in files))
        if chosen:
            splits[split] = list(chosen)
    return splits


def _splits_in_any_case(
    groups: list[tuple[list[str], list[File]]], directories: bool
) -> dict[str, list[File]]:
    """Divide groups of files by keywords in upper or lower case; {} if a file has no split, or several."""
    found = _splits_by_keywords(
        [([name.lower() for name in names], files) for names, files in groups], directories
    )
    divided = [file for files in found.values() for file in files]
    is_exact = len(divided) == len(set(divided)) == sum(len(files) for _, files in groups)
    return found if is_exact else {}


def _patterns(keywords: tuple[str, ...], directories: bool) -> Iterator[re.Pattern[str]]:
    """Yield the patterns of a split, in the order in which `datasets` lists their files."""
    shapes = ["{0}{1}.*", ".*{1}{0}{1}.*"]
    if directories:
        shapes = ["{0}", "{0}{1}.*", ".*{1}{0}", ".*{1}{0}{1}.*"]
    for keyword in keywords:
        for shape in shapes:
            yield re.compile(shape.format(keyword, _DELIMITER), re.DOTALL)


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
    labeled = len(classes) > 1 and len(depths) == 1 and not all(map(_is_name_of_split, classes))
    label_names = sorted(classes) if labeled else None
    return {
        split: _image_split(files, names[split] if labeled else None, label_names, root, split)
        for split, files in splits.items()
    }


def _is_name_of_split(directory: str) -> bool:
    keywords = (_patterns(words, directories=True) for words in _KEYWORDS.values())
    return any(pattern.fullmatch(directory.lower()) for patterns in keywords for pattern in patterns)


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
