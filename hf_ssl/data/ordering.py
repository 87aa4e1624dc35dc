# SPDX-License-Identifier: Apache-2.0
"""Random orders that depend only on a key, so that no state has to be saved."""

import numpy as np


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of 0 ... size - 1 that depends on the key alone: (size,) int64.

    Made from the raw output of a counter-based generator, which NumPy keeps the same for ever (NEP 19), while
    what `Generator.permutation` does with it may change.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def replacement(size: int, *key: int) -> int:
    """A random row that depends on the key alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % np.uint64(size))
