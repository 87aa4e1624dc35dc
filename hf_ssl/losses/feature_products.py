# SPDX-License-Identifier: Apache-2.0
"""What Barlow Twins and VICReg share: views that are centred a part at a time, and products of features.

Both sum the squares of what lies off the diagonal of a D x D matrix C = A^T B of products of features. Where
the batch is smaller than the width, that matrix is never made: the sum of all its squares is the product of
two B x B Gram matrices, |A^T B|^2 = <A A^T, B B^T>, and the diagonal is taken off. Embeddings are centred
and scaled in parts, in both passes, so that little is held beside the gradients and the smaller matrices.

Legend: V views, B batch, D dims; in parts, b some images or d some dims; N x N the smaller matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_ssl.losses.precision import raised


class _Sizes(NamedTuple):
    """A part of the embeddings has about `numbers` values, but is at least `depth` deep in the direction that
    products sum over; Gram matrices are made `rows` rows at a time.
    """

    depth: int
    numbers: int
    rows: int


# On a CPU large enough for fast products, small enough to stay in its caches.
_SIZES = {"cpu": _Sizes(1024, 2**20, 512)}
_SIZES_ELSEWHERE = _Sizes(4096, 2**24, 4096)
_ALL = slice(None)


def check_two_views(name: str, z1_BD: Tensor, z2_BD: Tensor) -> None:
    if z1_BD.ndim != 2 or z1_BD.shape != z2_BD.shape:
        raise ValueError(
            f"{name} takes exactly two views (batch, dims) of one shape, got {tuple(z1_BD.shape)} and "
            f"{tuple(z2_BD.shape)}"
        )
    if len(z1_BD) < 2:
        raise ValueError(f"{name} needs a batch of at least 2 images for its statistics, got {len(z1_BD)}")


class CenteredView(NamedTuple):
    """Embeddings whose parts come centred and, with a scale, normalised. Only the statistics are held."""

    z_BD: Tensor
    mean_D: Tensor
    scale_D: Tensor | None = None

    @classmethod
    def centered(cls, z_BD: Tensor) -> "CenteredView":
        return cls(z_BD, torch.cat([raised(z_BD[:, dims]).mean(0) for dims in parts(z_BD, 1)]))

    @classmethod
    def normalized(cls, z_BD: Tensor) -> "CenteredView":
        view = cls.centered(z_BD)
        variance_D = torch.cat([view.part(dims=dims).square_().mean(0) for dims in parts(z_BD, 1)])
        return cls(z_BD, view.mean_D, (variance_D + 1e-5).rsqrt())

    def part(self, images: slice = _ALL, dims: slice = _ALL) -> Tensor:
        centered = self.z_BD[images, dims] - self.mean_D[dims]
        return centered if self.scale_D is None else centered.mul_(self.scale_D[dims])


def parts(z_BD: Tensor, direction: int) -> list[slice]:
    """Parts of the batch (direction 0) or of the dims (1)."""
    sizes = _SIZES.get(z_BD.device.type, _SIZES_ELSEWHERE)
    length = max(sizes.depth, sizes.numbers // z_BD.shape[1 - direction])
    return [slice(start, start + length) for start in range(0, z_BD.shape[direction], length)]


def add_gram(gram_NN: Tensor, x_NM: Tensor) -> None:
    """Add x x^T, above and on the diagonal; what falls below it is made good by `mirror`."""
    rows = _SIZES.get(x_NM.device.type, _SIZES_ELSEWHERE).rows
    for start in range(0, len(x_NM), rows):
        gram_NN[start : start + rows, start:].addmm_(x_NM[start : start + rows], x_NM[start:].T)


def mirror(gram_NN: Tensor) -> Tensor:
    """Fill what `add_gram` left out, in place."""
    rows = _SIZES.get(gram_NN.device.type, _SIZES_ELSEWHERE).rows
    for end in range(rows, len(gram_NN), rows):
        gram_NN[end:, end - rows : end] = gram_NN[end - rows : end, end:].T
    return gram_NN


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum of the products of all numbers, exact enough for a large sum to be taken from it."""
    parts = zip(x.flatten().split(2**20), y.flatten().split(2**20), strict=True)
    return torch.stack([(one * other).sum(dtype=widest(x)) for one, other in parts]).sum()


def widest(tensor: Tensor) -> torch.dtype:
    """float64, but on Apple's accelerator, which has none."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64
