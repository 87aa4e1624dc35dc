# SPDX-License-Identifier: Apache-2.0
"""Statistics of features that need no labels: indicators of collapse and quality, scales, and principal axes.

All functions are pure functions of tensors or arrays. They convert half precision to float32, and keep
float64.
Legend: N images, V views of an image, D features, A axes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_CHUNK = 1024
STATISTICS_ROWS = 10_000  # uniformity compares all pairs of these rows
_NUMBERS_AT_ONCE = 1 << 24  # numbers in a chunk of rows: 128 MiB in float64


def feature_statistics(features: Tensor) -> dict[str, float]:
    """Return the statistics of features (N, D), computed on at most 10,000 evenly spaced rows.

    `alpha_req` is missing if the features have too few dimensions.
    """
    index = evenly_spaced(len(features), STATISTICS_ROWS)
    sample = features[index]
    alpha = alpha_req(sample)
    return {
        "embedding_std": embedding_std(sample),
        "rank_me": rank_me(sample),
        **({"alpha_req": alpha} if math.isfinite(alpha) else {}),
        "uniformity": uniformity(sample),
        "images": len(index),
    }


def evenly_spaced(images: int, most: int) -> Tensor:
    """Return at most `most` row numbers of the images, evenly spaced, int64."""
    count = min(images, most)
    return torch.arange(count) * images // count


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
    largest = float(rows.detach().abs().max()) if rows.numel() else 0.0
    if largest and not 1e-100 < largest < 1e100:  # squares would be infinite or zero
        rows = rows / largest
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return _effective_rank(singular, eps)


def _effective_rank(values: Tensor, eps: float) -> float:
    """Return exp(-sum p log p) with p = value / sum + eps, or 1 if all values are zero."""
    total = values.sum()
    if total == 0:
        return 1.0
    share = values / total + eps
    return float(torch.exp(-(share * share.log()).sum()))


def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """Return LiDAR: the effective number of dimensions that distinguish images from each other.

    It is the effective rank of S_w^(-1/2) S_b S_w^(-1/2). S_b is the covariance of the mean features of the
    images. S_w is the mean covariance of the views of one image, plus delta on the diagonal. The value is
    between 1 and about min(N - 1, D). Features that do not depend on the image give 1, and features that are
    not finite give NaN.

    Args:
        views: (N, V, D), row [i, v] from view v of image i. At least 2 images and 2 views.
        delta: number that is added to the diagonal of S_w.
        eps: small constant in the entropy.

    Raises:
        ValueError: there are fewer than 2 images or views.

    Source: LiDAR (2312.04000), section 3. The paper uses 50 views of each of 1,000 images. Its features are
    those of the projector. Here, `views` can also contain features of the encoder.
    """
    views = torch.as_tensor(views).double()
    if views.ndim != 3 or min(views.shape[:2]) < 2:
        raise ValueError(f"lidar: expected (N, V, D) with N, V >= 2, got {tuple(views.shape)}")
    if not torch.isfinite(views).all():
        return math.nan
    means = views.mean(dim=1)
    between, within = means - means.mean(dim=0), (views - means[:, None]).flatten(0, 1)
    S_w = within.T @ within / len(within) + delta * torch.eye(views.shape[2], device=views.device)
    # The eigenvalues of S_w^(-1/2) S_b S_w^(-1/2) are those of L^(-1) S_b L^(-T), where S_w = L L^T.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(S_w), between.T, upper=False)
    scatter = whitened @ whitened.T if len(means) >= views.shape[2] else whitened.T @ whitened
    return _effective_rank(torch.linalg.eigvalsh(scatter / len(means)).clamp_min(0), eps)


def alpha_req(features: Tensor, ranks: tuple[int, int] = (4, 100)) -> float:
    """Return alpha of the power law i^(-alpha) that fits the eigenvalues of the covariance of features.

    A small alpha (0: all directions have the same variance) means that many directions are used. A large
    alpha means that the features are nearly collapsed. The authors found the best accuracy with an alpha of
    about 1. The fit is a regression of log eigenvalue on log i with the weights 1 / i. Features with fewer
    than 2 usable eigenvalues and features that are not finite give NaN.

    Args:
        features: (N, D). The function centers them.
        ranks: the first and the last i of the fit. The fit ends earlier if there are fewer eigenvalues above
            the rounding error.

    Source: alpha-ReQ (Agrawal et al., NeurIPS 2022). The weights and the ranks 4 to 100 are those of the
    authors' code, which took the regression from Stringer et al. 2019.
    """
    rows = torch.as_tensor(features).double()
    if not torch.isfinite(rows).all():
        return math.nan
    rows = rows - rows.mean(dim=0)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    usable = int((eigenvalues > 1e-10 * eigenvalues[0]).sum()) if eigenvalues[0] > 0 else 0
    first, last = ranks[0], min(ranks[1], usable)
    if last - first < 1:
        return math.nan
    number = torch.arange(first, last + 1, dtype=torch.float64, device=rows.device)
    x, y, weight = number.log(), eigenvalues[first - 1 : last].log(), 1 / number
    x_mean, y_mean = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    return -float((weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum())


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


def standardized(train: Tensor, test: Tensor, *, center: bool = True) -> tuple[Tensor, Tensor]:
    """Return features (M, D) and (N, D), scaled to standard deviation 1 over the training images.

    A feature that is constant in the training images keeps its scale, see `scale_of`.

    Args:
        train, test: features of the training images and of the test images.
        center: whether the mean over the training images is subtracted.
    """
    scale = scale_of(train.std(dim=0), train.abs().amax(dim=0))
    mean = train.mean(dim=0) if center else torch.zeros_like(scale)
    return (train - mean) / scale, (test - mean) / scale


def scale_of(deviation: Tensor, largest: Tensor) -> Tensor:
    """Return the divisors (D,) that standardize features: their standard deviations, but 1 for constant ones.

    A feature is constant if it varies only by rounding. Its small deviation would make its values in other
    images huge.

    Args:
        deviation: standard deviation of each feature.
        largest: largest absolute value of each feature.
    """
    return torch.where(deviation > 1e-6 * largest, deviation, 1.0)


def unit_rows(features: Tensor) -> Tensor:
    """Return L2-normalized rows (N, D), in float64 if the features are float64, else in float32."""
    rows = torch.as_tensor(features)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    # With the default eps of 1e-12, rows with a smaller norm would not get the norm 1.
    return F.normalize(rows, dim=1, eps=1e-18)


class Axes(NamedTuple):
    """The principal axes of centered features.

    Attributes:
        mean: (D,) float64, the mean of the features.
        axes: (D, A) float64 with orthonormal columns, A <= min(N - 1, D). Directions without variance are
            missing.
        squares: (A,) float64, the sum of squares of the centered features along each axis, ascending.
    """

    mean: Tensor
    axes: Tensor
    squares: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Return the coordinates (N, A) float64 of features (N, D)."""
        return (features.double() - self.mean) @ self.axes


