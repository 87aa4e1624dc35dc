# SPDX-License-Identifier: Apache-2.0
"""Colour: jitter in a random order for each sample, greyscale, solarise. Pixels are float32 in [0, 1].

Legend: N views, C channels, H, W sides, P = H * W pixels. Each operation equals torchvision's of the same
name to 1e-5, its clamping included, and works in place.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ssl.views.drawing import CONTRAST, HUE, JITTER_ORDERS, SATURATION, send

LUMA = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in grey: torchvision's (they sum to 0.9999)."""
_NO_HUE, _NO_JITTER = 4, 5


def jitter_groups(
    jitter: NDArray[np.bool_], order: NDArray[np.int64], hue: NDArray[np.float32]
) -> NDArray[np.int64]:
    """(N,) for each sample: the place (0 to 3) of the hue in its order, 4 without hue, 5 without any jitter.

    Samples sorted by this number need no gathering for the hue: those of each place lie side by side.
    """
    place = np.argmax(JITTER_ORDERS[order] == HUE, axis=1)
    return np.where(jitter, np.where(hue != 0, place, _NO_HUE), _NO_JITTER)


def jitter_(
    pixels: Tensor, groups: NDArray[np.int64], order: NDArray[np.int64], factors: NDArray[np.float32]
) -> None:
    """Brightness, contrast, saturation and hue, in each sample's own order.

    Args:
        pixels: (N, C, H, W), sorted by `groups`; C is 1 or 3 where anything but brightness is jittered.
        groups: (N,) from `jitter_groups`, ascending.
        order: (N,) numbers of permutations in JITTER_ORDERS.
        factors: (N, 4) brightness, contrast, saturation, hue.
    """
    starts = np.searchsorted(groups, np.arange(_NO_JITTER + 1)).tolist()
    jittered = starts[_NO_JITTER]
    if not jittered:
        return
    # Each part but the hue mixes a pixel with black, the image's mean grey or its own grey. (4, N).
    parts = JITTER_ORDERS[order[:jittered]].T
    factor = factors[np.arange(jittered), parts]
    of_pixel = np.where(parts == HUE, np.float32(1), factor)
    of_mean = np.where(parts == CONTRAST, 1 - factor, np.float32(0))
    of_gray = np.where(parts == SATURATION, 1 - factor, np.float32(0))
    shares = send(np.stack((of_pixel, of_mean, of_gray)), pixels.device)
    turns = send(factors[:jittered, HUE], pixels.device)
    for place in range(4):
        first, last = starts[place], starts[place + 1]
        for run in (slice(0, first), slice(last, jittered)):
            if run.start < run.stop:
                pixel, mean, gray = shares[:, place, run, None].unbind()
                uses_mean, uses_gray = of_mean[place, run].any(), of_gray[place, run].any()
                mix_(pixels[run], pixel, mean if uses_mean else None, gray if uses_gray else None)
        if first < last:
            hue_(pixels[first:last], turns[first:last])


def mix_(pixels: Tensor, of_pixel: Tensor, of_mean: Tensor | None, of_gray: Tensor | None) -> None:
    """Brightness, contrast or saturation: shares of each pixel, of its image's mean grey and of its own grey.

    Args:
        pixels: (N, C, H, W).
        of_pixel, of_mean, of_gray: (N, 1); None stands for zeros and saves work.
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
    """Rotates the hue of (N, 3, H, W) by (N,) turns of -0.5 to 0.5.

    HSV without a branch, a gather or a comparison (each costs as much as four additions). On the side of the
    colour circle where green >= blue, the hue in sixths of a turn is 1 - r + g + b of the channels stretched
    to [0, 1]; on the other side it is minus that. On the way back each channel is low + chroma * a trapezoid
    of the hue's distance from the channel's opposite (red) or from its own hue (green, blue).
    """
    red, green, blue = pixels.unbind(1)
    high = torch.maximum(red, green)
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)
    torch.minimum(low, blue, out=low)
    chroma = (high - low).clamp_(min=1e-12)
    hue = torch.add(green, blue).sub_(red).add_(chroma).sub_(low).copysign_(green.sub_(blue))
    torch.addcdiv(1 + turns[:, None, None], hue, chroma, value=1 / 6, out=hue).frac_()
    # From here on the old channels are room for the new ones: what stays in the cache is short.
    low.sub_(chroma)
    high.add_(chroma)
    for channel, base, center, sign in (
        (red, low, 1 / 2, 6),
        (green, high, 1 / 3, -6),
        (blue, high, 2 / 3, -6),
    ):
        torch.sub(hue, center, out=channel).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, channel, chroma, value=sign, out=channel)


def gray_(pixels: Tensor) -> None:
    """Makes the channels of (N, 3, H, W) equal."""
    planes = pixels.flatten(2)
    planes.copy_(_luma(planes)[:, None])


def solarize_(pixels: Tensor, threshold: float) -> None:
    """Inverts the values at or above the threshold."""
    pixels.copy_(torch.where(pixels >= threshold, 1 - pixels, pixels))


def _luma(planes: Tensor) -> Tensor:
    """(N, C, P) to the grey (N, P) of its pixels, in new memory; one channel is its own grey."""
    if planes.shape[1] == 1:
        return planes[:, 0].clone()
    luma = send(np.array(LUMA, np.float32), planes.device).expand(len(planes), 1, 3)
    return torch.bmm(luma, planes)[:, 0]
