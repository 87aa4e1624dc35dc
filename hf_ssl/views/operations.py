# SPDX-License-Identifier: Apache-2.0
"""The augmentations that change pixels, such as color jitter and Gaussian blur. `OPERATIONS` lists them.

All of them work in place on batches of float32 pixels in [0, 1] (up to rounding), each sample with its own
augmentation parameters. Each one equals torchvision's operation of the same name to 1e-5, also in its
clamping. The rotation differs at the edges, see `rotate_`.

CONTRIBUTING.md ("Add an augmentation") explains how to add one.

Legend: N views, C channels, H, W sides, S side of a square view, P = H * W pixels, R radius of the blur's
kernel (its size is 2 R + 1).
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

from hf_ssl.views.preset import ViewSettings

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
"""(24, 4): the part of the color jitter that comes first, second, third and fourth."""
LUMA = (0.2989, 0.587, 0.114)
"""The weights of red, green and blue in gray, as in torchvision. Their sum is 0.9999."""
_NO_HUE, _NO_JITTER = 4, 5
_TILE = 32  # rows of a band matrix in one product: smaller tiles skip more zeros, larger ones multiply faster


def between(number: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Return numbers in [low, high) from numbers in [0, 1)."""
    return low + (high - low) * number


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy numbers from the host to a device, without waiting for the device's queue."""
    return torch.from_numpy(values).to(device, non_blocking=True)


# Color jitter


