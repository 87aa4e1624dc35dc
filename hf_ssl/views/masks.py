# SPDX-License-Identifier: Apache-2.0
"""Samples the multi-block masks of I-JEPA: the visible patches (context) and the predicted blocks (targets).

Legend: B images, M target blocks of an image, T patches of a block, P patches of an image (row by row), K
patches of a truncated context. A grid and the size of a block are (rows, columns).

Source: Assran et al., arXiv:2301.08243, section 3 and appendix A; facebookresearch/ijepa, `multiblock.py`.
Where a docstring cites only the authors' code, the paper does not describe this detail.
"""

import math

import numpy as np
from numpy.typing import NDArray

from hf_ssl.random import FIRST_METHOD_NUMBER, UInt64Array, image_seeds, uniforms

Size = tuple[int, int]
Range = tuple[float, float]
TRIES = 20
"""The number of places that are tried for a context before one more target block may overlap with it."""
_SIZES = 0x4D61736B73  # the run seed of block sizes, which separates their numbers from those of images


def block_size_numbers(step: int) -> tuple[float, float]:
    """Return two numbers in [0, 1) that determine the sizes of a step's target blocks and context blocks.

    They depend only on the step. All images of a batch, all processes and a resumed run get the same numbers.
    """
    target, context = uniforms(image_seeds(_SIZES, 0, np.array([step], np.uint64)), 0, 2)[0]
    return float(target), float(context)


def block_size(
    number: float, *, scale: Range, aspect_ratio: Range, grid: Size, reach_edges: bool = False
) -> Size:
    """Return the rows and columns of a block.

    Args:
        number: in [0, 1), the position of the scale and of the aspect ratio in their ranges. Since it is one
            number for both, the largest blocks are the tallest (authors' code).
        scale: smallest and largest fraction of the grid's patches.
        aspect_ratio: smallest and largest ratio of rows to columns.
        grid: rows and columns of the image in patches.
        reach_edges: whether a block may be as tall or wide as the grid. Otherwise it is smaller.
    """
    patches = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    aspect = aspect_ratio[0] + number * (aspect_ratio[1] - aspect_ratio[0])
    sides = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
    rows, columns = (
        min(max(side, 1), most - (not reach_edges)) for side, most in zip(sides, grid, strict=True)
    )
    return rows, columns


def sample_multi_block_masks(
    images: UInt64Array,
    *,
    grid: Size,
    target: Size,
    context: Size,
    targets: int,
    minimum_patches: int,
    reach_edges: bool = False,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return the contexts and target blocks of a batch. Each image has its own places.

    The place of a block is uniform over the places where the block fits. Unless `reach_edges` is set, the
    last row and the last column of places are omitted, as in the authors' code. No block then reaches the
    lower or right edge. The patches of target blocks are removed from the context. If too few patches remain,
    another place is tried. After `TRIES` places, the last target block may overlap with the context, then the
    last two, and so on.

    Args:
        images: (B,) uint64, a seed for each image.
        grid: rows and columns of the image in patches.
        target, context: the size of all target blocks and of all context blocks.
        targets: number M of target blocks per image.
        minimum_patches: smallest number of patches in a context.
        reach_edges: whether blocks may touch the lower and right edges.

    Returns:
        (B, P) which patches are in the context, and (B, M, T) the patches of each target block in ascending
        order.

    Raises:
        ValueError: a context block has too few patches even without target blocks.
    """
    if context[0] * context[1] < minimum_patches:
        raise ValueError(
            f"context: expected a block of at least {minimum_patches} patches, got {context[0]} x "
            f"{context[1]}"
        )
    numbers = uniforms(images, FIRST_METHOD_NUMBER, 2 * targets).reshape(-1, targets, 2)
    inside_BMP = _inside(_places(numbers, target, grid, reach_edges), target, grid)
    context_BP = np.zeros((len(images), grid[0] * grid[1]), bool)
    pending, attempt = np.arange(len(images)), 0
    while len(pending):
        numbers = uniforms(images[pending], FIRST_METHOD_NUMBER + 2 * (targets + attempt), 2)
        tried = _inside(_places(numbers, context, grid, reach_edges), context, grid)
        avoided = max(targets - attempt // TRIES, 0)
        tried &= ~inside_BMP[pending, :avoided].any(axis=1)
        enough = tried.sum(axis=1) >= minimum_patches
        context_BP[pending[enough]] = tried[enough]
        pending, attempt = pending[~enough], attempt + 1
    return context_BP, np.nonzero(inside_BMP)[2].reshape(len(images), targets, -1)


def first_patches(context_BP: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Return the first `count` patches (B, count) of each context, row by row from the top.

    The authors' code truncates contexts to the shortest one of a batch in this way.
    """
    return np.argsort(~context_BP, axis=1, kind="stable")[:, :count]


def _places(numbers: NDArray[np.float64], block: Size, grid: Size, reach_edges: bool) -> NDArray[np.int64]:
    """Return the upper left corners (..., 2) of blocks, from numbers (..., 2) in [0, 1)."""
    choices = np.array(grid) - np.array(block) + reach_edges
    return (numbers * choices).astype(np.int64)


def _inside(corners: NDArray[np.int64], block: Size, grid: Size) -> NDArray[np.bool_]:
    """Return which patches (..., P) lie in the blocks with these corners (..., 2)."""
    in_rows, in_columns = (
        (corners[..., axis, None] <= np.arange(grid[axis]))
        & (np.arange(grid[axis]) < corners[..., axis, None] + block[axis])
        for axis in (0, 1)
    )
    both = in_rows[..., :, None] & in_columns[..., None, :]
    return both.reshape(*corners.shape[:-1], grid[0] * grid[1])
