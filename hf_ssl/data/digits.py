# SPDX-License-Identifier: Apache-2.0
"""The built-in data set: handwritten digits from scikit-learn."""

import struct
import zlib
from functools import cache
from importlib import metadata

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image

from hf_ssl.random import permutation

_DIGITS_SPLITS = {"train": slice(0, 1297), "test": slice(1297, 1797)}


@cache
def digits() -> dict[str, Dataset]:
    """Return the built-in data set: the 1797 handwritten digits of scikit-learn, 8 x 8 pixels.

    Both splits are shuffled with a fixed order. They have the columns `image` (PNG, gray, 0 to 16 scaled to 0
    to 255) and `label`. Nothing is downloaded.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test set).
    """
    values, labels = _load_digits()
    pixels = np.rint(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    order = permutation(len(pixels), 1998)
    label = ClassLabel(names=[str(digit) for digit in range(10)])
    features = datasets.Features({"image": Image(), "label": label})
    encoded = [{"bytes": _png(pixels[row]), "path": None} for row in order]
    return {
        split: Dataset.from_dict({"image": encoded[rows], "label": labels[order[rows]]}, features=features)
        for split, rows in _DIGITS_SPLITS.items()
    }


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `sklearn.datasets.load_digits(return_X_y=True)`.

    This function reads the file without importing scikit-learn, which would take half a CPU second. If a
    version later than 1.9 stores the file in another place, scikit-learn loads it.
    """
    file = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    try:
        table = np.loadtxt(str(file), delimiter=",", dtype=np.int64)
    except OSError:
        from sklearn.datasets import load_digits

        return load_digits(return_X_y=True)
    return table[:, :-1].astype(np.float64), table[:, -1]


def _png(pixels: np.ndarray) -> bytes:
    """Return an uncompressed PNG file of a small gray image (H, W).

    The bytes do not depend on the version of a library. Pillow would take 20 times as long: a tenth of a
    second for all images. Source: RFC 2083 (PNG).
    """
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    # Each line begins with the number of its filter; 0 means no filter.
    lines = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
