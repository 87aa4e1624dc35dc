# SPDX-License-Identifier: Apache-2.0
"""Counts the files of a folder, and says how many of them are read and why others are not."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from hf_ssl.data.formats import UNREADABLE, looks_like_image
from hf_ssl.errors import UserError

ALL = "all"
"""`data.split` for all files of a folder, whatever their names are."""
ADVICE = f"data.split={ALL} reads them (hf-ssl evaluate: evaluation.train_split={ALL})"
IMAGE_FILES = "image files"


@dataclass(frozen=True)
class FileCount:
    """The files of a folder that contain images.

    Attributes:
        root: the folder.
        total: number of its files: of image files, or of the files of another kind that is read.
        kind: `IMAGE_FILES`, or the ending of the files.
        unread: why files are not read -> their number.
        outside: number of files that are in no split because of the names of other files or folders.
        splits: number of files in each split.
    """

    root: str
    total: int
    kind: str
    unread: Mapping[str, int] = field(default_factory=dict)
    outside: int = 0
    splits: Mapping[str, int] = field(default_factory=dict)

    def for_split(self, split: str, names: list[str], rows: int | None) -> "FileCount":
        """Return the count for a split, or for a part or a sum of splits. The other splits are not read.

        Args:
            split: the splits, such as "train[:10%]".
            names: the names of these splits.
            rows: number of rows that are read, one for each image file; None if it is not known.
        """
        others = {f"in the split {name}": n for name, n in self.splits.items() if name not in names}
        unread = {**self.unread, **others}
        chosen = sum(self.splits.get(name, 0) for name in {*names})
        if self.kind == IMAGE_FILES and rows is not None and rows < chosen:
            part = f"outside of the part {split}"
            unread[part if "[" in split else f"not named in a metadata file; {ADVICE}"] = chosen - rows
        return replace(self, unread=unread)

    def __str__(self) -> str:
        """Return a sentence: "20 of 60 image files in photos are read; not read: 40 (reason)"."""
        read = self.total - sum(self.unread.values())
        reasons = ", ".join(f"{number} ({reason})" for reason, number in self.unread.items())
        end = f"; not read: {reasons}" if reasons else ""
        return f"{read} of {self.total} {self.kind} in {self.root} are read{end}"

    def require_most_files(self, split: str, key: str = "data.split") -> None:
        """Raise UserError if more files are in no split than in the given one.

        Args:
            split: the name of a split.
            key: the key of a recipe that names the split.
        """
        read = self.splits.get(split, 0)
        if self.outside > read:
            raise UserError(
                f"{key}: expected most {self.kind} of {self.root} in a split, got {read} in {split} and "
                f"{self.outside} in no split, because of names such as {split}; use {key}=all for all "
                f"files, or {key}={split}{'' if key == 'data.split' else '[:100%]'}"
            )


def count_files(
    root: str, kind: str, files: Iterable[str], splits: Mapping[str, list], others: Iterable[str]
) -> FileCount:
    """Return the count of a folder.

    Args:
        root: the folder.
        kind: see `FileCount`.
        files: the paths of all files of this kind.
        splits: the files of each split.
        others: the paths of all other files. Those with an ending of `UNREADABLE` count as image files. Those
            with another ending also count if the first file with this ending begins like an image.
    """
    sizes = {name: len(chosen) for name, chosen in splits.items()}
    total = len(list(files))
    # A file can be in several splits.
    outside = total - len({file for chosen in splits.values() for file in chosen})
    unread: Counter[str] = Counter()
    if outside:
        names = ", ".join(sizes)
        unread[f"in no split, because others are named {names}; {ADVICE}"] = outside
    are_images: dict[str, bool] = {}
    for path in others:
        ending = os.path.splitext(path)[1].lower()
        if ending in UNREADABLE:
            unread[f"{ending}: {UNREADABLE[ending]}"] += 1
            total += 1
            continue
        if ending not in are_images:
            are_images[ending] = ending != "" and looks_like_image(path)
        if are_images[ending]:
            example = next(each for each in are_images if are_images[each])
            unread[f"unknown endings such as {example}; rename the files"] += 1
            total += 1
    return FileCount(root, total, kind, unread, outside, sizes)
