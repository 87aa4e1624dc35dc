# SPDX-License-Identifier: Apache-2.0
"""Random numbers as a pure function of a seed and a counter, vectorised over a batch.

Legend: B batch, n numbers. Everything is `uint64` arithmetic modulo 2**64: the same on every machine, in
every worker, in any order, with no state to save. The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA
2014): number i of the stream with seed s is finalise(s + (i + 1) * golden).
"""

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MASK = 0xFFFFFFFFFFFFFFFF
FOR_METHODS = 1 << 20
"""The first number of an image's stream that a method may use (masks, noise); views use those before."""


def seeds(run_seed: int, pass_number: int | NDArray[np.integer], keys: Keys) -> Keys:
    """One seed for each image: hash(run seed, pass, key).

    Args:
        run_seed: any integer (used modulo 2**64).
        pass_number: how often the data was gone through, counted where the row is read: a number or (B,).
        keys: (B,) uint64, the row number, or a hash of the encoded bytes; two keys never collide.
    """
    passes = np.atleast_1d(np.asarray(pass_number)).astype(np.uint64)
    state = _absorb(np.zeros(1, np.uint64), np.array([run_seed & MASK], np.uint64))
    return _absorb(_absorb(state, passes), np.asarray(keys, np.uint64))


def uniforms(seeds: Keys, first: int, count: int) -> NDArray[np.float64]:
    """Numbers `first` to `first + count - 1` of each seed's stream: (B, count), uniform in [0, 1)."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * GOLDEN
    bits = _finalise(seeds[:, None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _absorb(state: Keys, value: Keys) -> Keys:
    return _finalise(state ^ _finalise(value + GOLDEN))


def _finalise(bits: Keys) -> Keys:
    """A bijection of 64-bit numbers; each input bit flips about half of the output bits."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
