# SPDX-License-Identifier: Apache-2.0
"""Decodes the images of map-style data once, into memory or a file (layer 1).

Images of one size that are decoded once are read far faster than images that are decoded each time.
"""

import hashlib
import json
import logging
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import datasets
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor

from hf_ssl.data.batch import is_small
from hf_ssl.data.images import CHUNK, EncodedRows
from hf_ssl.data.inspection import common_size
from hf_ssl.data.readers import decoder_state
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError
from hf_ssl.files import read_json, replaced_file, write_json
from hf_ssl.progress import progress
from hf_ssl.resources import usable_cores

logger = logging.getLogger(__name__)

_AUTO_BYTES = 4 << 30


@dataclass(eq=False)
class DecodedRows:
    """The images of map-style data, decoded in advance.

    Attributes:
        pixels: (N, C, H, W) uint8.
        broken: row -> message, for broken images. Their pixels are zero.
        file: the file that `pixels` is mapped from; None for an array in memory.
        description: name of the data set, for messages.
    """

    pixels: np.ndarray
    broken: dict[int, str]
    file: Path | None
    description: str

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Return images (B, C, H, W) of rows (B,), and {position in `rows`: message} of broken images."""
        return torch.from_numpy(self.pixels[rows]), _broken_positions(self.broken, rows)

    def __getstate__(self) -> dict:
        """Return the state without mapped pixels; a worker that is not forked opens the file itself."""
        state = self.__dict__.copy()
        if self.file is not None:
            del state["pixels"]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.file is not None:
            self.pixels = np.load(self.file, mmap_mode="r")


class RowNumbers:
    """Replaces decoded images that are stored on a device: `read` returns row numbers instead of pixels.

    A worker gets this object, because its own process cannot read images on a GPU.
    """

    def __init__(self, decoded: DecodedRows) -> None:
        self._count = len(decoded)
        self.broken = decoded.broken
        self.size: tuple[int, int] = decoded.pixels.shape[2:]
        self.description = decoded.description

    def __len__(self) -> int:
        return self._count

    def read(self, rows: np.ndarray) -> tuple[Tensor, dict[int, str]]:
        """Return the row numbers (B,) int64, and {position in `rows`: message} of the broken images."""
        return torch.from_numpy(rows.copy()), _broken_positions(self.broken, rows)


def _broken_positions(broken: dict[int, str], rows: np.ndarray) -> dict[int, str]:
    """Return {position in `rows`: message} of the broken images."""
    if not broken:
        return {}
    return {position: broken[row] for position, row in enumerate(rows.tolist()) if row in broken}


_in_use: WeakValueDictionary[tuple, DecodedRows] = WeakValueDictionary()


class _SizeMismatch(Exception):
    """An image of another size than the first images. The text names the image and its size."""


_reported: set[str] = set()
"""Data that were reported because they cannot be cached."""


def decoded_rows(source: Source, channels: int, cache: str, *, shared: bool = False) -> DecodedRows | None:
    """Return the decoded images of a source, or None if they are not cached. They are decoded at first use.

    Args:
        source: map-style data.
        channels: number of channels of the image column.
        cache: "none", "memory", "device" (decoded in memory first) or "memmap"; "auto" caches images of one
            size, of at most 96 pixels per side and 4 GiB in total. Images of several sizes cannot be cached:
            with "memory", this is a warning, because recipes set it.
        shared: whether several processes on this machine need them; "auto" then uses a file.

    Raises:
        UserError: `cache` is "device" or "memmap" and the sizes of the images differ, or the disk is full.
    """
    key = (cache, channels, shared, source.value_range)
    in_python = not isinstance(source.dataset, Dataset)  # items may differ each time, as random ones do
    if cache == "none" or (cache == "auto" and in_python):
        return None
    if cache == "memmap" and in_python:
        raise UserError(
            "data.cache: expected none, memory or device for a data set in Python, which has no fingerprint, "
            "got memmap; use data.cache=memory"
        )
    if key not in source.cache and in_python:
        source.cache[key] = _decode_rows(source, channels, cache, shared)
    elif key not in source.cache:
        # Data that are opened twice, for training and for the monitor, are decoded and stored once.
        data = f"{source.revision} {source.identity}"
        shared_key = (data, source.image_column, *source.further_columns.items(), *key)
        decoded = _in_use.get(shared_key)
        if decoded is None:
            decoded = _decode_rows(source, channels, cache, shared)
            if decoded is not None:
                _in_use[shared_key] = decoded
        source.cache[key] = decoded
    return source.cache[key]


def _decode_rows(source: Source, channels: int, cache: str, shared: bool) -> DecodedRows | None:
    rows = EncodedRows(source, channels)
    size = common_size(source, channels)
    if cache == "auto":
        if size is None or not is_small(size) or len(rows) * rows.channels * math.prod(size) > _AUTO_BYTES:
            return None
    try:
        if size is None:
            raise _SizeMismatch(f"more than one size in {source.description}")
        shape = (len(rows), rows.channels, *size)
        if cache == "memmap" or (cache == "auto" and shared):
            return _decode_to_file(source, rows, shape)
        pixels = np.zeros(shape, np.uint8)
        return DecodedRows(pixels, _fill(pixels, rows), None, source.description)
    except _SizeMismatch as error:
        if cache not in ("auto", "memory"):
            raise UserError(
                f"data.cache: expected images of one size for data.cache={cache}, got {error}; use "
                "data.cache=none"
            ) from None
        if cache == "memory" and source.description not in _reported:
            _reported.add(source.description)
            logger.warning("data.cache=memory has no effect on images of several sizes: %s", error)
        return None


def _decode_to_file(source: Source, rows: EncodedRows, shape: tuple[int, ...]) -> DecodedRows:
    """Open the file of decoded images in the cache folder of `datasets`; write it first if it is missing."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_ssl"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.revision}-{source.identity}-{source.image_column}-{shape[1]}-{decoder_state()}"
    if source.value_range is not None:
        name += f"-{source.value_range[0]}-{source.value_range[1]}"
    if source.further_columns:
        name += "-" + hashlib.sha256(json.dumps(source.further_columns).encode()).hexdigest()[:16]
    file, notes = folder / f"{name}.npy", folder / f"{name}.json"
    with FileLock(folder / f"{name}.lock"):  # the processes of a run open the file at the same time
        if not file.exists():
            _check_space(folder, int(np.prod(shape)))
            with replaced_file(file) as staging:
                pixels = np.lib.format.open_memmap(staging, mode="w+", dtype=np.uint8, shape=shape)
                write_json(notes, _fill(pixels, rows))
                pixels.flush()
                del pixels
    broken = {int(row): reason for row, reason in read_json(notes).items()}
    return DecodedRows(np.load(file, mmap_mode="r"), broken, file, source.description)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"data.cache: expected {needed / 2**30:.1f} GiB of free space in {folder} for data.cache=memmap, "
            f"got {free / 2**30:.1f} GiB; set HF_DATASETS_CACHE to another disk, or use data.cache=none"
        )