def principal_axes(features: Tensor) -> Axes:
    """Return the principal axes of features (N, D), computed in float64.

    A linear classifier with a penalty on the squares of its weights and none on its bias is the same in these
    coordinates: centering changes only the bias, and a rotation does not change the penalty. The weights of
    the best classifier have no part in directions without variance.
    """
    rows, width = features.shape
    mean = torch.stack([part.double().sum(dim=0) for part in row_chunks(features)]).sum(dim=0) / rows
    if rows > width:
        products = mean.new_zeros(width, width)
        for part in row_chunks(features):
            centered = part.double() - mean
            products.addmm_(centered.T, centered)
        squares, axes = torch.linalg.eigh(products)
    else:
        centered = features.double() - mean
        squares, axes = torch.linalg.eigh(centered @ centered.T)
    kept = squares > squares[-1] * max(rows, width) * torch.finfo(torch.float64).eps
    squares, axes = squares[kept], axes[:, kept]
    if rows <= width:
        axes = centered.T @ axes / squares.sqrt()
    return Axes(mean, axes, squares)


def row_chunks(features: Tensor) -> tuple[Tensor, ...]:
    """Return the rows (N, D) in chunks that fit into memory several times."""
    return features.split(max(1, _NUMBERS_AT_ONCE // max(1, features.shape[1])))


def float64_device(device: torch.device) -> torch.device:
    """Return the device of computations in float64: the CPU instead of an Apple GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
