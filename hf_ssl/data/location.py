# SPDX-License-Identifier: Apache-2.0
"""What `data.path` means: something built in, files, or a data set on the Hub."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_ssl.errors import UserError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOADERS = {".parquet": "parquet", ".tar": "webdataset", ".zip": "imagefolder", ".arrow": "arrow"}
ZIP = ".zip"
IMAGE = "image"
_IMAGE_ENDINGS = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .pbm .pgm .ppm .pnm "
    ".jp2 .j2k .jpc .jpf .jpx .j2c .ico .icns .cur .tga .icb .vda .vst .psd .pcx .dcx .dds .blp .fli .flc "
    ".ftc .ftu .gbr .im .msp .pcd .pxr .bw .rgb .rgba .sgi .ras .xbm .xpm .fit .fits".split()
)
"""The endings that `datasets` 5 treats as images, except those that Pillow cannot decode by itself: videos
(.mpg, .mpeg), PostScript (.ps, .eps), Windows metafiles (.wmf, .emf), weather data (.bufr, .grib) and IPTC
records (.iim)."""
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
        matches = sorted(glob.glob(expanded, recursive=True))
        files = [match for match in matches if os.path.isfile(match)]
        if matches and not files:
            raise UserError(
                f"data.path: expected a pattern that matches files, got {path!r}, which matches only "
                f"folders; use '{path.rstrip('/')}/*'"
            )
        return _files(path, files)
    if _HUB_ID.fullmatch(path) and not path.endswith(tuple(_LOADERS)):
        return Location("hub", path)
    raise UserError(
        f"expected data.path to be a folder, files or a data set on the Hub, got {path!r}: it does not exist"
    )


def _files(path: str, files: list[str]) -> Location:
    if not files:
        raise UserError(f"no files match data.path={path!r}")
    kind = main_kind(map(kind_of, files))
    if kind is None or (kind != IMAGE and any(kind_of(file) != kind for file in files)):
        endings = sorted({Path(file).suffix.lower() for file in files})
        raise UserError(
            f"expected data.path={path!r} to match Parquet files, WebDataset tars or images only, got files "
            f"that end in "
            f"{', '.join(ending or '(nothing)' for ending in endings)}"
        )
    chosen = tuple(os.path.abspath(file) for file in files if kind_of(file) == kind)
    return Location("local", "imagefolder" if kind == IMAGE else _LOADERS[kind], chosen)


def kind_of(file: str) -> str | None:
    """Return IMAGE for an image, the ending in lower case for a file that may contain images, else None."""
    ending = os.path.splitext(file)[1].lower()
    if ending in _IMAGE_ENDINGS:
        return IMAGE
    return ending if ending in _LOADERS else None


def main_kind(kinds: Iterable[str | None]) -> str | None:
    """Return the most frequent kind of files (Parquet in case of a tie); None if no file has a kind."""
    counts = Counter(kind for kind in kinds if kind is not None)
    return max(counts, key=lambda kind: (counts[kind], kind == ".parquet", kind), default=None)


def fingerprint(files: list[str], sizes: list[int] | None = None) -> str:
    """Tells data apart, wherever they lie and whenever they were copied: 16 hexadecimal digits.

    A hash of all names and sizes and of the beginnings and ends of up to 256 files (a Parquet file ends with
    the index of all that is in it).

    Args:
        files: absolute paths.
        sizes: sizes of the files in bytes; None reads them from the file system.
    """
    if sizes is None:
        sizes = [os.path.getsize(file) for file in files]
    root = os.path.join(os.path.commonpath({os.path.dirname(file) for file in files}), "")
    digest = hashlib.blake2b(digest_size=8)
    step = max(1, len(files) // _HASHED_FILES)
    for number, (file, size) in enumerate(sorted(zip(files, sizes, strict=True))):
        digest.update(f"{file.removeprefix(root)} {size}\n".encode())
        if number % step == 0:
            with (
                suppress(OSError),
                open(file, "rb") as opened,
            ):  # a file that cannot be read counts as a broken image later
                digest.update(opened.read(_HASHED_BYTES))
                opened.seek(max(0, size - _HASHED_BYTES))
                digest.update(opened.read(_HASHED_BYTES))
    return digest.hexdigest()
