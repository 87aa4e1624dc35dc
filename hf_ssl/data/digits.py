# SPDX-License-Identifier: Apache-2.0
"""The built-in data set: scikit-learn's 1797 real handwritten digits of 8x8 pixels; no download."""

import io

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image

from hf_ssl.data.ordering import permutation

SPLITS = {"train": slice(0, 1297), "test": slice(1297, 1797)}


def digits() -> dict[str, Dataset]:
    """Both splits, shuffled once and for all, with the columns `image` (PNG, grey 0 to 16 scaled to 0 to 255)
    and `label`.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test set).
    """
    from sklearn.datasets import load_digits  # slow to import, and needed for this data set alone

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    order = permutation(len(pixels), 1998)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    encoded = [{"bytes": _png(pixels[row]), "path": None} for row in order]
    return {
        split: Dataset.from_dict({"image": encoded[rows], "label": labels[order[rows]]}, features=features)
        for split, rows in SPLITS.items()
    }


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
