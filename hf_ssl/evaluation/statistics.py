# SPDX-License-Identifier: Apache-2.0
"""Numbers that need no labels: is the space of features used, or has it collapsed?

Pure functions of tensors. Half precision is raised to float32, float64 is left alone.
Legend: N images, D features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_CHUNK = 1024


def embedding_std(features: Tensor) -> float:
    """Spread of the directions: 1 for features that point everywhere alike, 0 where all images look the same.

    features: (N, D). Each row is L2-normalised; the standard deviation (over N, not N - 1) of each of the D
    columns is averaged and multiplied by sqrt(D).

    Source: SimSiam (2011.10566), section 4.1, where it is shown without the factor sqrt(D).
    """
    unit = _unit(features)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def rank_me(features: Tensor, eps: float = 1e-7) -> float:
    """Effective number of dimensions in use, from 1 (collapsed) to about min(N, D).

    features: (N, D), taken as they are, neither centred nor normalised.
    p_k = sigma_k / sum(sigma) + eps for the singular values sigma; the result is exp(-sum p_k log p_k).

    Source: RankMe (2210.02885), equation 1. The singular values come from the smaller Gram matrix in float64,
    which is faster than an SVD, and agrees with one in float64 to seven digits. Features that are all zero
    give 1.
    """
    rows = features.double()
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    share = singular / total + eps
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(first: Tensor, second: Tensor, alpha: float = 2.0) -> float:
    """Mean distance, to the power alpha, between two views of an image: 0 is perfect, 2 is chance at alpha 2.

    first, second: (N, D), row i of both from image i; L2-normalised inside.

    Source: Wang & Isola (2005.10242), section 4.1.
    """
    return float((_unit(first) - _unit(second)).norm(dim=1).pow(alpha).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Log of the mean of exp(-t d^2) over pairs of different images: 0 is collapse, about -2 t (-4) is even.

    features: (N, D) with N >= 2; L2-normalised inside; d is the distance of two rows.

    Raises ValueError for fewer than two rows.
    Source: Wang & Isola (2005.10242), section 4.1.
    """
    unit = _unit(features)
    images = len(unit)
    if images < 2:
        raise ValueError(f"uniformity: expected at least 2 rows, got {images}.")
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, images, ROW_CHUNK):
        chunk = unit[start : start + ROW_CHUNK]
        # |a - b|^2 = 2 - 2 cos; rounding may leave a cosine just above 1.
        squared = (2 - 2 * (chunk @ unit.T)).clamp_min(0)
        potential = torch.exp(-t * squared)
        own = torch.arange(len(chunk), device=unit.device)
        potential[own, own + start] = 0
        total += potential.sum(dtype=torch.float64)
    return float(torch.log(total / (images * (images - 1))))


def _unit(features: Tensor) -> Tensor:
    rows = features if features.dtype == torch.float64 else features.float()
    return F.normalize(rows, dim=1)