def _fill(pixels: np.ndarray, rows: EncodedRows) -> dict[int, str]:
    """Decode all images into `pixels` (N, C, H, W), and return {row: message} of the broken images.

    Several threads decode, because decoders release the global interpreter lock. After an interruption, this
    function ends within the time of one chunk: it waits only for running threads.
    """
    broken: dict[int, str] = {}
    starts = range(0, len(rows), CHUNK)
    threads = ThreadPoolExecutor(min(8, usable_cores()))
    try:
        with progress(f"decoding {rows.description}", len(rows)) as bar:
            for count, part in threads.map(lambda start: _fill_chunk(pixels, rows, start), starts):
                broken.update(part)
                bar.update(count)
    finally:
        threads.shutdown(cancel_futures=True)
    return broken


def _fill_chunk(pixels: np.ndarray, rows: EncodedRows, start: int) -> tuple[int, dict[int, str]]:
    numbers = np.arange(start, min(start + CHUNK, len(rows)))
    images, broken = rows.read(numbers)
    for position, image in enumerate(images):
        if position in broken:
            continue
        if image.shape != pixels.shape[1:]:
            expected, got = pixels.shape[2:], tuple(image.shape[1:])
            raise _SizeMismatch(
                f"{got[0]}x{got[1]} pixels instead of {expected[0]}x{expected[1]} in "
                f"{rows.describe(int(numbers[position]))}"
            )
        pixels[numbers[position]] = image.numpy()
    return len(numbers), {int(numbers[position]): text for position, text in broken.items()}
