# SPDX-License-Identifier: Apache-2.0
"""Losses that predict a target: the embedding of another view, or the pixels or features of a patch.

Legend: B batch, D dimensions, N patches, P values in a patch.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from hf_ssl.losses.upcasting import full_precision


@full_precision
def cosine_regression(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Return the squared distance between normalized predictions and targets (BYOL, SimSiam, DirectPred).

    Args:
        prediction_BD, target_BD: embeddings of two views of the same B images. This function normalizes them.
            The caller detaches the target.

    Returns:
        A scalar in [0, 4]: the mean over images of 2 - 2 cos.

    Raises:
        ValueError: the arguments are not two matrices of one shape.

    Source: Grill et al., arXiv:2006.07733, eq. 2. BYOL adds this loss for both directions. The authors' code
    and solo-learn have the same scale. SimSiam (arXiv:2011.10566, eq. 1 and 2) and lightly use half the sum
    of -cos over both directions. Its gradient is a quarter of that of BYOL's sum, so learning rates for SGD
    differ by a factor of 4.
    """
    _check_shapes(
        prediction_BD.ndim == 2, "cosine_regression", prediction_BD, target_BD, "(batch, dimensions)"
    )
    cosine_B = (normalize(prediction_BD, dim=-1) * normalize(target_BD, dim=-1)).sum(-1)
    return (2 - 2 * cosine_B).mean()


@full_precision
def masked_patch_mse(
    prediction_BNP: Tensor, target_BNP: Tensor, mask_BN: Tensor, *, normalize: bool
) -> Tensor:
    """Return the mean squared error over the values of masked patches (MAE).

    Args:
        prediction_BNP: predicted values of all N patches.
        target_BNP: the patches themselves. They get no gradient.
        mask_BN: 1 or True for masked patches, which enter the mean; 0 or False for the other patches.
        normalize: whether to normalize each target patch to mean 0 and variance 1 (unbiased, eps 1e-6).

    Returns:
        A scalar: the mean over the values of all masked patches of the batch. NaN if no patch is masked.

    Raises:
        ValueError: the shapes do not match, or patches of one value cannot be normalized.

    Source: He et al., arXiv:2111.06377, section 3. The authors' `forward_loss` and transformers' ViTMAE have
    the same scale.
    """
    _check_shapes(
        prediction_BNP.ndim == 3, "masked_patch_mse", prediction_BNP, target_BNP, "(batch, patches, values)"
    )
    if mask_BN.shape != target_BNP.shape[:2]:
        raise ValueError(
            f"masked_patch_mse.mask_BN: expected a mask {tuple(target_BNP.shape[:2])} (batch, patches), got "
            f"{tuple(mask_BN.shape)}"
        )
    target_BNP = target_BNP.detach()
    if normalize:
        if target_BNP.shape[2] < 2:
            raise ValueError("masked_patch_mse.target_BNP: expected patches of at least 2 values, got 1")
        mean_BN1, std_BN1 = patch_statistics(target_BNP)
        target_BNP = (target_BNP - mean_BN1) / std_BN1
    error_BN = (prediction_BNP - target_BNP).square().mean(-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()


def patch_statistics(patches_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation (B, N, 1) by which patches are normalized.

    Source: `norm_pix_loss` of facebookresearch/mae.
    """
    variance_BN1, mean_BN1 = torch.var_mean(patches_BNP, dim=-1, keepdim=True)
    return mean_BN1, (variance_BN1 + 1e-6).sqrt()


@full_precision
def latent_smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the smooth L1 distance between predicted and target features (I-JEPA).

    Args:
        prediction: predicted features of any shape.
        target: features of the same shape, to which the caller has applied layer normalization. They get no
            gradient.

    Returns:
        A scalar: the mean over all numbers of d^2 / 2 where |d| < 1 and |d| - 1 / 2 elsewhere (beta 1).

    Raises:
        ValueError: the shapes differ, or the tensors are empty.

    Source: the authors' `train.py` of I-JEPA has the same scale. `latent_squared_l2` is the loss of the
    paper.
    """
    _check_shapes(prediction.numel() > 0, "latent_smooth_l1", prediction, target, "that is not empty")
    return smooth_l1_loss(prediction, target.detach())


@full_precision
def latent_squared_l2(prediction_BMTD: Tensor, target_BMTD: Tensor) -> Tensor:
    """Return the squared L2 distance between predicted and target features of blocks (I-JEPA's paper).

    Args:
        prediction_BMTD: predicted features of the T patches of M target blocks of each image.
        target_BMTD: features of the same shape, to which the caller has applied layer normalization. They get
            no gradient.

    Returns:
        A scalar: the mean over images and blocks of the squared distance, summed over the patches of a block
        and their features.

    Raises:
        ValueError: the shapes differ, the tensors do not have four dimensions, or they are empty.

    Source: Assran et al., arXiv:2301.08243, section 3, "Loss". The authors' code has `latent_smooth_l1`.
    """
    valid = prediction_BMTD.ndim == 4 and prediction_BMTD.numel() > 0
    expected = "(batch, blocks, patches, features) that is not empty"
    _check_shapes(valid, "latent_squared_l2", prediction_BMTD, target_BMTD, expected)
    return (prediction_BMTD - target_BMTD.detach()).square().sum((2, 3)).mean()


def _check_shapes(valid: bool, name: str, prediction: Tensor, target: Tensor, expected: str) -> None:
    """Raise `ValueError` unless the shape of the prediction is valid and is also that of the target."""
    if not valid or prediction.shape != target.shape:
        raise ValueError(
            f"{name}: expected predictions and targets of one shape {expected}, got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
