# SPDX-License-Identifier: Apache-2.0
import numpy as np

from hf_ssl.data.ordering import permutation


def test_permutation_depends_on_its_key_alone_and_is_one():
    first = permutation(1000, 3, 7)
    assert (first == permutation(1000, 3, 7)).all()
    assert sorted(first.tolist()) == list(range(1000))
    for other in ((3, 8), (4, 7), (7, 3)):
        assert (first == permutation(1000, *other)).sum() < 20


def test_permutation_never_changes():
    # a run must resume exactly with another version of hf_ssl or numpy
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


def test_permutation_is_uniform():
    counts = np.zeros((6, 6))
    for key in range(3000):
        counts[np.arange(6), permutation(6, key)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03
