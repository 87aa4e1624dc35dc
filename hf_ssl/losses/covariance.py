# SPDX-License-Identifier: Apache-2.0
"""The loss of VICReg.

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
from hf_ssl.losses.upcasting import upcast, without_autocast


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
