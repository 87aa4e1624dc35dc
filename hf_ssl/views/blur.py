# SPDX-License-Identifier: Apache-2.0
"""Gaussian blur with a sigma for each sample, as two banded matrix products.

Legend: N views, C channels, S side, R radius of the kernel (its size is 2 R + 1).
"""

from functools import lru_cache

import torch
from torch import Tensor

_TILE = 32  # rows of a band matrix taken at once: smaller tiles skip more zeros, larger ones multiply faster


def gaussian_shares(sigma: Tensor, radius: int) -> Tensor:
    """(N,) sigmas in pixels to (N, R + 1) shares of a pixel's neighbours at distance 0 to R.

    torchvision's kernel: the Gaussian at whole pixels, normalised to sum to 1 over 2 R + 1 pixels.
    """
    distance = torch.arange(radius + 1, dtype=torch.float32, device=sigma.device)
    shares = torch.exp(-0.5 * (distance / sigma[:, None]).square())
    # Shares below 1e-20 change no pixel, but as denormal numbers they make a processor many times slower.
    shares = torch.nn.functional.threshold(shares, 1e-20, 0.0)
    return shares / (2 * shares.sum(1, keepdim=True) - shares[:, :1])


def blur_(pixels: Tensor, sigma: Tensor, kernel_size: int) -> None:
    """Blurs (N, C, S, S) float32 in place, the border mirrored; torchvision's `gaussian_blur` to 1e-5.

    Args:
        sigma: (N,) float32 in pixels, on the device of `pixels`.
        kernel_size: odd, less than 2 S.
    """
    count, channels, side, _ = pixels.shape
    shares = gaussian_shares(sigma, kernel_size // 2)
    tiles = [
        (rows, seen, (shares @ band).view(count, rows.stop - rows.start, -1))
        for rows, seen, band in _tiles(side, kernel_size // 2, sigma.device)
    ]
    planes = pixels.view(count * channels, side, side)
    narrow = [torch.bmm(band.repeat_interleave(channels, dim=0), planes[:, seen]) for _, seen, band in tiles]
    lines = torch.cat(narrow, dim=1).view(count, channels * side, side)
    wide = [torch.bmm(lines[:, :, seen], band.transpose(1, 2)) for _, seen, band in tiles]
    torch.cat(wide, dim=2, out=pixels.view(lines.shape))


@lru_cache(maxsize=8)
def _tiles(side: int, radius: int, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """Bands of the (S, S) matrix that mirrors and sums a line, cut to where it is not zero.

    Each tile: its output pixels, the input pixels that they see, and (R + 1, outputs * inputs): how often an
    output meets an input at distance 0 to R. Their share is the sum over distances of that count times the
    distance's share.
    """
    counts = torch.zeros(radius + 1, side, side)
    output = torch.arange(side)
    for offset in range(-radius, radius + 1):
        mirrored = side - 1 - (side - 1 - (output + offset).abs()).abs()
        counts[abs(offset), output, mirrored] += 1
    starts = range(0, side, _TILE)
    rows = [slice(start, min(start + _TILE, side)) for start in starts]
    seen = [slice(max(0, row.start - radius), min(row.stop + radius, side)) for row in rows]
    return [(r, s, counts[:, r, s].flatten(1).to(device)) for r, s in zip(rows, seen, strict=True)]
