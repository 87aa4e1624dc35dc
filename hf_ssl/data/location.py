# SPDX-License-Identifier: Apache-2.0
"""What `data.path` means: something built in, files, or a data set on the Hub."""

import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_ssl.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".zip": "imagefolder"}
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_HASHED_FILES = 256
_HASHED_BYTES = 1 << 16


@dataclass(frozen=True)
class Location:
    """Where images are.

    Attributes:
        kind: "digits" (built in), "local" or "hub".
        loader: what `datasets.load_dataset_builder` is to be called with: a folder, a Hub id, or the name of
            a loader.
        files: for the last of these, the files.
    """

    kind: Literal["digits", "local", "hub"]
    loader: str
    files: tuple[str, ...] = ()


def locate(path: str) -> Location:
    """Finds out what a path means. Raises UserError if it can be neither files nor the name of a data set."""
    if path == "digits":
        return Location("digits", path)
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return Location("local", expanded)
    if os.path.isfile(expanded):
        return _files(path, [expanded])
    if glob.has_magic(expanded):
        return _files(path, sorted(glob.glob(expanded, recursive=True)))
    if _HUB_ID.fullmatch(path) and not path.endswith(tuple(_LOADERS)):
        return Location("hub", path)
    raise UserError(
        f"expected data.path to be a folder, files or a data set on the Hub, got {path!r}: it does not exist"
    )


def _files(path: str, files: list[str]) -> Location:
    if not files:
        raise UserError(f"no files match data.path={path!r}")
    endings = sorted({Path(file).suffix.lower() for file in files})
    loaders = {"imagefolder" if ending in _IMAGE_ENDINGS else _LOADERS.get(ending) for ending in endings}
    if len(loaders) != 1 or None in loaders:
        raise UserError(
            f"expected data.path={path!r} to match Parquet files, WebDataset tars or images only, got files "
            f"that end in "
            f"{', '.join(ending or '(nothing)' for ending in endings)}"
        )
    return Location("local", str(loaders.pop()), tuple(os.path.abspath(file) for file in files))


def fingerprint(files: list[str]) -> str:
    """Tells data apart, wherever they lie and whenever they were copied: 16 hexadecimal digits.

    A hash of all names and sizes and of the beginnings and ends of up to 256 files (a Parquet file ends with
    the index of all that is in it).
    """
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    digest = hashlib.blake2b(digest_size=8)
    step = max(1, len(files) // _HASHED_FILES)
    for number, file in enumerate(sorted(files)):
        size = os.path.getsize(file)
        digest.update(f"{os.path.relpath(file, root)} {size}\n".encode())
        if number % step == 0:
            with open(file, "rb") as opened:
                digest.update(opened.read(_HASHED_BYTES))
                opened.seek(max(0, size - _HASHED_BYTES))
                digest.update(opened.read(_HASHED_BYTES))
    return digest.hexdigest()
