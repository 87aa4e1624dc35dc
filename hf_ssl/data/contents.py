# SPDX-License-Identifier: Apache-2.0
"""Finds images with the same content: the same bytes in a table, in a file or in a zip archive."""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import numpy as np
from datasets import Dataset

from hf_ssl.data.columns import encoded_images
from hf_ssl.data.decode import EncodedBytes, ImageObject, StoredImage
from hf_ssl.data.sources import Source

MOST_BYTES = 2**32
"""Images are not compared if more bytes of images with equal sizes would have to be read."""
_ROWS = 256
_IN_ARCHIVE = re.compile(r"zip://(?P<name>.*?)::(?P<archive>.*)", re.DOTALL)


class _Contents:
    """Sizes and contents of stored images. An archive is opened once."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened, self._archives = opened, dict[str, zipfile.ZipFile]()

    def size(self, image: StoredImage) -> int:
        """Return the number of bytes of an image, -1 if it is not known."""
        if isinstance(image, ImageObject):
            return image.value.nbytes if isinstance(image.value, np.ndarray) else -1
        if image.data is not None:
            return len(image.data)
        path = image.path or ""
        try:
            if match := _IN_ARCHIVE.fullmatch(path):
                return self._archive(match["archive"]).getinfo(match["name"]).file_size
            return os.path.getsize(path)
        except (OSError, KeyError, zipfile.BadZipFile):
            return -1

    def read(self, image: StoredImage) -> EncodedBytes:
        """Return the bytes of an image whose size is known, b"" if they cannot be read."""
        if isinstance(image, ImageObject):
            return cast(np.ndarray, image.value).tobytes()
        if image.data is not None:
            return image.data
        path = str(image.path)
        try:
            if match := _IN_ARCHIVE.fullmatch(path):
                return self._archive(match["archive"]).read(match["name"])
            with open(path, "rb") as file:
                return file.read()
        except (OSError, RuntimeError, zipfile.BadZipFile):  # RuntimeError: an encrypted file
            return b""

    def _archive(self, path: str) -> zipfile.ZipFile:
        if path not in self._archives:
            self._archives[path] = self._opened.enter_context(zipfile.ZipFile(path))
        return self._archives[path]


def same_contents(sources: list[Source]) -> list[np.ndarray] | None:
    """Return a number for each image, which is equal for images with the same content.

    Only images with equal sizes are read.

    Args:
        sources: map-style data.

    Returns:
        One array (N,) int64 for each source. None if a source is a data set in Python, or if more than
        `MOST_BYTES` bytes would have to be read.
    """
    if not all(isinstance(source.dataset, Dataset) for source in sources):
        return None
    with ExitStack() as opened:
        contents = _Contents(opened)
        sizes = np.array([contents.size(image) for source in sources for image in _images(source)], np.int64)
        _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        candidates = (counts[inverse] > 1) & (sizes > 0)
        if sizes[candidates].sum() > MOST_BYTES:
            return None
        numbers = np.arange(len(sizes))
        known: dict[bytes, int] = {}
        start = 0
        for source in sources:
            wanted = np.flatnonzero(candidates[start : start + len(source.dataset)])
            for row, image in zip(wanted.tolist(), _images(source, wanted), strict=True):
                if content := contents.read(image):
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    numbers[start + row] = known.setdefault(digest, start + row)
            start += len(source.dataset)
    return np.split(numbers, np.cumsum([len(source.dataset) for source in sources])[:-1])


def _images(source: Source, rows: np.ndarray | None = None) -> Iterator[StoredImage]:
    """Yield the stored images of all rows or of some rows."""
    column = source.image_column
    table = source.dataset.select_columns([column])
    table = (table if rows is None else table.select(rows)).with_format("arrow")
    for batch in table.iter(_ROWS):
        yield from encoded_images(batch, column, folder=source.folder)
