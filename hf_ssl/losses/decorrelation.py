# SPDX-License-Identifier: Apache-2.0
"""The losses of Barlow Twins and VICReg, computed in parts to save memory.

Both losses sum the squares of the off-diagonal elements of a D x D matrix C = X^T Y. X and Y are features
(B, D). If B is smaller than D, C is never computed. The sum of all squares is then the inner product of two
B x B Gram matrices, |X^T Y|^2 = <X X^T, Y Y^T>. The squares of the diagonal are subtracted.
Embeddings are centered and scaled in parts, in the forward and in the backward pass. Apart from the
gradients and the smaller matrices, this needs little memory.

Legend: V views, B batch, D dimensions. In a part of the data, b is a subset of the images and d a subset of
the dimensions. N x N is the smaller matrix.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.losses.upcasting import upcast, without_autocast


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


def barlow_twins(z1_BD: Tensor, z2_BD: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Return the loss of Barlow Twins. It is 0 if the correlation matrix of the two views is the identity.

    The loss is `on_diagonal + off_diagonal_weight * off_diagonal` of `barlow_twins_terms`.

    Args:
        z1_BD, z2_BD: embeddings of two views of the same B >= 2 images. They are normalized over the batch.
        off_diagonal_weight: lambda of the paper, 0.0051 in the authors' code.

    Returns:
        A scalar: sums over features and pairs of features, not divided by D.

    Raises:
        ValueError: the arguments are not two matrices of one shape, or the batch has only one image.

    Source: Zbontar et al., arXiv:2103.03230, eq. 1.
    """
    on_diagonal, off_diagonal = barlow_twins_terms(z1_BD, z2_BD)
    return on_diagonal + off_diagonal_weight * off_diagonal


