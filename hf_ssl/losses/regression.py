# SPDX-License-Identifier: Apache-2.0
"""Losses that predict a target: another view's embedding, a patch's pixels or features.

Legend: B batch, D dims, N patches, P values in a patch.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from hf_ssl.losses.precision import full_precision


@full_precision
def cosine_regression(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Squared distance between the directions of predictions and targets (BYOL, SimSiam, DirectPred).

    Args:
        prediction_BD, target_BD: embeddings of two views of the same B images; normalised inside. The caller
            detaches the target.

    Returns:
        Scalar in [0, 4]: mean over images of 2 - 2 cos.

    Raises:
        ValueError: not two matrices of one shape.

    Source: Grill et al., arXiv:2006.07733, eq. 2, which BYOL adds for both directions. The authors' code and
    solo-learn have the same scale. SimSiam (arXiv:2011.10566, eq. 1 and 2) and lightly take half the sum of
    -cos over both directions: a quarter of the gradient of BYOL's sum, so an lr for SGD differs by 4.
    """
    if prediction_BD.ndim != 2 or prediction_BD.shape != target_BD.shape:
        raise ValueError(
            f"cosine_regression needs predictions and targets (batch, dims) of one shape, got "
            f"{tuple(prediction_BD.shape)} and {tuple(target_BD.shape)}"
        )
    cosine_B = (normalize(prediction_BD, dim=-1) * normalize(target_BD, dim=-1)).sum(-1)
    return (2 - 2 * cosine_B).mean()


@full_precision
def masked_patch_mse(
    prediction_BNP: Tensor, target_BNP: Tensor, mask_BN: Tensor, *, normalize: bool
) -> Tensor:
    """Mean squared error over the values of masked patches (MAE).

    Args:
        prediction_BNP: predicted values of all N patches.
        target_BNP: the patches themselves; no gradient reaches them.
        mask_BN: 1 or True where a patch was masked and counts, 0 where the encoder saw it.
        normalize: compare with patches that have mean 0 and variance 1 each (unbiased variance, eps 1e-6).

    Returns:
        Scalar: mean over the values of all masked patches of the batch; NaN if none is masked.

    Raises:
        ValueError: shapes that do not belong together, or patches of one value that are to be normalised.

    Source: He et al., arXiv:2111.06377, section 3; the authors' `forward_loss` and transformers' ViTMAE have
    the same scale.
    """
    if prediction_BNP.ndim != 3 or prediction_BNP.shape != target_BNP.shape:
        raise ValueError(
            "masked_patch_mse needs predictions and targets (batch, patches, values) of one shape, got "
            f"{tuple(prediction_BNP.shape)} and {tuple(target_BNP.shape)}"
        )
    if mask_BN.shape != target_BNP.shape[:2]:
        raise ValueError(
            f"masked_patch_mse needs a mask {tuple(target_BNP.shape[:2])} (batch, patches), got "
            f"{tuple(mask_BN.shape)}"
        )
    target_BNP = target_BNP.detach()
    if normalize:
        if target_BNP.shape[2] < 2:
            raise ValueError("masked_patch_mse cannot normalise patches of one value")
        variance_BN1, mean_BN1 = torch.var_mean(target_BNP, dim=-1, keepdim=True)
        target_BNP = (target_BNP - mean_BN1) / (variance_BN1 + 1e-6).sqrt()
    error_BN = (prediction_BNP - target_BNP).square().mean(-1)
    return (error_BN * mask_BN).sum() / mask_BN.sum()


@full_precision
def latent_smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 distance between predicted and actual features (I-JEPA).

    Args:
        prediction: predicted features, any shape.
        target: of the same shape, layer-normalised by the caller already; no gradient reaches it.

    Returns:
        Scalar: mean over all numbers of d^2 / 2 where |d| < 1 and |d| - 1 / 2 elsewhere (beta 1).

    Raises:
        ValueError: different shapes, or nothing in them.

    Source: the authors' `train.py` of I-JEPA (same scale); the paper (Assran et al., arXiv:2301.08243,
    section 3) writes a squared distance, summed over the features of a patch.
    """
    if prediction.shape != target.shape or not prediction.numel():
        raise ValueError(
            f"latent_smooth_l1 needs predictions and targets of one shape that is not empty, got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    return smooth_l1_loss(prediction, target.detach())
