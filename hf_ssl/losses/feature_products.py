# SPDX-License-Identifier: Apache-2.0
"""Products of features for Barlow Twins and VICReg, computed in parts to save memory.

Both losses sum the squares of the off-diagonal elements of a D x D matrix C = X^T Y. X and Y are features
(B, D). If B is smaller than D, C is never computed. The sum of all squares is then the inner product of two
B x B Gram matrices, |X^T Y|^2 = <X X^T, Y Y^T>. The squares of the diagonal are subtracted.
Embeddings are centered and scaled in parts, in the forward and in the backward pass. Apart from the
gradients and the smaller matrices, this needs little memory.

Legend: V views, B batch, D dimensions. In a part of the data, b is a subset of the images and d a subset of
the dimensions. N x N is the smaller matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_ssl.losses.upcasting import upcast


class _Sizes(NamedTuple):
    """The sizes of the parts."""

    depth: int
    """The smallest length of a part along the axis over which the matrix product sums."""
    numbers: int
    """The approximate number of values of a part."""
    rows: int
    """The number of rows of a Gram matrix in one product."""


# On a CPU, these are large enough for fast products and small enough for the caches.
_SIZES = {"cpu": _Sizes(1024, 2**20, 512)}
_SIZES_OTHER_DEVICES = _Sizes(4096, 2**24, 4096)
_ALL = slice(None)


def check_two_views(name: str, z1_BD: Tensor, z2_BD: Tensor) -> None:
    """Raise `ValueError` unless these are two matrices of one shape with at least two rows."""
    if z1_BD.ndim != 2 or z1_BD.shape != z2_BD.shape:
        raise ValueError(
            f"{name}: expected two views of one shape (batch, dimensions), got {tuple(z1_BD.shape)} and "
            f"{tuple(z2_BD.shape)}"
        )
    if len(z1_BD) < 2:
        raise ValueError(f"{name}: expected at least 2 images for the statistics, got {len(z1_BD)}")


class CenteredView(NamedTuple):
    """Embeddings with their statistics. Its parts are centered and, if there is a scale, normalized."""

    z_BD: Tensor
    mean_D: Tensor
    scale_D: Tensor | None = None

    @classmethod
    def centered(cls, z_BD: Tensor) -> "CenteredView":
        """Return a view whose parts have mean 0."""
        return cls(z_BD, torch.cat([upcast(z_BD[:, dims]).mean(0) for dims in parts(z_BD, 1)]))

    @classmethod
    def normalized(cls, z_BD: Tensor) -> "CenteredView":
        """Return a view whose parts have mean 0 and variance 1 (biased, eps 1e-5)."""
        view = cls.centered(z_BD)
        variance_D = torch.cat([view.part(dims=dims).square_().mean(0) for dims in parts(z_BD, 1)])
        return cls(z_BD, view.mean_D, (variance_D + 1e-5).rsqrt())

    def part(self, images: slice = _ALL, dims: slice = _ALL) -> Tensor:
        """Return some rows and columns, centered and scaled, in new memory."""
        centered = self.z_BD[images, dims] - self.mean_D[dims]
        return centered if self.scale_D is None else centered.mul_(self.scale_D[dims])


def parts(z_BD: Tensor, dim: int) -> list[slice]:
    """Return the slices of the batch (dim 0) or of the dimensions (1)."""
    sizes = _SIZES.get(z_BD.device.type, _SIZES_OTHER_DEVICES)
    length = max(sizes.depth, sizes.numbers // z_BD.shape[1 - dim])
    return [slice(start, start + length) for start in range(0, z_BD.shape[dim], length)]


def add_gram(gram_NN: Tensor, x_NM: Tensor) -> None:
    """Add x x^T to the blocks of `gram_NN` on and above the diagonal, not to those below it."""
    rows = _SIZES.get(x_NM.device.type, _SIZES_OTHER_DEVICES).rows
    for start in range(0, len(x_NM), rows):
        gram_NN[start : start + rows, start:].addmm_(x_NM[start : start + rows], x_NM[start:].T)


def copy_upper_to_lower(gram_NN: Tensor) -> Tensor:
    """Copy the blocks above the diagonal to those below it, in place, after `add_gram`."""
    rows = _SIZES.get(gram_NN.device.type, _SIZES_OTHER_DEVICES).rows
    for end in range(rows, len(gram_NN), rows):
        gram_NN[end:, end - rows : end] = gram_NN[end - rows : end, end:].T
    return gram_NN


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the products of all numbers, exact enough for subtracting another large sum."""
    parts = zip(x.flatten().split(2**20), y.flatten().split(2**20), strict=True)
    return torch.stack([(one * other).sum(dtype=accumulation_dtype(x)) for one, other in parts]).sum()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, or the dtype of `tensor` on Apple's accelerator, which does not support float64."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64
