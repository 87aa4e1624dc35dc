# SPDX-License-Identifier: Apache-2.0
"""Statistics of features that need no labels and indicate collapse.

All functions are pure functions of tensors or arrays. They convert half precision to float32, and keep
float64.
Legend: N images, D features.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_CHUNK = 1024
STATISTICS_ROWS = 10_000  # uniformity compares all pairs of these rows


def feature_statistics(features: Tensor) -> dict[str, float]:
    """Return the statistics of features (N, D), computed on at most 10,000 evenly spaced rows."""
    rows = min(len(features), STATISTICS_ROWS)
    index = torch.arange(rows) * len(features) // rows
    sample = features[index]
    return {
        "embedding_std": embedding_std(sample),
        "rank_me": rank_me(sample),
        "uniformity": uniformity(sample),
        "images": rows,
    }


def embedding_std(features: Tensor) -> float:
    """Return the spread of the feature directions, from 0 (all equal) to about 1 (uniform on the sphere).

    The rows are L2-normalized. The standard deviations (over N, not N - 1) of the D columns are averaged, and
    the mean is multiplied by sqrt(D).

    Args:
        features: (N, D).

    Source: SimSiam (2011.10566), section 4.1, which reports it without the factor sqrt(D).
    """
    unit = unit_rows(features)
    return float(unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5)


def rank_me(features: Tensor, eps: float = 1e-7) -> float:
    """Return the effective number of dimensions, from 1 (collapsed) to about min(N, D).

    The result is exp(-sum p_k log p_k) with p_k = sigma_k / sum(sigma) + eps for the singular values sigma.
    They are computed from the smaller Gram matrix in float64. This is faster than an SVD and agrees with
    an SVD in float64 to seven digits. Features that are all zero give 1, and features that are not finite
    give NaN.

    Args:
        features: (N, D), neither centered nor normalized.
        eps: small constant of the definition.

    Source: RankMe (2210.02885), equation 1.
    """
    rows = torch.as_tensor(features).double()
    if not torch.isfinite(rows).all():
        return math.nan  # the eigenvalues cannot be computed
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    share = singular / total + eps
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(first: Tensor, second: Tensor, alpha: float = 2.0) -> float:
    """Return the mean of distance ** alpha between two views of each image.

    The value is 0 for identical views. With alpha 2, it is 2 on average for unrelated directions.

    Args:
        first, second: (N, D), row i of both from image i. The function L2-normalizes the rows.
        alpha: exponent of the distance.

    Source: Wang & Isola (2005.10242), section 4.1.
    """
    return float((unit_rows(first) - unit_rows(second)).norm(dim=1).pow(alpha).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Return the log of the mean of exp(-t d^2) over pairs of different images.

    The value is 0 for collapsed features and about -2 t (-4) for features that are uniform on the sphere.

    Args:
        features: (N, D) with N >= 2. The function L2-normalizes the rows; d is the distance of two rows.
        t: factor of the squared distance.

    Raises:
        ValueError: there are fewer than two rows.

    Source: Wang & Isola (2005.10242), section 4.1.
    """
    unit = unit_rows(features)
    images = len(unit)
    if images < 2:
        raise ValueError(f"uniformity: expected at least 2 rows, got {images}")
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, images, ROW_CHUNK):
        chunk = unit[start : start + ROW_CHUNK]
        # |a - b|^2 = 2 - 2 cos. Rounding can make a cosine slightly larger than 1.
        squared = (2 - 2 * (chunk @ unit.T)).clamp_min(0)
        potential = torch.exp(-t * squared)
        own = torch.arange(len(chunk), device=unit.device)
        potential[own, own + start] = 0
        total += potential.sum(dtype=torch.float64)
    return float(torch.log(total / (images * (images - 1))))


def unit_rows(features: Tensor) -> Tensor:
    """Return L2-normalized rows (N, D), in float64 if the features are float64, else in float32."""
    rows = torch.as_tensor(features)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(rows, dim=1)
