# SPDX-License-Identifier: Apache-2.0
"""The loss of Barlow Twins.

Legend: V views, B batch, D dimensions. In a part of the data, b is a subset of the images and d a subset of
the dimensions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.losses.feature_products import (
    CenteredView,
    accumulation_dtype,
    add_gram,
    check_two_views,
    copy_upper_to_lower,
    inner,
    parts,
)
from hf_ssl.losses.upcasting import without_autocast


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

    Source: Zbontar et al., arXiv:2103.03230, eq. 1. lightly and the authors' code have the same scale (until
    June 2021, the authors multiplied by 1/32). solo-learn multiplies by 0.1 for CIFAR and by 0.024 otherwise.
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
