# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from hf_ssl.random import draw_indices, image_seeds, permutation, random_index, uniforms

KEYS = np.arange(4, dtype=np.uint64)


def test_uniforms_are_splitmix64():
    # The first numbers of the reference implementation (Vigna, splitmix64.c) from this state.
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = np.array(first, np.uint64) >> np.uint64(11)
    got = uniforms(np.array([1234567], np.uint64), 0, 4)[0]
    assert (got * 2.0**53).astype(np.uint64).tolist() == expected.tolist()


def splitmix64(seed, position):
    """Return one number of the stream, in integers of any size."""
    bits = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


@pytest.mark.parametrize("first", [0, 1 << 20, (1 << 20) + 3 * 2**32])
@pytest.mark.parametrize("size", [1, 7, 10**9])
def test_indices_on_a_device_come_from_the_same_stream(size, first):
    seeds = np.array([0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15], np.uint64)
    found = draw_indices(torch.from_numpy(seeds.view(np.int64)), first, 20, size)
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [(splitmix64(seed, first + i) >> 1) % size for i in range(20)] for seed in seeds.tolist()
    ]


def test_a_part_of_a_stream_equals_that_part_of_the_whole():
    state = image_seeds(0, 0, KEYS)
    whole = uniforms(state, 0, 100)
    assert (uniforms(state, 30, 20) == whole[:, 30:50]).all()
    assert (uniforms(state[2:3], 99, 1) == whole[2:3, 99:]).all()


def test_uniforms_are_uniform_from_0_to_1():
    numbers = uniforms(image_seeds(0, 0, np.arange(1000, dtype=np.uint64)), 0, 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square with 99 degrees of freedom, p = 0.001


def test_image_seeds_never_change():
    """A change would alter the views of every run that resumes or is repeated."""
    expected = [13460947534359457227, 14443793949924185386, 1110270202821343304, 13619951112928673808]
    assert image_seeds(7, 3, KEYS).tolist() == expected


def test_image_seeds_differ_by_run_epoch_and_key():
    keys = np.arange(500, dtype=np.uint64)
    every = [image_seeds(run, epoch, keys) for run in range(-2, 5) for epoch in range(6)]
    assert len(np.unique(np.concatenate(every))) == 7 * 6 * 500


def test_each_image_can_have_its_own_epoch():
    epochs = np.array([0, 1, 2, 1])
    expected = [image_seeds(5, int(epoch), KEYS[i : i + 1])[0] for i, epoch in enumerate(epochs)]
    assert image_seeds(5, epochs, KEYS).tolist() == expected


@pytest.mark.filterwarnings("error")
def test_overflow_gives_no_warning():
    image_seeds(-1, 2**40, np.array([2**64 - 1], np.uint64))
    image_seeds(2**70 + 3, np.int64(1), KEYS)
    assert image_seeds(2**64 + 3, 0, KEYS).tolist() == image_seeds(3, 0, KEYS).tolist()


def test_each_bit_of_the_key_flips_half_of_the_seed():
    keys = np.uint64(1) << np.arange(64, dtype=np.uint64)
    flipped = image_seeds(0, 0, keys) ^ image_seeds(0, 0, np.zeros(64, np.uint64))
    counts = [bin(bits).count("1") for bits in flipped.tolist()]
    assert 12 < min(counts) and max(counts) < 52 and 30 < np.mean(counts) < 34


def test_permutation_depends_only_on_its_key():
    first = permutation(1000, 3, 7)
    assert (first == permutation(1000, 3, 7)).all()
    assert sorted(first.tolist()) == list(range(1000))
    for other in ((3, 8), (4, 7), (7, 3)):
        assert (first == permutation(1000, *other)).sum() < 20


def test_permutation_never_changes():
    """A run must resume exactly with another version of NumPy or of this package."""
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


def test_permutation_is_uniform():
    counts = np.zeros((6, 6))
    for key in range(3000):
        counts[np.arange(6), permutation(6, key)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03


def test_random_index_never_changes():
    """A run must replace unreadable images by the same ones when it resumes."""
    assert [random_index(1000003, 7, 3, 5, number) for number in range(3)] == [964058, 264606, 238760]


def test_random_index_is_uniform_and_depends_only_on_its_key():
    numbers = [random_index(7, 3, key) for key in range(3000)]
    assert numbers == [random_index(7, 3, key) for key in range(3000)]
    counts = np.bincount(numbers, minlength=7)
    assert len(counts) == 7 and ((counts - 3000 / 7) ** 2 / (3000 / 7)).sum() < 22.5  # p = 0.001
