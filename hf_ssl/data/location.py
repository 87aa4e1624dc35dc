# SPDX-License-Identifier: Apache-2.0
"""Resolves `data.path`, lists the files of a folder, and computes a fingerprint of files."""

import glob
import hashlib
import logging
import os
import re
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hf_ssl.data.formats import READABLE, UNREADABLE, looks_like_image
from hf_ssl.data.own_folders import RUN_MARK, is_cache_of_datasets, outside_own_folders, own_folder
from hf_ssl.errors import UserError, first_line

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOADERS = {
    ".parquet": "parquet", ".tar": "webdataset", ".zip": "imagefolder", ".arrow": "arrow",
    ".csv": "csv", ".json": "json", ".jsonl": "json",
}  # fmt: skip
TEXT_TABLES = (".csv", ".json", ".jsonl")
"""Files that often describe images beside them. They are read only if there are no others."""
TABLES = (".parquet", ".arrow", *TEXT_TABLES)
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz2", ".tgz", ".txz", ".xz", ".zip", ".zst")
ZIP = ".zip"
DIGITS = "digits"
"""`data.path` of the built-in data set."""
IMAGE = "image"
_HASHED_FILES = 256
_HASHED_BYTES = 1 << 16
_OF_SYSTEMS = ("@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "lost+found")
"""Folders of thumbnails and deleted files that file servers and operating systems make."""
_CLOCK_TICK_NS = 20_000_000
"""Two changes of a directory within this time may get the same time stamp from the file system."""


@dataclass(frozen=True)
class Location:
    """Where images are.

    Attributes:
        kind: "digits" (built in), "local" or "hub".
        loader: the first argument of `datasets.load_dataset_builder`: a folder, a Hub id, or the name of a
            loader.
        files: the files, if `loader` is the name of a loader; else empty.
    """

    kind: Literal["digits", "local", "hub"]
    loader: str
    files: tuple[str, ...] = ()


class File(NamedTuple):
    """A file with its size in bytes and its `state`, both from the time of the listing."""

    path: str
    size: int
    state: str


def file_state(status: os.stat_result) -> str:
    """Return a text that changes if a file is replaced or rewritten, from its size and its times.

    The time of the last change of the status (ctime) is necessary: `rsync -t` and the layers of containers
    give a new file the modification time of the old one.
    """
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def state_of_files(paths: Iterable[str]) -> str:
    """Return a hash of the paths and the states of files. A missing file counts as a broken image later."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with suppress(OSError):
            digest.update(f"{path} {file_state(os.stat(path))}\n".encode())
    return digest.hexdigest()


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


def locate(path: str) -> Location:
    """Return the location of the images that `data.path` names.

    Raises:
        UserError: the path names neither files nor, by its form, a data set on the Hub.
    """
    if path == DIGITS:
        return Location("digits", path)
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return Location("local", expanded)
    if os.path.isfile(expanded):
        return _locate_files(path, [expanded])
    if glob.has_magic(expanded):
        pattern, literal = _split_pattern(expanded)
        matches = sorted(glob.glob(pattern, recursive=True))
        files = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
        files, left_out = outside_own_folders(files, os.path.abspath(literal))
        for folder, what in left_out.items():
            logger.warning("images in %s are not used: it is %s", folder, what)
        if matches and not files:
            raise UserError(
                f"data.path: expected a pattern that matches files, got {path!r}, which matches only "
                f"folders; use '{path.rstrip('/')}/*'"
            )
        return _locate_files(path, files)
    if _HUB_ID.fullmatch(path) and not path.endswith(tuple(_LOADERS)):
        return Location("hub", path)
    raise UserError(
        f"data.path: expected a folder, files or a data set on the Hub, got {path!r}, which does not exist; "
        "check the path"
    )


def _split_pattern(path: str) -> tuple[str, str]:
    """Return a pattern for `glob`, and the folder above its wildcards.

    The folder is the longest part of the path that exists. In its name, the characters `* ? [ ]` are no
    wildcards.
    """
    parts = path.split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        folder = os.sep.join(parts[:count]) or os.sep
        if os.path.isdir(folder):
            return os.path.join(glob.escape(folder), *parts[count:]), folder
    return path, os.curdir


def _locate_files(path: str, files: list[str]) -> Location:
    if not files:
        raise UserError(
            f"data.path: expected a pattern that matches files, got {path!r}, which matches none; "
            "check the pattern"
        )
    kind = most_common_kind(map(file_kind, files))
    if kind is None or (kind != IMAGE and any(file_kind(file) != kind for file in files)):
        endings = sorted({Path(file).suffix.lower() or "(none)" for file in files})
        advice = "use a pattern that matches one kind of files"
        if kind is None:
            advice = advice_for_others(endings)
        raise UserError(
            f"data.path: expected only Parquet files, only WebDataset tars or only images, got {path!r} with "
            f"the endings {', '.join(endings[:8])}; {advice}"
        )
    chosen = tuple(os.path.abspath(file) for file in files if file_kind(file) == kind)
    return Location("local", "imagefolder" if kind == IMAGE else _LOADERS[kind], chosen)


def advice_for_others(endings: Iterable[str]) -> str:
    """Return what to do with files of other kinds, from their endings."""
    for ending in endings:
        if ending in UNREADABLE:
            return UNREADABLE[ending]
        if ending in ARCHIVES:
            return "unpack the archive, and use its folder"
    return "check the path"


def file_kind(file: str) -> str | None:
    """Return IMAGE for an image, the ending in lower case for a file that may contain images, else None."""
    ending = os.path.splitext(file)[1].lower()
    if ending in READABLE or (not ending and looks_like_image(file)):
        return IMAGE
    return ending if ending in _LOADERS else None


@contextmanager
def damaged_archives_named(paths: Callable[[], list[str]]) -> Iterator[None]:
    """Turn the errors about damaged archives, which name no file, into a UserError that names one.

    Args:
        paths: returns the paths of all opened files.
    """
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        checks = {".tar": tarfile.is_tarfile, ZIP: zipfile.is_zipfile}
        checked = ((path, checks.get(os.path.splitext(path)[1].lower())) for path in paths())
        damaged = next((path for path, check in checked if check and not check(path)), "a damaged archive")
        raise UserError(
            f"data.path: expected archives that can be read, got {damaged}: {first_line(error)}; download it "
            "again, or leave it out"
        ) from error


def most_common_kind(kinds: Iterable[str | None]) -> str | None:
    """Return the most frequent kind of files (Parquet in case of a tie); None if no file has a kind.

    CSV and JSON files are the result only if there are no others, because they often describe images.
    """
    counts = Counter(kind for kind in kinds if kind is not None)
    return max(
        counts,
        key=lambda kind: (kind not in TEXT_TABLES, counts[kind], kind == ".parquet", kind),
        default=None,
    )


def folder_of_names(names: Sequence[str], tables: list[str]) -> str:
    """Return the folder where the relative file names of tables start.

    It is the first folder of a table that contains the file of the first name; "" (the working folder) if
    only the working folder contains this file. Otherwise, it is the folder of the first table.

    Args:
        names: relative file names in the tables, at least one.
        tables: the paths of the tables.

    Raises:
        UserError: the tables are in several folders, and another of these folders also contains a named file.
            A row does not name its table, so hf_ssl could read the image of another row.
    """
    folders = list(dict.fromkeys(os.path.dirname(os.path.abspath(table)) for table in tables))
    known = (each for each in [*folders, ""] if os.path.exists(os.path.join(each, names[0])))
    start = next(known, folders[0])
    for folder in folders if len(folders) > 1 else ():
        found = (name for name in names if folder != start and os.path.exists(os.path.join(folder, name)))
        if (name := next(found, None)) is not None:
            raise UserError(
                "data.path: expected absolute file names in tables of several folders, got the relative name "
                f"{name!r} of a file in {folder!r}; write absolute names, or read one table"
            )
    return start


def list_folder(folder: str) -> Listing:
    """Return all visible files below a folder; each directory is read once.

    As in `datasets`, the list omits names that start with a dot and directories whose name starts with two
    underscores. A link to a file counts as a file. Links to directories are not followed. The list also omits
    folders that hf_ssl wrote, caches of `datasets` (`hf_ssl.data.own_folders`), and folders of thumbnails and
    deleted files (`_OF_SYSTEMS`).

    Raises:
        UserError: the folder itself cannot be read, its path is not valid UTF-8, or it is the output folder
            of a run.
    """
    root = os.path.realpath(folder)
    if not is_utf8(root):
        raise UserError(f"data.path: expected a folder whose path is valid UTF-8, got {root!r}; rename it")
    listed_ns = time.time_ns()
    files: list[File] = []
    directories: dict[str, int] = {}
    waiting = [root]
    while waiting:
        directory = waiting.pop()
        try:
            changed_ns = os.stat(directory).st_mtime_ns
            with os.scandir(directory) as scanned:
                entries = list(scanned)
            names = {entry.name for entry in entries}
            found = own_folder(directory, names)
            if found is not None and directory != root:
                logger.warning("images in %s are not used: it is %s", directory, found)
                continue
            if found is not None and RUN_MARK in names:
                raise UserError(
                    f"data.path: expected a folder of images, got {root!r}, which is {found}; use another "
                    "folder"
                )
            directories[directory] = changed_ns
            for entry in entries:
                if is_cache_of_datasets(entry.name, names):
                    continue
                try:
                    _add_entry(entry, files, waiting)
                except OSError as error:  # the entry was removed meanwhile, or is a link to itself
                    logger.warning("%s is not used: %s", entry.path, error.strerror)
        except OSError as error:
            if directory == root:
                raise UserError(
                    f"data.path: expected a readable folder, got {error}; check its permissions"
                ) from error
            logger.warning("images below %s are not used: %s", directory, error.strerror)
    return Listing(root, sorted(files), directories, listed_ns)


def _add_entry(entry: "os.DirEntry[str]", files: list[File], directories: list[str]) -> None:
    """Append the entry to the files or to the directories, unless it is hidden or of another kind."""
    if entry.name.startswith("."):
        return
    is_directory = entry.is_dir(follow_symlinks=False)
    if is_directory and (entry.name.startswith("__") or entry.name in _OF_SYSTEMS):
        return
    if not is_utf8(entry.name):
        logger.warning("%r is not used: its name is not valid UTF-8; rename it", entry.path)
    elif not is_directory and entry.is_dir():
        logger.warning("images in %s are not used: links to folders are not followed", entry.path)
    elif is_directory:
        directories.append(entry.path)
    elif entry.is_file():
        status = entry.stat()
        files.append(File(entry.path, status.st_size, file_state(status)))


def is_utf8(name: str) -> bool:
    """Return whether a name is valid UTF-8, so that a table can contain it.

    Names from old archives may have another encoding.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def fingerprint(files: list[str], sizes: list[int] | None = None) -> str:
    """Return a fingerprint of files (16 hexadecimal digits), independent of their folder and their times.

    It is a hash of all names and sizes, and of the first and last 64 KiB of some files. These are all files
    if there are fewer than 512, otherwise 256 to 384 evenly spaced files. (A Parquet file ends with an index
    of its content.)

    Args:
        files: absolute paths.
        sizes: sizes of the files in bytes; None reads them from the file system.
    """
    if sizes is None:
        sizes = [os.path.getsize(file) if os.path.exists(file) else -1 for file in files]
    root = os.path.join(os.path.commonpath({os.path.dirname(file) for file in files}), "")
    digest = hashlib.blake2b(digest_size=8)
    step = max(1, len(files) // _HASHED_FILES)
    for number, (file, size) in enumerate(sorted(zip(files, sizes, strict=True))):
        digest.update(f"{file.removeprefix(root)} {size}\n".encode())
        if number % step == 0:
            # A file that cannot be read counts as a broken image later.
            with suppress(OSError), open(file, "rb") as opened:
                digest.update(opened.read(_HASHED_BYTES))
                opened.seek(max(0, size - _HASHED_BYTES))
                digest.update(opened.read(_HASHED_BYTES))
    return digest.hexdigest()
