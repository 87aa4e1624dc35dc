# SPDX-License-Identifier: Apache-2.0
"""Multi-block masks of I-JEPA: which patches of an image are shown, and which blocks of it are predicted.

Legend: B images, M target blocks of an image, T patches of a block, P patches of an image (row by row), K
patches that are shown. A grid and the size of a block are (rows, columns).

Source: Assran et al., arXiv:2301.08243, section 3 and appendix A; facebookresearch/ijepa, `multiblock.py`.
Where it says nothing of it, the paper is silent and the authors' code decides.
"""

import math

import numpy as np
from numpy.typing import NDArray

from hf_ssl.views.hashing import FOR_METHODS, Keys, seeds, uniforms

Size = tuple[int, int]
Range = tuple[float, float]
TRIES = 20
"""Places that are tried for a context before one more target block may overlap with it."""
_SIZES = 0x4D61736B73  # keeps the numbers of sizes apart from those of images


def size_numbers(step: int) -> tuple[float, float]:
    """Two numbers in [0, 1) that choose the size of a step's target blocks and of its context blocks.

    A function of the step alone, so that all images of a batch, all processes and a resumed run agree.
    """
    target, context = uniforms(seeds(_SIZES, 0, np.array([step], np.uint64)), 0, 2)[0]
    return float(target), float(context)


def block_size(
    number: float, *, scale: Range, aspect_ratio: Range, grid: Size, reach_edges: bool = False
) -> Size:
    """Rows and columns of a block.

    Args:
        number: in [0, 1): where between their ends both scale and aspect ratio lie. It is one number for the
            two, so that the largest blocks are the tallest.
        scale: least and largest share of the grid's patches.
        aspect_ratio: least and largest rows / columns.
        grid: of the image.
        reach_edges: whether a block may be as tall or wide as the grid; else it is at least one less.
    """
    patches = int(grid[0] * grid[1] * (scale[0] + number * (scale[1] - scale[0])))
    aspect = aspect_ratio[0] + number * (aspect_ratio[1] - aspect_ratio[0])
    sides = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
    rows, columns = (
        min(max(side, 1), most - (not reach_edges)) for side, most in zip(sides, grid, strict=True)
    )
    return rows, columns


def multi_block(
    images: Keys,
    *,
    grid: Size,
    target: Size,
    context: Size,
    targets: int,
    more_than: int,
    reach_edges: bool = False,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Contexts and target blocks of a batch, every image with places of its own.

    A block's place is uniform over those that it fits in; the authors' code leaves out the last of them, so
    that no block reaches the lower and right edges, and so do we unless `reach_edges`. What target blocks
    cover is taken out of the context. Where too little is left another place is tried; after `TRIES` of them
    the last target block may overlap, then the last two, and so on.

    Args:
        images: (B,) uint64, a seed for each image.
        grid: of an image.
        target, context: size of all blocks of a kind.
        targets: M.
        more_than: a context has more patches than this.
        reach_edges: whether blocks may touch the lower and right edges.

    Returns:
        (B, P) which patches are in the context, and (B, M, T) the patches of each target block in rising
        order.

    Raises:
        ValueError: a context block has too few patches even if all of them stay.
    """
    if context[0] * context[1] <= more_than:
        raise ValueError(
            f"a context of more than {more_than} patches needs a larger block than "
            f"{context[0]} x {context[1]}"
        )
    numbers = uniforms(images, FOR_METHODS, 2 * targets).reshape(-1, targets, 2)
    inside_BMP = _inside(_places(numbers, target, grid, reach_edges), target, grid)
    context_BP = np.zeros((len(images), grid[0] * grid[1]), bool)
    pending, attempt = np.arange(len(images)), 0
    while len(pending):
        numbers = uniforms(images[pending], FOR_METHODS + 2 * (targets + attempt), 2)
        tried = _inside(_places(numbers, context, grid, reach_edges), context, grid)
        avoided = max(targets - attempt // TRIES, 0)
        tried &= ~inside_BMP[pending, :avoided].any(axis=1)
        enough = tried.sum(axis=1) > more_than
        context_BP[pending[enough]] = tried[enough]
        pending, attempt = pending[~enough], attempt + 1
    return context_BP, np.nonzero(inside_BMP)[2].reshape(len(images), targets, -1)


def first_patches(context_BP: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """The first `count` patches (B, count) of each context, row by row from the top, as the authors truncate
    contexts to the shortest of a batch.
    """
    return np.argsort(~context_BP, axis=1, kind="stable")[:, :count]


def _places(numbers: NDArray[np.float64], block: Size, grid: Size, reach_edges: bool) -> NDArray[np.int64]:
    """Upper left corners (..., 2) of blocks, from numbers (..., 2) in [0, 1)."""
    choices = np.array(grid) - np.array(block) + reach_edges
    return (numbers * choices).astype(np.int64)


def _inside(corners: NDArray[np.int64], block: Size, grid: Size) -> NDArray[np.bool_]:
    """Which patches (..., P) lie in the blocks with these corners (..., 2)."""
    in_rows, in_columns = (
        (corners[..., axis, None] <= np.arange(grid[axis]))
        & (np.arange(grid[axis]) < corners[..., axis, None] + block[axis])
        for axis in (0, 1)
    )
    both = in_rows[..., :, None] & in_columns[..., None, :]
    return both.reshape(*corners.shape[:-1], grid[0] * grid[1])
