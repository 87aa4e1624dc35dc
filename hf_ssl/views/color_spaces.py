# SPDX-License-Identifier: Apache-2.0
"""Color spaces and the gradient magnitude of images (layer 0): pure functions of RGB pixels.

They follow scikit-image 0.26 (`skimage.color`: `rgb2lab`, `rgb2ydbdr`, `rgb2ycbcr`), which the code of CMC
(HobbitLong/CMC) and PyContrast calls. No value is clipped.

Legend: C color channels, H, W sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_ssl.views.preset import IMAGENET_MEAN, IMAGENET_STD

Row = tuple[float, float, float]
Matrix = tuple[Row, Row, Row]

_XYZ: Matrix = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE: Row = (0.95047, 1.0, 1.08883)  # illuminant D65, observer of 2 degrees
_LUMINANCE: Row = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColorSpace:
    """A color space with three channels.

    Attributes:
        channels: names of the channels.
        groups: how many consecutive channels form each view of CMC by default.
        mean, std: statistics of the channels for the normalization. Those of Lab, YDbDr and YCbCr are in the
            code of the authors (HobbitLong/CMC, train_CMC.py; PyContrast, datasets/util.py). Those of RGB are
            the usual ones of ImageNet.
        matrix, offset: a linear color space is `matrix @ rgb + offset`. None for the others.
    """

    channels: tuple[str, str, str]
    groups: tuple[int, ...]
    mean: Row
    std: Row
    matrix: Matrix | None = None
    offset: Row = (0.0, 0.0, 0.0)

    @property
    def is_linear(self) -> bool:
        """Return whether the color space is a linear map of RGB, with an offset."""
        return self.matrix is not None


COLOR_SPACES: dict[str, ColorSpace] = {
    "lab": ColorSpace(
        channels=("l", "a", "b"),
        groups=(1, 2),
        mean=(50.0, 6.025, -6.6895),
        std=(50.0, 92.208, 101.1675),
    ),
    "ydbdr": ColorSpace(
        channels=("y", "db", "dr"),
        groups=(1, 2),
        mean=(0.457, -0.082, -0.052),
        std=(0.5, 1.331, 1.333),
        matrix=(_LUMINANCE, (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217)),
    ),
    "ycbcr": ColorSpace(
        channels=("y", "cb", "cr"),
        groups=(1, 2),
        mean=(116.151, 121.08, 132.342),
        std=(109.5, 111.855, 111.964),
        matrix=((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214)),
        offset=(16.0, 128.0, 128.0),
    ),
    "rgb": ColorSpace(
        channels=("r", "g", "b"),
        groups=(1, 1, 1),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        matrix=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ),
}


def to_color_space(rgb: Tensor, space: str) -> Tensor:
    """Return images (..., 3, H, W) in another color space.

    Args:
        rgb: floating-point images (..., 3, H, W). Colors are in [0, 1].
        space: key of `COLOR_SPACES`.

    Raises:
        ValueError: the color space is unknown, or the images do not have three channels.
    """
    if space not in COLOR_SPACES:
        raise ValueError(f"to_color_space.space: expected one of {', '.join(COLOR_SPACES)}, got {space!r}")
    _check_rgb("to_color_space", rgb)
    found = COLOR_SPACES[space]
    return _lab(rgb) if found.matrix is None else linear_map(rgb, found.matrix, found.offset)


def linear_map(images: Tensor, matrix: Sequence[Sequence[float]], offset: Sequence[float] = ()) -> Tensor:
    """Return `matrix @ color + offset` for each color of images (..., C, H, W).

    The constants are Python numbers. So this function copies nothing to the device and has the precision of
    the images, also under autocast.

    Args:
        images: (..., C, H, W).
        matrix: one row of C numbers for each channel of the result.
        offset: one number for each channel of the result, or () for zeros.
    """
    planes = images.unbind(-3)
    offset = offset or [0.0] * len(matrix)
    rows = []
    for row, constant in zip(matrix, offset, strict=True):
        terms = [plane * factor for plane, factor in zip(planes, row, strict=True) if factor]
        total = sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(planes[0])
        rows.append(total + constant if constant else total)
    return torch.stack(rows, dim=-3)


@dataclass(frozen=True)
class ColorViews:
    """Divides normalized RGB images into views: normalized channels of a color space.

    In a linear color space, the means of the channels are those of the color `mean`, not `ColorSpace.mean`. A
    view is then a linear map of the normalized image, without an offset. So zeros, which convolutions add at
    the borders, are the same color in both. `rgb_mean` returns the color that has the means of the authors.

    Attributes:
        space: key of `COLOR_SPACES`.
        groups: how many consecutive channels form each view. Their sum is 3.
        mean, std: the normalization of the images, in RGB.
    """

    space: str
    groups: tuple[int, ...]
    mean: Row
    std: Row

    @property
    def names(self) -> list[str]:
        """Return the name of each view: those of its channels, without a space."""
        channels = iter(COLOR_SPACES[self.space].channels)
        return ["".join(next(channels) for _ in range(size)) for size in self.groups]

    @property
    def matrices(self) -> list[list[list[float]]] | None:
        """Return the linear map of each view, a list of rows of 3 numbers; None if it is not linear."""
        space = COLOR_SPACES[self.space]
        if space.matrix is None:
            return None
        rows = [
            [factor * std / scale for factor, std in zip(row, self.std, strict=True)]
            for row, scale in zip(space.matrix, space.std, strict=True)
        ]
        return [[rows.pop(0) for _ in range(size)] for size in self.groups]

    @property
    def statistics(self) -> list[tuple[list[float], list[float]]]:
        """Return the mean and the standard deviation of each channel of each view, in its color space.

        A view is `(channel - mean) / std` for each of its channels.
        """
        space = COLOR_SPACES[self.space]
        means = list(space.mean)
        if space.matrix is not None:
            means = [
                sum(factor * color for factor, color in zip(row, self.mean, strict=True)) + constant
                for row, constant in zip(space.matrix, space.offset, strict=True)
            ]
        pairs = list(zip(means, space.std, strict=True))
        views = [[pairs.pop(0) for _ in range(size)] for size in self.groups]
        return [([mean for mean, _ in view], [std for _, std in view]) for view in views]

    def divide(self, images: Tensor) -> list[Tensor]:
        """Return the views (..., c, H, W) of normalized RGB images (..., 3, H, W).

        Raises:
            ValueError: the images do not have three channels.
        """
        _check_rgb("ColorViews.divide", images)
        if self.matrices is not None:
            return [linear_map(images, matrix) for matrix in self.matrices]
        space = COLOR_SPACES[self.space]
        channels = to_color_space(self.restore(images), self.space)
        scales = [[1 / std if i == j else 0.0 for j in range(3)] for i, std in enumerate(space.std)]
        shifts = [-mean / std for mean, std in zip(space.mean, space.std, strict=True)]
        return list(linear_map(channels, scales, shifts).split(self.groups, dim=-3))

    def restore(self, images: Tensor) -> Tensor:
        """Return the colors of normalized images (..., 3, H, W), in [0, 1] as before the normalization."""
        scales = [[std if i == j else 0.0 for j in range(3)] for i, std in enumerate(self.std)]
        return linear_map(images, scales, self.mean)


def rgb_mean(space: str) -> Row:
    """Return the RGB color that a linear color space maps to its mean.

    With this color as `views.mean`, the views of CMC have the means of the authors' code.

    Raises:
        ValueError: the color space is unknown or not linear.
    """
    found = COLOR_SPACES.get(space)
    if found is None or found.matrix is None:
        linear = [name for name, known in COLOR_SPACES.items() if known.is_linear]
        raise ValueError(f"rgb_mean.space: expected one of {', '.join(linear)}, got {space!r}")
    shifted = [mean - offset for mean, offset in zip(found.mean, found.offset, strict=True)]
    red, green, blue = np.linalg.solve(np.array(found.matrix), np.array(shifted)).tolist()
    return red, green, blue


def gradient_magnitude(rgb: Tensor) -> Tensor:
    """Return the length (..., 1, H, W) of the gradient of the luminance.

    Central differences approximate the derivatives along rows and columns, per pixel. The pixels outside of
    the image equal the nearest ones inside. The luminance is the Y of YDbDr.

    Args:
        rgb: floating-point images (..., 3, H, W) with sides of at least 1 pixel.

    Raises:
        ValueError: the images do not have three channels.
    """
    _check_rgb("gradient_magnitude", rgb)
    luminance = linear_map(rgb, (_LUMINANCE,))
    batch = luminance.reshape(-1, 1, *luminance.shape[-2:])
    padded = pad(batch, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return (across.square() + down.square()).sqrt().reshape(luminance.shape)


def _lab(rgb: Tensor) -> Tensor:
    """Return Lab of sRGB. L is in [0, 100]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    xyz = linear_map(
        linear, [[factor / white for factor in row] for row, white in zip(_XYZ, _WHITE, strict=True)]
    )
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def _check_rgb(name: str, rgb: Tensor) -> None:
    if rgb.ndim < 3 or rgb.shape[-3] != 3 or not rgb.is_floating_point():
        raise ValueError(
            f"{name}.rgb: expected floating-point images (..., 3, height, width), got {rgb.dtype} "
            f"{tuple(rgb.shape)}"
        )
