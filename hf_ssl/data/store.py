# SPDX-License-Identifier: Apache-2.0
"""Decoded images of one size, in memory or in a file mapped into it: far faster than decoding each time."""

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast
from weakref import WeakValueDictionary

import datasets
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor

from hf_ssl.data.batch import SMALL
from hf_ssl.data.images import EncodedRows, probe
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError
from hf_ssl.files import replaced_file, write_json
from hf_ssl.progress import progress

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when decoding changes what pixels come out
_AUTO_BYTES = 4 << 30
_CHUNK = 64  # images; even large ones are decoded in a few seconds at most


class DecodedRows:
    """The images of map-style data, decoded beforehand.

    Attributes:
        pixels: (N, C, H, W) uint8.
        broken: row -> message, for rows whose pixels are therefore empty.
    """

    def __init__(
        self, pixels: np.ndarray, broken: dict[int, str], file: Path | None, description: str
    ) -> None:
        self.pixels = pixels
        self.broken = broken
        self.file = file
        self.description = description

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """(B, C, H, W) uint8, and position in `rows` -> message where the image is broken."""
        return torch.from_numpy(self.pixels[rows]), _among(self.broken, rows)

    def __getstate__(self) -> dict:
        """A worker that is not forked opens the file itself."""
        state = self.__dict__.copy()
        if self.file is not None:
            del state["pixels"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            self.pixels = np.load(self.file, mmap_mode="r")


class NumberedRows:
    """Stands in for decoded images that lie on a device: the row numbers are what is read.

    A worker has it in place of the images, which a process of its own cannot reach on a GPU.
    """

    def __init__(self, stored: DecodedRows) -> None:
        self._count = len(stored)
        self.broken = stored.broken
        self.size: tuple[int, int] = stored.pixels.shape[2:]
        self.description = stored.description

    def __len__(self) -> int:
        return self._count

    def read(self, rows: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """(B,) int64, and position in `rows` -> message where the image is broken."""
        return torch.from_numpy(rows.copy()), _among(self.broken, rows)


def _among(broken: dict[int, str], rows: np.ndarray) -> dict[int, str]:
    """Position in `rows` -> message, of those that are broken."""
    if not broken:
        return {}
    return {position: broken[row] for position, row in enumerate(rows.tolist()) if row in broken}


_in_use: WeakValueDictionary[tuple, DecodedRows] = WeakValueDictionary()


class _OtherSize(Exception):
    """An image that does not fit: its text says which and how."""


def decoded_rows(source: Source, channels: int, cache: str, *, shared: bool = False) -> DecodedRows | None:
    """The decoded images of a source, made on first use; None where they are not to be held.

    Args:
        source: map-style data.
        channels: of the decoded images.
        cache: "none", "memory" or "device", "memmap"; "auto" holds images of one size up to 96 pixels and 4
            GiB in all.
        shared: several processes on this machine need them, so "auto" means a file.

    Raises:
        UserError: images of different sizes, or no space, where holding them was asked for.
    """
    key = (cache, channels, shared)
    if cache == "none":
        return None
    if key not in source.stores:
        # Data that is opened twice, to train on and to measure on, is decoded and held once.
        shared_key = (cast(Dataset, source.dataset)._fingerprint, source.image_column, *key)
        stored = _in_use.get(shared_key)
        if stored is None:
            stored = _decoded_rows(source, channels, cache, shared)
            if stored is not None:
                _in_use[shared_key] = stored
        source.stores[key] = stored
    return source.stores[key]


def _decoded_rows(source: Source, channels: int, cache: str, shared: bool) -> DecodedRows | None:
    rows = EncodedRows(source, channels)
    size = probe(source, channels).size
    if cache == "auto":
        if size is None or max(size) > SMALL or len(rows) * channels * size[0] * size[1] > _AUTO_BYTES:
            return None
    elif size is None:
        raise UserError(
            f"data.cache={cache} needs images of one size, but those of {source.description} differ: use "
            "data.cache=none"
        )
    shape = (len(rows), channels, *size)
    try:
        if cache == "memmap" or (cache == "auto" and shared):
            return _in_file(source, rows, shape)
        pixels = np.zeros(shape, np.uint8)
        return DecodedRows(pixels, _fill(pixels, rows), None, source.description)
    except _OtherSize as error:
        if cache != "auto":
            raise UserError(
                f"data.cache={cache} needs images of one size: {error}; use data.cache=none"
            ) from None
        logger.info("images are not cached because their sizes differ: %s", error)
        return None


def _in_file(source: Source, rows: EncodedRows, shape: tuple[int, ...]) -> DecodedRows:
    """Opens the file in the cache folder of `datasets`, or makes it: written beside, then renamed."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_ssl"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{cast(Dataset, source.dataset)._fingerprint}-{source.image_column}-{shape[1]}-{_FORMAT}"
    file, notes = folder / f"{name}.npy", folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):  # processes of one run want it at the same time
        if not file.exists():
            _check_space(folder, int(np.prod(shape)))
            with replaced_file(file) as staging:
                pixels = np.lib.format.open_memmap(staging, mode="w+", dtype=np.uint8, shape=shape)
                write_json(notes, _fill(pixels, rows))
                pixels.flush()
                del pixels
    broken = {int(row): reason for row, reason in json.loads(notes.read_text()).items()}
    return DecodedRows(np.load(file, mmap_mode="r"), broken, file, source.description)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"data.cache=memmap needs {needed / 2**30:.1f} GiB in {folder}, where {free / 2**30:.1f} GiB are "
            f"free: set "
            "HF_DATASETS_CACHE to another disk, or use data.cache=none"
        )


def _fill(pixels: np.ndarray, rows: EncodedRows) -> dict[int, str]:
    """Decodes everything into `pixels`, with some threads (decoders release the lock of the interpreter).

    After an interruption, this function ends within the time of one chunk: it waits only for running threads.

    Returns:
        row -> message of broken images.
    """
    broken: dict[int, str] = {}
    starts = range(0, len(rows), _CHUNK)
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        with progress(f"decoding {rows.description}", len(rows)) as bar:
            for count, part in threads.map(lambda start: _fill_chunk(pixels, rows, start), starts):
                broken.update(part)
                bar.update(count)
    finally:
        threads.shutdown(cancel_futures=True)
    return broken


def _fill_chunk(pixels: np.ndarray, rows: EncodedRows, start: int) -> tuple[int, dict[int, str]]:
    numbers = np.arange(start, min(start + _CHUNK, len(rows)))
    images, broken = rows.read(numbers)
    for position, image in enumerate(images):
        if position in broken:
            continue
        if image.shape != pixels.shape[1:]:
            expected, got = pixels.shape[2:], tuple(image.shape[1:])
            raise _OtherSize(
                f"expected {expected[0]}x{expected[1]} pixels as in the others, got {got[0]}x{got[1]} in "
                f"{rows.place(int(numbers[position]))}"
            )
        pixels[numbers[position]] = image.numpy()
    return len(numbers), {int(numbers[position]): text for position, text in broken.items()}
