# SPDX-License-Identifier: Apache-2.0
"""The bootstrap over test images: standard errors, and differences between encoders on the same test images.

This module does not import torch.

Legend: R runs, N images, S samples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_PACKED = 100_000
"""The largest number of test images whose predictions are stored: 25,000 characters."""

SAMPLES = 100
"""Number of samples of `bootstrap_error`."""

_CHUNK = 200


class Difference(NamedTuple):
    """A difference of two accuracies.

    Attributes:
        value: accuracy of the first minus accuracy of the second.
        low, high: limits of the 95 % interval.
        p: probability of a difference of the other sign, two-sided.
    """

    value: float
    low: float
    high: float
    p: float


def pack_right(right: NDArray[np.bool_]) -> str:
    """Return which images (N,) were classified correctly, as a text with 4 images in each character.

    The first image is the highest bit of the first hexadecimal digit. Missing bits at the end are 0.
    """
    return np.packbits(np.asarray(right, bool)).tobytes().hex()


def unpack_right(text: str, images: int) -> NDArray[np.bool_]:
    """Return the array (N,) of `pack_right`.

    Raises:
        ValueError: the text does not belong to this number of images.
    """
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(packed) != -(-images // 8):
        raise ValueError(f"predictions: expected {images} images, got {8 * len(packed)} bits")
    return np.unpackbits(packed, count=images).astype(bool)


def bootstrap_error(
    statistic: Callable[[NDArray[np.int64]], float], count: int, seed: int, samples: int = SAMPLES
) -> float:
    """Return the standard deviation (n - 1) of a statistic over samples of the images with replacement.

    Args:
        statistic: returns the value of the images with these row numbers (N,), or NaN if they have none. Such
            samples are left out. With fewer than two others, the result is 0.
        count: N.
        seed: seed of the samples. Protocols use the seed of the evaluation.
        samples: number of samples.
    """
    generator = np.random.default_rng(seed)
    values = [float(statistic(generator.integers(count, size=count))) for _ in range(samples)]
    values = [value for value in values if not math.isnan(value)]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_bootstrap(
    first: Sequence[NDArray[np.bool_]],
    second: Sequence[NDArray[np.bool_]],
    *,
    samples: int = 5000,
    seed: int = 0,
) -> Difference:
    """Return the difference of the mean accuracies of two groups of runs, with its uncertainty.

    Each sample draws images with replacement, the same ones for all runs. It also draws runs of each group
    with replacement. The interval thus contains the variation over test images and over seeds. For a group of
    one run, it contains only the variation over test images.

    Args:
        first, second: for each run, which of the same N images were classified correctly (N,).
        samples: number of samples.
        seed: seed of the samples.

    Source: Efron & Tibshirani 1993, percentile interval. The p-value is (k + 1) / (S + 1), doubled, where k
    samples have the rarer sign.
    """
    rows = [np.stack(group).astype(np.float32) for group in (first, second)]
    images = rows[0].shape[1]
    generator = np.random.default_rng(seed)
    found = []
    for start in range(0, samples, _CHUNK):
        count = min(_CHUNK, samples - start)
        weights = generator.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float32)
        means = []
        for group in rows:
            accuracies = weights @ group.T / images  # (S, R)
            chosen = generator.integers(len(group), size=accuracies.shape)
            means.append(np.take_along_axis(accuracies, chosen, axis=1).mean(axis=1))
        found.append(means[0] - means[1])
    differences = np.concatenate(found).astype(np.float64)
    low, high = np.quantile(differences, [0.025, 0.975])
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return Difference(
        value=float(rows[0].mean(dtype=np.float64) - rows[1].mean(dtype=np.float64)),
        low=float(low),
        high=float(high),
        p=float(min(1, 2 * (rarer + 1) / (samples + 1))),
    )
