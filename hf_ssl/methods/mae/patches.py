# SPDX-License-Identifier: Apache-2.0
"""Images as rows of patches, and back.

Legend: N images, C channels, H, W sides, P patches (row by row), X values of a patch.
"""

from torch import Tensor


def patchify(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Patches (N, P, X) of images: pixels row by row, the channels of a pixel together, as in ViTMAE.

    Args:
        images_NCHW: sides are multiples of the patch's.
        size: rows and columns of pixels in a patch.
    """
    rows, columns = size
    blocks = images_NCHW.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_NPX: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) of patches: the inverse of `patchify`.

    Args:
        patches_NPX: all patches of each image.
        size: rows and columns of pixels in a patch.
        grid: rows and columns of patches in an image.
    """
    blocks = patches_NPX.unflatten(2, (*size, -1)).unflatten(1, grid)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
