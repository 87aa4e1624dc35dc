# SPDX-License-Identifier: Apache-2.0
"""The draw: every random decision about a batch of images, made on the host from one seed an image.

Legend: B batch, V views of an image (global first, then local).
"""

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_ssl.views.hashing import Keys, uniforms
from hf_ssl.views.preset import ViewPreset, ViewSettings

COLUMNS = (
    "top",  # the crop box, pixels of the original image
    "left",
    "height",
    "width",
    "flip",  # 1.0 where chosen
    "jitter",  # 1.0 where chosen
    "order",  # number of the permutation in JITTER_ORDERS
    "brightness",  # factors as torchvision's functions take them, drawn whether jitter is chosen or not
    "contrast",
    "saturation",
    "hue",  # turns
    "gray",
    "sigma",  # pixels; 0.0 where the view is not blurred
    "solarize",
)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
"""(24, 4): the part that is done first, second, third and fourth."""

_NUMBERS_PER_VIEW = 64  # each view owns this many numbers of its image's stream, used or not
_CROP_TRIES = 10
_AFTER_TRIES = 2 * _CROP_TRIES


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for a batch, as one small table that stays on the host.

    `apply` needs it there: which samples an operation touches is known without asking the device, so nothing
    waits for it. It sends the few numbers that the device needs along with the work.
    """

    preset: ViewPreset
    table: torch.Tensor
    """(B, V, len(COLUMNS)) float32 on the CPU; whole numbers up to 2**24 are exact."""

    def __len__(self) -> int:
        return self.table.shape[0]

    def __getitem__(self, indices: slice | torch.Tensor | list[int]) -> "ViewParameters":
        """The parameters of some of the images."""
        if isinstance(indices, int):
            raise TypeError(f"expected a slice or a list of images, got {indices}")
        return ViewParameters(self.preset, self.table[indices])

    def column(self, name: str) -> torch.Tensor:
        """(B, V), a view of the table: see `COLUMNS`."""
        return self.table[:, :, COLUMNS.index(name)]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "ViewParameters":
        """Itself: the table belongs to the host, wherever the pixels are."""
        return self

    def pin_memory(self) -> "ViewParameters":
        return ViewParameters(self.preset, self.table.pin_memory())


def draw(seeds: Keys, preset: ViewPreset, sizes: NDArray[np.integer]) -> ViewParameters:
    """Draws the parameters of every view of every image.

    The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter (in
    RandomApply), RandomGrayscale, GaussianBlur (in RandomApply) and RandomSolarize. What is drawn for an
    image depends on its seed and size alone.

    Args:
        seeds: (B,) uint64, from `hf_ssl.views.seeds`.
        preset: how views are made.
        sizes: (B, 2) height and width of the images in pixels.
    """
    seeds, sizes = np.asarray(seeds, np.uint64), np.asarray(sizes)
    if sizes.shape != (len(seeds), 2):
        raise ValueError(f"expected sizes of shape ({len(seeds)}, 2), one for each seed, got {sizes.shape}")
    if sizes.size and sizes.min() < 1:
        raise ValueError("expected images of at least 1 x 1 pixel, got one without pixels")
    views = preset.expand()
    table = np.empty((len(seeds), len(views), len(COLUMNS)), np.float32)
    for number, settings in enumerate(views):
        first = number * _NUMBERS_PER_VIEW
        table[:, number, :4] = draw_boxes(seeds, first, settings, sizes)
        table[:, number, 4:] = _draw_rest(uniforms(seeds, first + _AFTER_TRIES + 2, 11), settings)
    return ViewParameters(preset, torch.from_numpy(table))


def draw_boxes(
    seeds: Keys, first: int, settings: ViewSettings, sizes: NDArray[np.integer]
) -> NDArray[np.float64]:
    """(B, 4) top, left, height, width, as torchvision's RandomResizedCrop.get_params draws them.

    Ten tries at an area (uniform) and an aspect ratio (log-uniform) whose rounded box fits into the image,
    then the largest centred box of an allowed ratio.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    box_height, box_width = _central_box(height, width, settings.ratio)
    top, left = np.floor((height - box_height) / 2), np.floor((width - box_width) / 2)
    log_low, log_high = np.log(settings.ratio[0]), np.log(settings.ratio[1])
    pending = np.arange(len(seeds))
    for attempt in range(_CROP_TRIES):
        number = uniforms(seeds[pending], first + 2 * attempt, 2)
        area = height[pending] * width[pending] * _between(number[:, 0], *settings.scale)
        ratio = np.exp(_between(number[:, 1], log_low, log_high))
        try_width, try_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (
            (try_width > 0)
            & (try_width <= width[pending])
            & (try_height > 0)
            & (try_height <= height[pending])
        )
        done = pending[fits]
        box_height[done], box_width[done] = try_height[fits], try_width[fits]
        place = uniforms(seeds[done], first + _AFTER_TRIES, 2)
        top[done] = np.floor(place[:, 0] * (height[done] - box_height[done] + 1))
        left[done] = np.floor(place[:, 1] * (width[done] - box_width[done] + 1))
        pending = pending[~fits]
        if not len(pending):
            break
    return np.stack((top, left, box_height, box_width), axis=1)


def _central_box(
    height: NDArray[np.float64], width: NDArray[np.float64], ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    box_height = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    box_width = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    return np.maximum(box_height, 1), np.maximum(box_width, 1)


def _draw_rest(numbers: NDArray[np.float64], settings: ViewSettings) -> NDArray[np.float64]:
    """(B, 11) uniform numbers to (B, 10) columns, `flip` to `solarize`."""
    flip, jitter, order, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = numbers.T
    columns = (
        flip < settings.flip,
        jitter < settings.jitter,
        np.floor(order * len(JITTER_ORDERS)),
        _between(brightness, max(0.0, 1 - settings.brightness), 1 + settings.brightness),
        _between(contrast, max(0.0, 1 - settings.contrast), 1 + settings.contrast),
        _between(saturation, max(0.0, 1 - settings.saturation), 1 + settings.saturation),
        _between(hue, -settings.hue, settings.hue),
        gray < settings.gray,
        np.where(blur < settings.blur, _between(sigma, *settings.blur_sigma), 0.0),
        solarize < settings.solarize,
    )
    return np.stack(columns, axis=1)


def _between(number: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * number


def send(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Host numbers to a device, without waiting for what the device is doing."""
    return torch.from_numpy(values).to(device, non_blocking=True)
