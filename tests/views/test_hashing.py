# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from hf_ssl.views import seeds, uniforms

KEYS = np.arange(4, dtype=np.uint64)


def test_the_stream_is_splitmix64():
    # The first numbers of the reference implementation (Vigna, splitmix64.c) from this state.
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = np.array(first, np.uint64) >> np.uint64(11)
    got = uniforms(np.array([1234567], np.uint64), 0, 4)[0]
    assert (got * 2.0**53).astype(np.uint64).tolist() == expected.tolist()


def test_a_part_of_a_stream_is_the_same_as_in_the_whole():
    state = seeds(0, 0, KEYS)
    whole = uniforms(state, 0, 100)
    assert (uniforms(state, 30, 20) == whole[:, 30:50]).all()
    assert (uniforms(state[2:3], 99, 1) == whole[2:3, 99:]).all()


def test_uniform_in_0_to_1():
    numbers = uniforms(seeds(0, 0, np.arange(1000, dtype=np.uint64)), 0, 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square with 99 degrees of freedom, p = 0.001


def test_seeds_never_change():
    """Whoever changes these changes the views of every run that is to be resumed or repeated."""
    expected = [13460947534359457227, 14443793949924185386, 1110270202821343304, 13619951112928673808]
    assert seeds(7, 3, KEYS).tolist() == expected


def test_seeds_differ_in_run_pass_and_key():
    keys = np.arange(500, dtype=np.uint64)
    every = [seeds(run, number, keys) for run in range(-2, 5) for number in range(6)]
    assert len(np.unique(np.concatenate(every))) == 7 * 6 * 500


def test_a_pass_for_each_image():
    passes = np.array([0, 1, 2, 1])
    expected = [seeds(5, int(number), KEYS[i : i + 1])[0] for i, number in enumerate(passes)]
    assert seeds(5, passes, KEYS).tolist() == expected


@pytest.mark.filterwarnings("error")
def test_wraps_around_in_silence():
    seeds(-1, 2**40, np.array([2**64 - 1], np.uint64))
    seeds(2**70 + 3, np.int64(1), KEYS)
    assert seeds(2**64 + 3, 0, KEYS).tolist() == seeds(3, 0, KEYS).tolist()


def test_each_bit_of_the_key_flips_half_of_the_seed():
    keys = np.uint64(1) << np.arange(64, dtype=np.uint64)
    flipped = seeds(0, 0, keys) ^ seeds(0, 0, np.zeros(64, np.uint64))
    counts = [bin(bits).count("1") for bits in flipped.tolist()]
    assert 12 < min(counts) and max(counts) < 52 and 30 < np.mean(counts) < 34