def jitter_groups(
    jitter: NDArray[np.bool_], order: NDArray[np.int64], hue: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the position (0 to 3) of the hue in each sample's order: (N,).

    The number is 4 for samples whose hue does not change, and 5 for samples without color jitter. In an array
    sorted by this number, samples with the same position of the hue are contiguous and need no gathering.
    """
    position = np.argmax(JITTER_ORDERS[order] == HUE, axis=1)
    return np.where(jitter, np.where(hue != 0, position, _NO_HUE), _NO_JITTER)


def jitter_(
    pixels: Tensor, groups: NDArray[np.int64], order: NDArray[np.int64], factors: NDArray[np.float32]
) -> None:
    """Change brightness, contrast, saturation and hue, in each sample's own order.

    Args:
        pixels: (N, C, H, W), sorted by `groups`. C is 1 or 3, unless only the brightness changes.
        groups: (N,) from `jitter_groups`, ascending.
        order: (N,) row numbers of JITTER_ORDERS.
        factors: (N, 4) brightness, contrast, saturation, hue.
    """
    starts = np.searchsorted(groups, np.arange(_NO_JITTER + 1)).tolist()
    jittered = starts[_NO_JITTER]
    if not jittered:
        return
    # Each part except the hue mixes a pixel with black, the image's mean gray or the pixel's own gray.
    # The arrays below have shape (4, N).
    parts = JITTER_ORDERS[order[:jittered]].T
    factor = factors[np.arange(jittered), parts]
    of_pixel = np.where(parts == HUE, np.float32(1), factor)
    of_mean = np.where(parts == CONTRAST, 1 - factor, np.float32(0))
    of_gray = np.where(parts == SATURATION, 1 - factor, np.float32(0))
    weights = to_device(np.stack((of_pixel, of_mean, of_gray)), pixels.device)
    turns = to_device(factors[:jittered, HUE], pixels.device)
    for position in range(4):
        first, last = starts[position], starts[position + 1]
        for run in (slice(0, first), slice(last, jittered)):
            if run.start < run.stop:
                pixel, mean, gray = weights[:, position, run, None].unbind()
                uses_mean, uses_gray = of_mean[position, run].any(), of_gray[position, run].any()
                mix_(pixels[run], pixel, mean if uses_mean else None, gray if uses_gray else None)
        if first < last:
            hue_(pixels[first:last], turns[first:last])


def mix_(pixels: Tensor, of_pixel: Tensor, of_mean: Tensor | None, of_gray: Tensor | None) -> None:
    """Change brightness, contrast or saturation.

    Each pixel becomes the weighted sum of itself, of the mean gray of its image and of its own gray.

    Args:
        pixels: (N, C, H, W).
        of_pixel, of_mean, of_gray: the weights (N, 1). None stands for zeros and saves work.
    """
    planes = pixels.flatten(2)
    added = None
    if of_mean is not None:
        added = _luma(planes.mean(2, keepdim=True)).mul_(of_mean)
    if of_gray is not None:
        grays = _luma(planes).mul_(of_gray)
        added = grays if added is None else grays.add_(added)
    planes.mul_(of_pixel[:, None])
    if added is not None:
        planes.add_(added[:, None])
    planes.clamp_(0, 1)


def hue_(pixels: Tensor, turns: Tensor) -> None:
    """Rotate the hue of (N, 3, H, W) by (N,) turns of -0.5 to 0.5.

    The conversion to HSV and back uses no branch, gather or comparison, because each of them costs as much as
    four additions. The channels are stretched to [0, 1] first. On the half of the color circle where
    green >= blue, the hue in sixths of a turn is 1 - r + g + b. On the other half, it is minus that number.
    On the way back, each channel is low + chroma * trapezoid. The trapezoid is a function of the distance of
    the hue from the channel's opposite hue (red) or from its own hue (green, blue).
    """
    red, green, blue = pixels.unbind(1)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = (high - low).clamp_(min=1e-12)
    hue = torch.add(green, blue).sub_(red).add_(chroma).sub_(low).copysign_(green.sub_(blue))
    torch.addcdiv(1 + turns[:, None, None], hue, chroma, value=1 / 6, out=hue).frac_()
    # From here on, the new channels overwrite the old ones, because little memory fits into the cache.
    low.sub_(chroma)
    high.add_(chroma)
    for channel, base, center, sign in (
        (red, low, 1 / 2, 6),
        (green, high, 1 / 3, -6),
        (blue, high, 2 / 3, -6),
    ):
        torch.sub(hue, center, out=channel).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, channel, chroma, value=sign, out=channel)


def _luma(planes: Tensor) -> Tensor:
    """Return the gray (N, P) of pixels (N, C, P) in new memory. A single channel is its own gray."""
    if planes.shape[1] == 1:
        return planes[:, 0].clone()
    luma = to_device(np.array(LUMA, np.float32), planes.device).expand(len(planes), 1, 3)
    return torch.bmm(luma, planes)[:, 0]


# Grayscale and solarization


def gray_(pixels: Tensor) -> None:
    """Replace the channels of (N, 3, H, W) by the gray of each pixel."""
    planes = pixels.flatten(2)
    planes.copy_(_luma(planes)[:, None])


def solarize_(pixels: Tensor, threshold: float) -> None:
    """Invert the values at or above the threshold."""
    pixels.copy_(torch.where(pixels >= threshold, 1 - pixels, pixels))


# Gaussian blur


def gaussian_weights(sigma: Tensor, radius: int) -> Tensor:
    """Return the weights (N, R + 1) of the neighbors of a pixel at distance 0 to R.

    The sigmas (N,) are in pixels.
    The kernel is torchvision's: the Gaussian at whole pixels, normalized to the sum 1 over 2 R + 1 pixels.
    """
    distance = torch.arange(radius + 1, dtype=torch.float32, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]).square())
    # Weights below 1e-20 change no pixel, but as denormal numbers they make a processor many times slower.
    weights = torch.nn.functional.threshold(weights, 1e-20, 0.0)
    return weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])


def blur_(pixels: Tensor, sigma: Tensor, kernel_size: int) -> None:
    """Blur (N, C, S, S) float32 in place, as two products with band matrices. The edges are mirrored.

    Args:
        pixels: (N, C, S, S).
        sigma: (N,) float32 in pixels, on the device of `pixels`.
        kernel_size: odd, less than 2 S.
    """
    count, channels, side, _ = pixels.shape
    weights = gaussian_weights(sigma, kernel_size // 2)
    tiles = [
        (rows, inputs, (weights @ band).view(count, rows.stop - rows.start, -1))
        for rows, inputs, band in _tiles(side, kernel_size // 2, sigma.device)
    ]
    planes = pixels.view(count * channels, side, side)
    narrow = [torch.bmm(band.repeat_interleave(channels, 0), planes[:, inputs]) for _, inputs, band in tiles]
    lines = torch.cat(narrow, dim=1).view(count, channels * side, side)
    wide = [torch.bmm(lines[:, :, inputs], band.transpose(1, 2)) for _, inputs, band in tiles]
    torch.cat(wide, dim=2, out=pixels.view(lines.shape))


@lru_cache(maxsize=8)
def _tiles(side: int, radius: int, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """Return the nonzero tiles of the band matrix (S, S) that blurs a line with mirrored edges.

    Each tile consists of its output pixels, the input pixels that they depend on, and a count
    (R + 1, outputs * inputs). The count is the number of times that an input pixel contributes to an output
    pixel at distance 0 to R. The weight of an input in an output is the sum over distances of that count
    times the weight of the distance.
    """
    counts = torch.zeros(radius + 1, side, side)
    output = torch.arange(side)
    for offset in range(-radius, radius + 1):
        mirrored = side - 1 - (side - 1 - (output + offset).abs()).abs()
        counts[abs(offset), output, mirrored] += 1
    starts = range(0, side, _TILE)
    rows = [slice(start, min(start + _TILE, side)) for start in starts]
    inputs = [slice(max(0, row.start - radius), min(row.stop + radius, side)) for row in rows]
    return [
        (row, column, counts[:, row, column].flatten(1).to(device))
        for row, column in zip(rows, inputs, strict=True)
    ]


# Rotation


def quarter_turns_(pixels: Tensor, turns: NDArray[np.float32]) -> None:
    """Rotate square images (N, C, S, S) counterclockwise by (N,) 1, 2 or 3 quarter turns. This is exact."""
    for number in np.unique(turns):
        chosen = to_device(np.flatnonzero(turns == number), pixels.device)
        pixels.index_copy_(0, chosen, pixels.index_select(0, chosen).rot90(int(number), (2, 3)))


def rotate_(pixels: Tensor, degrees: NDArray[np.float32]) -> None:
    """Rotate square images (N, C, S, S) counterclockwise by (N,) degrees around their centers (bilinear).

    The edges are mirrored, as those of the blur, but the pixel at the edge occurs twice. torchvision fills
    the corners with a constant color. Constant corners would show the angle, and an edge that no image has.
    """
    angle = np.deg2rad(degrees.astype(np.float64))
    pixels.copy_(mapped(pixels, rotations(angle), "reflection"))


def rotations(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the maps (N, 2, 2) for `mapped` that turn the content counterclockwise by (N,) radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack((cosine, -sine, sine, cosine), axis=1).reshape(-1, 2, 2)


def mapped(pixels: Tensor, maps: NDArray[np.float64], outside: str) -> Tensor:
    """Return square images whose coordinates are mapped linearly around their centers (bilinear).

    The pixel at the offset (x, y) from the center, right and down, has the value of the original image at the
    offset `map @ (x, y)`.

    Args:
        pixels: (N, C, S, S) float32 or float64.
        maps: (N, 2, 2).
        outside: what is outside of the original image, a padding mode of `grid_sample`.
    """
    side, single = pixels.shape[-1], pixels.dtype == torch.float32
    matrices = to_device(maps.astype(np.float32) if single else maps, pixels.device)[:, :, :, None, None]
    offset = torch.arange(1 - side, side, 2, device=pixels.device, dtype=pixels.dtype) / side
    # `affine_grid` multiplies matrices, and TF32 would move pixels by a tenth of a pixel.
    grid = matrices[:, :, 0] * offset + matrices[:, :, 1] * offset[:, None]
    return grid_sample(pixels, grid.permute(0, 2, 3, 1), padding_mode=outside, align_corners=False)


# The table of operations


class Operation(NamedTuple):
    """An augmentation that changes only some of the samples of a batch, after the color jitter."""

    parameter: str
    """The name of its augmentation parameter. It is not negative, and 0 for samples that do not change."""
    numbers: range
    """The positions of its random numbers among those of a view. A new operation takes the next free ones, so
    that the numbers of the others do not change."""
    sample: Callable[[NDArray[np.float64], ViewSettings], NDArray[Any]]
    """Returns the parameter of each image (B,), from random numbers (len(numbers), B) in [0, 1)."""
    apply: Callable[[Tensor, NDArray[np.float32], ViewSettings], None]
    """Changes pixels (n, C, S, S) in place, given the parameters (n,) of these samples, none of them 0."""
    batch_settings: tuple[str, ...] = ()
    """The settings that `apply` reads. Views with different values are not in one batch."""
    moves_pixels: bool = False
    """Whether it moves pixels. It then also changes the further channels, which must match the image."""


OPERATIONS = (
    Operation(
        "gray",
        range(7, 8),
        lambda numbers, settings: numbers[0] < settings.gray,
        lambda pixels, _, settings: gray_(pixels),
    ),
    Operation(
        "sigma",
        range(8, 10),
        lambda numbers, settings: np.where(
            numbers[0] < settings.blur, between(numbers[1], *settings.blur_sigma), 0.0
        ),
        lambda pixels, sigma, settings: blur_(
            pixels, to_device(sigma, pixels.device), settings.blur_kernel_size
        ),
        ("blur_kernel",),
    ),
    Operation(
        "solarize",
        range(10, 11),
        lambda numbers, settings: numbers[0] < settings.solarize,
        lambda pixels, _, settings: solarize_(pixels, settings.solarize_threshold),
        ("solarize_threshold",),
    ),
    Operation(
        "quarter_turns",
        range(11, 13),
        lambda numbers, settings: np.where(
            numbers[0] < settings.quarter_turns, 1 + np.floor(3 * numbers[1]), 0.0
        ),
        lambda pixels, turns, settings: quarter_turns_(pixels, turns),
        moves_pixels=True,
    ),
    Operation(
        "degrees",  # counterclockwise, from 0 to 360
        range(13, 15),
        lambda numbers, settings: np.where(
            numbers[0] < settings.rotation,
            between(numbers[1], -settings.rotation_degrees, settings.rotation_degrees) % 360,
            0.0,
        ),
        lambda pixels, degrees, settings: rotate_(pixels, degrees),
        moves_pixels=True,
    ),
)
"""The operations after the color jitter, in the order in which `augment` applies them."""
