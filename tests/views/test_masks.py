# SPDX-License-Identifier: Apache-2.0
"""Multi-block masks stay in the paper's ranges, over thousands of samples, and equal a slow version."""

import math

import numpy as np
import pytest
from messages import mentions

from hf_ssl.random import FIRST_METHOD_NUMBER, uniforms
from hf_ssl.views.masks import TRIES, block_size, block_size_numbers, first_patches, sample_multi_block_masks

GRID = (16, 16)
TARGET = {"scale": (0.15, 0.2), "aspect_ratio": (0.75, 1.5)}
CONTEXT = {"scale": (0.85, 1.0), "aspect_ratio": (1.0, 1.0)}
IMAGES = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)


def sample(
    images=IMAGES, *, grid=GRID, target=(6, 7), context=(15, 15), minimum_patches=11, reach_edges=False
):
    sizes = {"grid": grid, "target": target, "context": context}
    return sample_multi_block_masks(
        images, **sizes, targets=4, minimum_patches=minimum_patches, reach_edges=reach_edges
    )


def corners(blocks, columns):
    """Return the rows and columns of the upper left patch of each block."""
    return np.divmod(blocks[..., 0], columns)


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (28, 28)])
def test_sizes_stay_in_the_papers_ranges(grid):
    patches = grid[0] * grid[1]
    numbers = np.array([block_size_numbers(step) for step in range(4000)])
    assert abs(numbers.mean(0) - 0.5).max() < 0.02 and abs(np.corrcoef(numbers.T)[0, 1]) < 0.05
    shares = []
    for target_number, context_number in numbers:
        rows, columns = block_size(target_number, grid=grid, **TARGET)
        # rounding changes a side by at most half a patch, after the area was rounded down to whole patches
        least, most = (0.15 * patches - 1) * 0.75, 0.2 * patches * 1.5
        assert math.sqrt(least) - 0.5 <= rows <= math.sqrt(most) + 0.5
        least, most = (0.2 * patches - 1) / 1.5, 0.15 * patches / 0.75
        assert math.sqrt(least) - 0.5 <= columns <= math.sqrt(most) + 0.5
        assert (rows - 0.5) / (columns + 0.5) < 1.5 and (rows + 0.5) / (columns - 0.5) > 0.75
        shares.append(rows * columns / patches)
        rows, columns = block_size(context_number, grid=grid, **CONTEXT)
        assert rows == columns and math.sqrt(0.85 * patches - 1) - 0.5 <= rows <= grid[0] - 1
    assert 0.16 < np.mean(shares) < 0.19 and 0.13 < min(shares) and max(shares) < 0.22


def test_one_number_chooses_scale_and_aspect_ratio():
    """In the authors' code the largest blocks are the tallest."""
    sizes = [block_size(number, grid=(64, 64), **TARGET) for number in np.linspace(0, 1, 50, endpoint=False)]
    rows, columns = np.array(sizes).T
    assert (np.diff(rows) >= 0).all() and (np.diff(columns) <= 0).all()
    assert (rows * columns)[0] / 4096 == pytest.approx(0.15, abs=0.004)
    assert (rows * columns)[-1] / 4096 == pytest.approx(0.2, abs=0.004)


def test_sizes_are_a_function_of_the_step():
    assert block_size_numbers(7) == block_size_numbers(7) != block_size_numbers(8)


def test_blocks_are_rectangles_and_contexts_avoid_them():
    for step in range(20):
        target_number, context_number = block_size_numbers(step)
        target = block_size(target_number, grid=GRID, **TARGET)
        context = block_size(context_number, grid=GRID, **CONTEXT)
        contexts, blocks = sample(target=target, context=context)
        assert contexts.shape == (2000, 256) and blocks.shape == (2000, 4, target[0] * target[1])
        assert (np.diff(blocks, axis=-1) > 0).all()
        top, left = corners(blocks, 16)
        rows, columns = np.divmod(blocks - blocks[..., :1], 16)
        assert (rows.max(-1) == target[0] - 1).all() and (columns.max(-1) == target[1] - 1).all()
        assert (left + target[1] <= 16).all() and (top + target[0] <= 16).all()
        covered = np.zeros((2000, 256), bool)
        np.put_along_axis(covered, blocks.reshape(2000, -1), True, axis=1)
        assert not (contexts & covered).any()
        # the context keeps all patches of its block that no target covers
        inside = np.zeros((16, 16), bool)
        inside[: context[0], : context[1]] = True
        assert (contexts == (inside.flatten() & ~covered)).all()
        assert contexts.sum(1).min() > 10


