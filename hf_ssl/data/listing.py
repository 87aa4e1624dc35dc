# SPDX-License-Identifier: Apache-2.0
"""Lists the files of a folder, and checks whether an earlier list is still correct."""

import logging
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_CLOCK_TICK_NS = 20_000_000
"""Two changes of a directory within this time may get the same time stamp from the file system."""


class File(NamedTuple):
    """A file with its size in bytes and the time of its last change, both from the time of the listing."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """All visible files below a folder.

    Attributes:
        root: absolute path of the folder, links resolved.
        files: the files, sorted by path.
        directories: path of each listed directory -> time of its last change, in nanoseconds.
        listed_ns: time of the listing, in nanoseconds.
    """

    root: str
    files: list[File]
    directories: dict[str, int]
    listed_ns: int

    def is_current(self) -> bool:
        """Return whether no file was added, removed, renamed or replaced since the listing.

        The check reads only the times of the directories, so it misses a file that was rewritten in place.
        """
        if max(self.directories.values()) > self.listed_ns - _CLOCK_TICK_NS:
            return False
        try:
            return all(os.stat(path).st_mtime_ns == time for path, time in self.directories.items())
        except OSError:
            return False


def list_folder(folder: str) -> Listing:
    """Return all visible files below a folder; each directory is read once.

    As in `datasets`, the list omits names that start with a dot and directories whose name starts with two
    underscores. A link to a file counts as a file. Links to directories are not followed.

    Raises:
        UserError: the folder itself cannot be read, or its path is not valid UTF-8.
    """
    root = os.path.realpath(folder)
    if not is_text(root):
        raise UserError(f"data.path: expected a folder whose path is valid UTF-8, got {root!r}; rename it")
    listed_ns = time.time_ns()
    files: list[File] = []
    directories: dict[str, int] = {}
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            directories[directory] = os.stat(directory).st_mtime_ns
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        _sort_in(entry, files, waiting)
                    except OSError as error:  # it was removed meanwhile, or is a link to itself
                        logger.warning("%s is not used: %s", entry.path, error.strerror)
        except OSError as error:
            if directory == root:
                raise UserError(f"data.path: expected a readable folder, got {error}") from error
            logger.warning("images below %s are not used: %s", directory, error.strerror)
    return Listing(root, sorted(files), directories, listed_ns)


def _sort_in(entry: "os.DirEntry[str]", files: list[File], directories: list[str]) -> None:
    """Append the entry to the files or to the directories, unless it is hidden or of another kind."""
    if entry.name.startswith("."):
        return
    is_directory = entry.is_dir(follow_symlinks=False)
    if is_directory and entry.name.startswith("__"):
        return
    if not is_text(entry.name):
        logger.warning("%r is not used: its name is not valid UTF-8; rename it", entry.path)
    elif is_directory:
        directories.append(entry.path)
    elif entry.is_file():
        status = entry.stat()
        files.append(File(entry.path, status.st_size, status.st_mtime_ns))


def is_text(name: str) -> bool:
    """Whether a name can be stored in a table. (Names from old archives may be in another encoding.)"""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
