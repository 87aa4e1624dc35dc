# SPDX-License-Identifier: Apache-2.0
"""Principal axes of features, in which closed forms and solvers are fast and accurate.

Legend: N images, D features, A axes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers in a chunk of rows: 128 MiB in float64


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
    return features.split(max(1, _CHUNK // max(1, features.shape[1])))


def float64_device(device: torch.device) -> torch.device:
    """Return the device of computations in float64: the CPU instead of an Apple GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