@without_autocast
def barlow_twins_terms(z1_BD: Tensor, z2_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two sums of Barlow Twins over the correlations between the features of two views.

    C_ij is the mean over images of normalized feature i of view 1 times normalized feature j of view 2. The
    first sum is over i of (C_ii - 1)^2. The second one is over i and all j != i of C_ij^2.

    Args:
        z1_BD, z2_BD: embeddings of two views of the same B >= 2 images. This function normalizes them over
            the batch, as BatchNorm without gain and offset does (biased variance, eps 1e-5).

    Returns:
        (on_diagonal, off_diagonal), scalars in float32 or better: sums, not divided by D.

    Raises:
        ValueError: the arguments are not two matrices of one shape, or the batch has only one image.

    Source: Zbontar et al., arXiv:2103.03230, eq. 1. lightly and the authors' code have the same scale. Until
    June 2021, the authors multiplied by 1/32. solo-learn multiplies by 0.1 for CIFAR and by 0.024 otherwise.
    """
    check_two_views("barlow_twins", z1_BD, z2_BD)
    correlation = _CorrelationByGram if z1_BD.shape[0] < z1_BD.shape[1] else _Correlation
    diagonal_D, off_diagonal = correlation.apply(z1_BD, z2_BD)
    return (diagonal_D - 1).square().sum(), off_diagonal


class _Correlation(torch.autograd.Function):
    """The diagonal C_ii, and the sum over i and j != i of C_ij^2.

    C = X^T Y / B is the correlation matrix of the normalized views X and Y (B, D).
    """

    @staticmethod
    def forward(ctx: Any, z1_BD: Tensor, z2_BD: Tensor) -> tuple[Tensor, Tensor]:
        a, b = CenteredView.normalized(z1_BD), CenteredView.normalized(z2_BD)
        c_DD = a.mean_D.new_zeros(len(a.mean_D), len(a.mean_D))
        for images in parts(z1_BD, 0):
            c_DD.addmm_(a.part(images).T, b.part(images))
        diagonal_D = c_DD.div_(len(z1_BD)).diagonal().clone()
        ctx.save_for_backward(*a, *b, diagonal_D, c_DD.fill_diagonal_(0))
        return diagonal_D, inner(c_DD, c_DD).to(c_DD.dtype)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad_diagonal_D: Tensor, grad_off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        *views, diagonal_D, c_DD = ctx.saved_tensors
        a, b = CenteredView(*views[:3]), CenteredView(*views[3:])
        scale1_D, scale2_D = views[2], views[5]
        result1_BD, result2_BD = torch.empty_like(a.z_BD), torch.empty_like(b.z_BD)
        grad_DD = c_DD * (2 * grad_off_diagonal)
        grad_DD.diagonal().copy_(grad_diagonal_D)
        # Normalization removes the components of the gradient along the feature and along a constant. Only
        # the first must be subtracted here: the other view is centered, so its products with `grad_DD` have
        # no component along a constant.
        own_D = grad_diagonal_D * diagonal_D
        projection1_D = c_DD.square().sum(1).mul_(2 * grad_off_diagonal).add_(own_D)
        projection2_D = c_DD.square().sum(0).mul_(2 * grad_off_diagonal).add_(own_D)
        for images in parts(a.z_BD, 0):
            a_bD, b_bD = a.part(images), b.part(images)
            grad_bD = (b_bD @ grad_DD.T).addcmul_(a_bD, projection1_D, value=-1)
            result1_BD[images] = grad_bD.mul_(scale1_D / len(a.z_BD))
            grad_bD = (a_bD @ grad_DD).addcmul_(b_bD, projection2_D, value=-1)
            result2_BD[images] = grad_bD.mul_(scale2_D / len(a.z_BD))
        return result1_BD, result2_BD


class _CorrelationByGram(torch.autograd.Function):
    """The result of `_Correlation`, computed from the Gram matrices X X^T and Y Y^T."""

    @staticmethod
    def forward(ctx: Any, z1_BD: Tensor, z2_BD: Tensor) -> tuple[Tensor, Tensor]:
        a, b = CenteredView.normalized(z1_BD), CenteredView.normalized(z2_BD)
        batch, diagonal = len(z1_BD), []
        gram_VBB = a.mean_D.new_zeros(2, batch, batch)
        for dims in parts(z1_BD, 1):
            a_Bd, b_Bd = a.part(dims=dims), b.part(dims=dims)
            add_gram(gram_VBB[0], a_Bd)
            add_gram(gram_VBB[1], b_Bd)
            diagonal.append(a_Bd.mul_(b_Bd).sum(0, dtype=accumulation_dtype(a_Bd)) / batch)
        diagonal_D = torch.cat(diagonal)
        off_diagonal = inner(copy_upper_to_lower(gram_VBB[0]), copy_upper_to_lower(gram_VBB[1])) / batch**2
        off_diagonal = (off_diagonal - diagonal_D.square().sum()).to(gram_VBB.dtype)
        diagonal_D = diagonal_D.to(gram_VBB.dtype)
        ctx.save_for_backward(*a, *b, diagonal_D, gram_VBB)
        return diagonal_D, off_diagonal

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad_diagonal_D: Tensor, grad_off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        *views, diagonal_D, gram_VBB = ctx.saved_tensors
        a, b = CenteredView(*views[:3]), CenteredView(*views[3:])
        scale1_D, scale2_D = views[2], views[5]
        batch = len(a.z_BD)
        result1_BD, result2_BD = torch.empty_like(a.z_BD), torch.empty_like(b.z_BD)
        own_D = (grad_diagonal_D - 2 * grad_off_diagonal * diagonal_D) / batch
        for dims in parts(a.z_BD, 1):
            a_Bd, b_Bd = a.part(dims=dims), b.part(dims=dims)
            for x_Bd, y_Bd, gram_BB, scale_D, result_BD in (
                (a_Bd, b_Bd, gram_VBB[1], scale1_D, result1_BD),
                (b_Bd, a_Bd, gram_VBB[0], scale2_D, result2_BD),
            ):
                grad_Bd = (gram_BB @ x_Bd).mul_(2 * grad_off_diagonal / batch**2)
                grad_Bd.addcmul_(y_Bd, own_D[dims])
                projection_d = (grad_Bd * x_Bd).mean(0)  # as in _Correlation
                result_BD[:, dims] = grad_Bd.addcmul_(x_Bd, projection_d, value=-1).mul_(scale_D[dims])
        return result1_BD, result2_BD


@without_autocast
def vicreg_terms(z1_BD: Tensor, z2_BD: Tensor, *, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three terms of VICReg: invariance, variance and covariance.

    cov_v are the covariances (divided by B - 1) of the features of view v. The terms are:

    - invariance: the mean over images and features of the squared difference between the views;
    - variance: the mean over views and features i of max(0, 1 - sqrt(cov_v[i, i] + eps));
    - covariance: the sum over views of 1/D times the sum over i and all j != i of cov_v[i, j]^2.

    Args:
        z1_BD, z2_BD: embeddings of two views of the same B >= 2 images, not normalized.
        eps: added to the variance under the square root.

    Returns:
        (invariance, variance, covariance), scalars in float32 or better. The caller weights them (25, 25, 1
        in the paper).

    Raises:
        ValueError: the arguments are not two matrices of one shape, or the batch has only one image.

    Source: Bardes et al., arXiv:2105.04906, eq. 1 to 5, with the scale of the authors' code and of lightly.
    They average the variance over the two views and sum the covariance. The paper's eq. 6 and solo-learn also
    sum the variance, so their value is twice this one.
    """
    check_two_views("vicreg", z1_BD, z2_BD)
    batch, dims = z1_BD.shape
    covariance = _CovarianceByGram if batch < dims else _Covariance
    difference, variance_VD, off_diagonal = covariance.apply(z1_BD, z2_BD)
    variance = (1 - (variance_VD + eps).sqrt()).relu().mean()
    return difference / (batch * dims), variance, off_diagonal / dims


class _Covariance(torch.autograd.Function):
    """The squared differences, variances and squared covariances of two views.

    The first result is the sum of the squared differences between the views. The second one is the variances
    of the features of each view. The third one is the sum over views, i and j != i of cov_ij^2. Covariances
    are divided by batch - 1.
    """

    @staticmethod
    def forward(ctx: Any, *z_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views = [CenteredView.centered(z_BD[0]), CenteredView.centered(z_BD[1])]
        cov_VDD = views[0].mean_D.new_zeros(2, *2 * views[0].mean_D.shape)
        difference = cov_VDD.new_zeros(())
        for images in parts(z_BD[0], 0):
            difference += (upcast(z_BD[0][images]) - z_BD[1][images]).square_().sum()
            for cov_DD, view in zip(cov_VDD, views, strict=True):
                add_gram(cov_DD, view.part(images).T)
        for cov_DD in cov_VDD:
            copy_upper_to_lower(cov_DD).div_(len(z_BD[0]) - 1)
        variance_VD = cov_VDD.diagonal(dim1=1, dim2=2).clone()
        cov_VDD.diagonal(dim1=1, dim2=2).zero_()
        ctx.save_for_backward(*views[0][:2], *views[1][:2], cov_VDD)
        return difference, variance_VD, inner(cov_VDD, cov_VDD).to(cov_VDD.dtype)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(
        ctx: Any, grad_difference: Tensor, grad_variance_VD: Tensor, grad_off_diagonal: Tensor
    ) -> tuple[Tensor, ...]:
        *saved, cov_VDD = ctx.saved_tensors
        views = [CenteredView(*saved[:2]), CenteredView(*saved[2:])]
        freedom = len(saved[0]) - 1
        results = tuple(torch.empty_like(view.z_BD) for view in views)
        grad_VDD = cov_VDD * (4 * grad_off_diagonal / freedom)
        grad_VDD.diagonal(dim1=1, dim2=2).copy_(2 * grad_variance_VD / freedom)
        for images in parts(saved[0], 0):
            difference_bD = (upcast(views[0].z_BD[images]) - views[1].z_BD[images]).mul_(2 * grad_difference)
            for v, sign in enumerate((1, -1)):
                grad_bD = views[v].part(images) @ grad_VDD[v]
                results[v][images] = grad_bD.add_(difference_bD, alpha=sign)
        return results


class _CovarianceByGram(torch.autograd.Function):
    """The results of `_Covariance`, computed from the Gram matrix of each view."""

    @staticmethod
    def forward(ctx: Any, *z_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views = [CenteredView.centered(z_BD[0]), CenteredView.centered(z_BD[1])]
        batch = len(z_BD[0])
        variances: list[list[Tensor]] = []
        gram_VBB = views[0].mean_D.new_zeros(2, batch, batch)
        difference = gram_VBB.new_zeros(())
        for dims in parts(z_BD[0], 1):
            difference += (upcast(z_BD[0][:, dims]) - z_BD[1][:, dims]).square_().sum()
            variances.append([])
            for gram_BB, view in zip(gram_VBB, views, strict=True):
                x_Bd = view.part(dims=dims)
                add_gram(gram_BB, x_Bd)
                variances[-1].append(x_Bd.square_().sum(0, dtype=accumulation_dtype(x_Bd)) / (batch - 1))
        variance_VD = torch.cat([torch.stack(pair) for pair in variances], 1)
        for gram_BB in gram_VBB:
            copy_upper_to_lower(gram_BB)
        off_diagonal = inner(gram_VBB, gram_VBB) / (batch - 1) ** 2
        off_diagonal = (off_diagonal - variance_VD.square().sum()).to(gram_VBB.dtype)
        variance_VD = variance_VD.to(gram_VBB.dtype)
        ctx.save_for_backward(*views[0][:2], *views[1][:2], variance_VD, gram_VBB)
        return difference, variance_VD, off_diagonal

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(
        ctx: Any, grad_difference: Tensor, grad_variance_VD: Tensor, grad_off_diagonal: Tensor
    ) -> tuple[Tensor, ...]:
        *saved, variance_VD, gram_VBB = ctx.saved_tensors
        views = [CenteredView(*saved[:2]), CenteredView(*saved[2:])]
        freedom = len(saved[0]) - 1
        results = tuple(torch.empty_like(view.z_BD) for view in views)
        own_VD = (2 * grad_variance_VD - 4 * grad_off_diagonal * variance_VD) / freedom
        for dims in parts(saved[0], 1):
            difference_Bd = (upcast(views[0].z_BD[:, dims]) - views[1].z_BD[:, dims]).mul_(
                2 * grad_difference
            )
            for v, sign in enumerate((1, -1)):
                x_Bd = views[v].part(dims=dims)
                grad_Bd = (gram_VBB[v] @ x_Bd).mul_(4 * grad_off_diagonal / freedom**2)
                grad_Bd.addcmul_(x_Bd, own_VD[v, dims])
                results[v][:, dims] = grad_Bd.add_(difference_Bd, alpha=sign)
        return results
