# SPDX-License-Identifier: Apache-2.0
"""Divides the files of a local folder into splits by their names.

Files belong to splits by the rules of `datasets` 5, applied to a list of files. `datasets` tries these rules
in order, and uses the first rule that any file matches. It omits files that match no split of that rule:

1. `data/NAME-00000-of-00001.ending` belongs to the split NAME.
2. A file belongs to the split that a directory above it is named after.
3. A file belongs to the split that the file is named after.
4. All files belong to the split "train".

A file or directory is named after a split if its name contains a keyword of the split between delimiters.
Delimiters are `-`, `.`, `_`, a space, a digit, and the end of a directory's name.

There is one difference: upper case does not matter (`Training`, `TEST`) if rule 2 or 3 then gives exactly one
split to each file, and "train" to some of them. `datasets` would train on the test images.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from hf_ssl.data.location import File

logger = logging.getLogger(__name__)

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ANY_KEYWORD = re.compile("train|valid|dev|val|test|eval")
_DELIMITER = "[-._ 0-9]"
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\..*", re.DOTALL)
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")

_Group: TypeAlias = tuple[list[str], list[File]]
"""Names, and the files that have them."""


def infer_splits(files: list[File], root: str) -> dict[str, list[File]]:
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
    return (
        _splits_by_shards(files, root)
        or _splits_by_names(directories, directories=True)
        or _splits_by_names([([os.path.basename(file.path)], [file]) for file in files], directories=False)
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


def _splits_by_names(groups: list[_Group], directories: bool) -> dict[str, list[File]]:
    """Divide groups of files into splits by the keywords in their names.

    Upper case does not matter if each file then has exactly one split, and some files are in the split
    "train": all files of a folder can have names such as `Test_1.jpg`.

    Args:
        groups: the names of each group, and its files.
        directories: whether the names are those of directories.
    """
    lower = [([name.lower() for name in names], files) for names, files in groups]
    found = _splits_by_keywords(lower, directories)
    divided = [file for files in found.values() for file in files]
    is_exact = len(divided) == len(set(divided)) == sum(len(files) for _, files in groups)
    return found if is_exact and "train" in found else _splits_by_keywords(groups, directories)


def _splits_by_keywords(groups: list[_Group], directories: bool) -> dict[str, list[File]]:
    """Divide groups of files into splits by the keywords in their names; see `_splits_by_names`."""
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


def _patterns(keywords: tuple[str, ...], directories: bool) -> Iterator[re.Pattern[str]]:
    """Yield the patterns of a split, in the order in which `datasets` lists their files."""
    shapes = ["{0}{1}.*", ".*{1}{0}{1}.*"]
    if directories:
        shapes = ["{0}", "{0}{1}.*", ".*{1}{0}", ".*{1}{0}{1}.*"]
    for keyword in keywords:
        for shape in shapes:
            yield re.compile(shape.format(keyword, _DELIMITER), re.DOTALL)


def is_name_of_split(directory: str) -> bool:
    """Return whether a directory is named after a split, in upper or lower case."""
    keywords = (_patterns(words, directories=True) for words in _KEYWORDS.values())
    return any(pattern.fullmatch(directory.lower()) for patterns in keywords for pattern in patterns)


def report_splits_inside(folders: Iterable[str]) -> None:
    """Log a warning if the folders in an archive are named after several splits, such as `train` and `test`.

    `datasets` (seen with 5.2) uses only the names of the archives for splits, so that a training on the split
    "train" would also train on the test images.

    Args:
        folders: the names of the folders inside the archive.
    """
    found = sorted(filter(is_name_of_split, folders))
    if len(found) > 1:
        logger.warning(
            "images of the folders %s inside an archive are in one split; unpack the archive, so that these "
            "folders are splits", ", ".join(found[:8]),
        )  # fmt: skip
