# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers (layer 0): each number is a pure function of a seed and a position.

There is no state to save or to synchronize. The numbers are the same on every machine, in every worker and in
every order. They must never change, because interrupted runs resume with them. There are two generators:

- SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) makes the numbers of an image (augmentation parameters, masks,
  noise), for a whole batch at once. Number i of the stream with seed s is finalize(s + (i + 1) * golden),
  modulo 2**64.
- Philox makes the orders of the rows of a data set.

Legend: B batch, n numbers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt64Array = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MASK = 0xFFFFFFFFFFFFFFFF
FIRST_METHOD_NUMBER = 1 << 20
"""Position of the first random number that methods use (masks, noise) in the stream of an image. The
augmentation uses the numbers before it."""


def image_seeds(run_seed: int, epoch: int | NDArray[np.integer], keys: UInt64Array) -> UInt64Array:
    """Return one seed (B,) for each image: hash(run seed, epoch, key).

    Args:
        run_seed: any integer, used modulo 2**64.
        epoch: the epoch in which the image is read, one number or (B,).
        keys: (B,) uint64, the numbers of the rows. Two different keys never give the same seed.
    """
    epochs = np.atleast_1d(np.asarray(epoch)).astype(np.uint64)
    state = _absorb(np.zeros(1, np.uint64), np.array([run_seed & MASK], np.uint64))
    return _absorb(_absorb(state, epochs), np.asarray(keys, np.uint64))


def uniforms(seeds: UInt64Array, first: int, count: int) -> NDArray[np.float64]:
    """Return numbers `first` to `first + count - 1` of each seed's stream: (B, count), uniform in [0, 1)."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * GOLDEN
    bits = _finalize(seeds[:, None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_indices(seeds_B: Tensor, first: int, count: int, size: int) -> Tensor:
    """Return random numbers from 0 to `size` - 1 on the device of the seeds: (B, count) int64.

    Number i of a row depends only on the seed and on `first` + i. It is the hash of the stream of `uniforms`,
    without its last bit, modulo `size`. Numbers may repeat.

    Args:
        seeds_B: (B,) int64, the bits of the uint64 seeds of images.
        first: position of the first number in the stream of each seed.
        count: how many numbers each seed gets.
        size: at least 1. The bias is below `size` / 2**63.
    """
    # int64 arithmetic is modulo 2**64, as that of uint64. Only the right shift differs.
    counters = torch.arange(1, count + 1, device=seeds_B.device).mul_(_signed(int(GOLDEN)))
    bits = seeds_B[:, None] + counters.add_(_signed(first * int(GOLDEN)))
    for shift, factor in _HASH:
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            bits.mul_(_signed(factor))
    return (bits >> 1).bitwise_and_(MASK >> 1).remainder_(size)


def permutation(size: int, *key: int) -> np.ndarray:
    """Return a random order of 0 ... size - 1 that depends only on the key: (size,) int64.

    The order follows from the raw output of Philox. NumPy guarantees that this output never changes (NEP 19).
    The result of `Generator.permutation` may change with the version of NumPy.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def random_rows(size: int, count: int, *key: int) -> np.ndarray:
    """Return `count` different numbers from 0 to size - 1 in ascending order that depend only on the key."""
    return np.sort(permutation(size, *key)[:count])


def random_index(size: int, *key: int) -> int:
    """Return a random number from 0 to size - 1 that depends only on the key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % np.uint64(size))


def _absorb(state: UInt64Array, value: UInt64Array) -> UInt64Array:
    return _finalize(state ^ _finalize(value + GOLDEN))


_HASH = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))
"""Shifts and factors of the three rounds of the hash."""


def _finalize(bits: UInt64Array) -> UInt64Array:
    """Return 64-bit hashes of the numbers (bijective): each input bit flips about half of the output bits."""
    for shift, factor in _HASH:
        bits = bits ^ (bits >> np.uint64(shift))
        if factor is not None:
            bits = bits * np.uint64(factor)
    return bits


def _signed(number: int) -> int:
    """Return the int64 with the last 64 bits of a number."""
    return (number + (1 << 63) & MASK) - (1 << 63)
