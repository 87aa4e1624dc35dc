# SPDX-License-Identifier: Apache-2.0
"""Assigns files to splits by the rules of `datasets` 5, from a list of files, without reading directories.

`datasets` tries these rules in order, and uses the first rule that any file matches. It omits files that
match no split of that rule:

1. `data/NAME-00000-of-00001.ending` belongs to the split NAME.
2. A file belongs to the split that a directory above it is named after.
3. A file belongs to the split that the file is named after.
4. All files belong to the split "train".

A file or directory is named after a split if its name contains a keyword of the split between delimiters.
Delimiters are `-`, `.`, `_`, a space, a digit, and the end of a directory's name.
"""

import os
import re
from collections.abc import Iterator

from hf_ssl.data.listing import File

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ANY_KEYWORD = re.compile("train|valid|dev|val|test|eval")
_DELIMITER = "[-._ 0-9]"
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}.*\..*", re.DOTALL)
_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


def split_names(split: str) -> list[str]:
    """Return the names of the splits in a request: ["train", "test"] for "train[:10%]+test"."""
    return [re.sub(r"\[.*\]$", "", part.strip()) for part in split.split("+")]


def infer_splits(files: list[File], root: str) -> dict[str, list[File]]:
    """Divide files into splits.

    Args:
        files: the files, sorted by path.
        root: the folder that contains them. Its own name has no influence.

    Returns:
        The files of each split that is not empty, in the order of `datasets`. Each file occurs once in a
        split. (`datasets` repeats a file in a split if several of its patterns match.)
    """
    return (
        _from_shards(files, root) or _from_directories(files, root) or _from_names(files) or {"train": files}
    )


def _from_shards(files: list[File], root: str) -> dict[str, list[File]]:
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


def _from_directories(files: list[File], root: str) -> dict[str, list[File]]:
    by_directory: dict[str, list[File]] = {}
    for file in files:
        by_directory.setdefault(os.path.dirname(file.path), []).append(file)
    parts = {path: os.path.relpath(path, root).split(os.sep) for path in by_directory}
    parts = {path: names for path, names in parts.items() if any(map(_ANY_KEYWORD.search, names))}
    splits = {}
    for split, keywords in _KEYWORDS.items():
        chosen: dict[File, None] = {}
        for pattern in _patterns(keywords, directories=True):
            matching = (path for path, names in parts.items() if any(map(pattern.fullmatch, names)))
            chosen |= dict.fromkeys(sorted(file for path in matching for file in by_directory[path]))
        splits[split] = list(chosen)
    return {split: chosen for split, chosen in splits.items() if chosen}


def _from_names(files: list[File]) -> dict[str, list[File]]:
    names = {file: os.path.basename(file.path) for file in files}
    names = {file: name for file, name in names.items() if _ANY_KEYWORD.search(name)}
    splits = {}
    for split, keywords in _KEYWORDS.items():
        chosen: dict[File, None] = {}
        for pattern in _patterns(keywords, directories=False):
            chosen |= dict.fromkeys(file for file, name in names.items() if pattern.fullmatch(name))
        splits[split] = list(chosen)
    return {split: chosen for split, chosen in splits.items() if chosen}


def _patterns(keywords: tuple[str, ...], directories: bool) -> Iterator[re.Pattern[str]]:
    """Yield the patterns of a split, in the order in which `datasets` lists their files."""
    shapes = ["{0}{1}.*", ".*{1}{0}{1}.*"]
    if directories:
        shapes = ["{0}", "{0}{1}.*", ".*{1}{0}", ".*{1}{0}{1}.*"]
    for keyword in keywords:
        for shape in shapes:
            yield re.compile(shape.format(keyword, _DELIMITER), re.DOTALL)
