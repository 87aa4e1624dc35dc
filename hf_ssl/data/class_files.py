# SPDX-License-Identifier: Apache-2.0
"""Compares the names of classes that several files of one data set declare."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, List, Value
from huggingface_hub import HfFileSystem, try_to_load_from_cache

from hf_ssl.data.stream_length import arrow_reader
from hf_ssl.errors import UserError

_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<name>.+)")


def files_with_classes(data_files: Mapping[Any, Sequence[Any]]) -> list[str]:
    """Return the files whose classes `require_same_classes` can compare.

    They are the local files and the files on the Hub that were downloaded. If no file of a split was
    downloaded, as for a stream, the function returns only its first file, because reading the class names of
    a file on the Hub needs two requests.

    Args:
        data_files: the files of each split.
    """
    found: list[str] = []
    for files in data_files.values():
        names = [str(file) for file in files]
        local = [copy for copy in map(_local_copy, names) if copy is not None]
        found += local or [file for file in names[:1] if _ON_HUB.fullmatch(file)]
    return found


def _local_copy(file: str) -> str | None:
    """Return the path of a local file, or of the downloaded copy of a file on the Hub; else None."""
    if "://" not in file:
        return file
    on_hub = _ON_HUB.fullmatch(file)
    if on_hub is None:
        return None
    revision = unquote(on_hub["revision"])
    copy = try_to_load_from_cache(on_hub["repo"], on_hub["name"], revision=revision, repo_type="dataset")
    return copy if isinstance(copy, str) else None


def require_same_classes(files: Sequence[str], column: str) -> None:
    """Raise UserError if two files have different names for one class number, or texts and a ClassLabel.

    `datasets` (seen with 5.2) gives the names in the first file to the class numbers in all files. A file
    with more or fewer classes in the same order is correct. If the first file contains the names as texts,
    `datasets` turns the numbers of a ClassLabel in another file into the texts "0", "1" and so on.

    Args:
        files: paths of the files of all splits (`files_with_classes`). Only Parquet and Arrow files declare
            names.
        column: the column of the labels, or the column of structs that contains them.
    """
    known: dict[str, tuple[list[str], str]] = {}
    of_texts = None
    for file in files:
        features = _features(file)
        feature = features.get(column)
        if isinstance(feature, Value) and "string" in feature.dtype:
            of_texts = of_texts or file
        if of_texts and isinstance(feature, ClassLabel) and feature.names != _digits(len(feature.names)):
            raise UserError(
                f"data.path: expected {column!r} with one type in all files, got texts in "
                f"{os.path.basename(of_texts)} and a ClassLabel in {os.path.basename(file)}; cast one of them"
            )
        for name, classes in _named_classes(features):
            if name != column and not name.startswith(f"{column}."):
                continue
            first, first_file = known.setdefault(name, (classes, file))
            pairs = enumerate(zip(first, classes, strict=False))
            wrong = next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), None)
            if wrong is not None:
                raise UserError(
                    f"data.path: expected the same classes in all files, got {wrong[1]!r} in "
                    f"{os.path.basename(first_file)} and {wrong[2]!r} in {os.path.basename(file)} for the "
                    f"number {wrong[0]} of {name!r}; write both files with one ClassLabel"
                )
            if len(classes) > len(first):
                known[name] = classes, file


def _digits(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _features(file: str) -> Features | dict[str, Any]:
    """Return the columns of a Parquet or Arrow file; {} for other files."""
    ending = os.path.splitext(file)[1].lower()
    try:
        if ending == ".parquet" and "://" in file:
            with HfFileSystem().open(file) as opened:
                return Features.from_arrow_schema(pq.read_schema(opened))
        if ending == ".parquet":
            return Features.from_arrow_schema(pq.read_schema(file))
        if ending == ".arrow" and "://" not in file:
            with pa.memory_map(file) as opened:
                return Features.from_arrow_schema(arrow_reader(opened).schema)
    except (OSError, pa.ArrowException, httpx2.HTTPError):  # the reader of the data reports the file
        pass
    return {}


def _named_classes(feature: Any, column: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the classes of each column of the type ClassLabel, also inside of structs."""
    if isinstance(feature, ClassLabel):
        yield column, list(feature.names)
    elif isinstance(feature, List):
        yield from _named_classes(feature.feature, column)
    elif isinstance(feature, dict):
        for name, each in feature.items():
            yield from _named_classes(each, f"{column}.{name}".lstrip("."))