@pytest.mark.parametrize("reach_edges", [False, True])
def test_places_are_uniform(reach_edges):
    images = np.arange(12_000, dtype=np.uint64) * np.uint64(7919)
    _, blocks = sample(images, reach_edges=reach_edges)
    top, left = corners(blocks, 16)
    places = (10 + reach_edges, 9 + reach_edges)
    counts = np.zeros(places)
    np.add.at(counts, (top.flatten(), left.flatten()), 1)
    expected = 48_000 / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < counts.size + 5 * math.sqrt(2 * counts.size)
    pairs = np.corrcoef(np.concatenate([top, left], axis=1).T) - np.eye(8)
    assert abs(pairs).max() < 0.05  # rows, columns and blocks of an image are independent


@pytest.mark.parametrize("reach_edges", [False, True])
def test_only_reach_edges_uses_the_last_row_and_column(reach_edges):
    contexts, blocks = sample(
        context=block_size(0.99, grid=GRID, reach_edges=reach_edges, **CONTEXT), reach_edges=reach_edges
    )
    shown = contexts.reshape(-1, 16, 16).any(0)
    rows, columns = np.divmod(blocks, 16)
    assert (rows.max() == 15, columns.max() == 15) == (reach_edges, reach_edges)
    assert (shown[-1].any(), shown[:, -1].any()) == (reach_edges, reach_edges)
    assert shown[:-1, :-1].all()


def slow_masks(seed, grid, target, context, targets, minimum_patches):
    """Return the masks of one image, computed with sets."""
    numbers = iter(uniforms(np.array([seed], np.uint64), FIRST_METHOD_NUMBER, 4000)[0])

    def block(size):
        top, left = (int(next(numbers) * (grid[axis] - size[axis])) for axis in (0, 1))
        return {
            row * grid[1] + column
            for row in range(top, top + size[0])
            for column in range(left, left + size[1])
        }

    blocks = [block(target) for _ in range(targets)]
    failures = 0
    while True:
        left_over = block(context)
        for forbidden in blocks[: max(targets - failures // TRIES, 0)]:
            left_over -= forbidden
        if len(left_over) >= minimum_patches:
            return left_over, blocks, failures
        failures += 1


def test_equals_a_slow_version_where_places_are_scarce():
    """On a small grid, contexts are tried several times and finally overlap."""
    setting = {"grid": (6, 7), "target": (3, 3), "context": (4, 4), "minimum_patches": 10}
    contexts, blocks = sample(IMAGES[:300], **setting)
    most = 0
    for seed, context, targets in zip(IMAGES[:300], contexts, blocks, strict=True):
        slow_context, slow_targets, failures = slow_masks(seed, targets=4, **setting)
        assert set(np.flatnonzero(context)) == slow_context
        assert [set(block) for block in targets] == slow_targets
        most = max(most, failures)
    assert most > 2 * TRIES  # two blocks of the hardest image overlap


def test_the_masks_of_an_image_do_not_depend_on_its_batch():
    contexts, blocks = sample()
    some_contexts, some_blocks = sample(IMAGES[500:900])
    assert (contexts[500:900] == some_contexts).all() and (blocks[500:900] == some_blocks).all()


def test_truncation_keeps_the_first_patches():
    mask = np.array([[False, True, True, False, True], [True, False, True, True, True]])
    assert first_patches(mask, 3).tolist() == [[1, 2, 4], [0, 2, 3]]
    assert first_patches(mask, 2).tolist() == [[1, 2], [0, 2]]


def test_truncated_to_the_shortest_of_128_a_context_is_a_quarter_of_the_image():
    """The setting is ViT-B/16, as in the paper's study of masks."""
    shares = []
    for step in range(15):
        target_number, context_number = block_size_numbers(step)
        contexts, _ = sample(
            IMAGES[128 * step : 128 * (step + 1)],
            grid=(14, 14),
            target=block_size(target_number, grid=(14, 14), **TARGET),
            context=block_size(context_number, grid=(14, 14), **CONTEXT),
        )
        shares.append(contexts.sum(1).min() / 196)
    assert 0.23 < np.mean(shares) < 0.28


def test_a_context_that_is_always_too_small_raises_an_error():
    with pytest.raises(ValueError, match=mentions(10, "3 x 3")):
        sample(context=(3, 3), minimum_patches=10)
