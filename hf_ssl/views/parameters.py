# SPDX-License-Identifier: Apache-2.0
"""Samples the augmentation parameters of a batch on the host: every random decision, from one seed per image.

Legend: B batch, V views of an image (global first, then local).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hf_ssl.random import UInt64Array, uniforms
from hf_ssl.views.operations import JITTER_ORDERS, OPERATIONS, between
from hf_ssl.views.preset import ViewPreset, ViewSettings

COLUMNS = (
    "top",  # the crop's box, in pixels of the original image
    "left",
    "height",
    "width",
    "flip",  # 1.0 for views that are flipped
    "jitter",  # 1.0 for views with color jitter
    "order",  # row number of the order in JITTER_ORDERS
    "brightness",  # factors of torchvision's functions, also for views without color jitter
    "contrast",
    "saturation",
    "hue",  # turns
    *(operation.parameter for operation in OPERATIONS),
)

_NUMBERS_PER_VIEW = 64  # random numbers reserved for each view in its image's stream
_CROP_TRIES = 10
_CROP_NUMBERS = 2 * _CROP_TRIES + 2  # area and ratio of each try, then the position
CHANGE_NUMBERS = max(operation.numbers.stop for operation in OPERATIONS)
"""The number of random numbers that `sample_changes` needs for each view."""


@dataclass(frozen=True)
class ViewParameters:
    """The augmentation parameters of a batch: one small table, which stays on the host.

    `augment` reads on the host which samples an operation changes. The host does not wait for the device. The
    few numbers that the device needs are copied with `non_blocking=True`.
    """

    preset: ViewPreset
    table: torch.Tensor
    """(B, V, len(COLUMNS)) float32 on the CPU; whole numbers up to 2**24 are exact."""

    def __len__(self) -> int:
        return self.table.shape[0]

    def __getitem__(self, indices: slice | torch.Tensor | list[int]) -> "ViewParameters":
        """Return the parameters of some of the images."""
        if isinstance(indices, int):
            raise TypeError(f"indices: expected a slice or a list of images, got {indices}")
        return ViewParameters(self.preset, self.table[indices])

    def check_count(self, images: int) -> None:
        """Raise `ValueError` unless the parameters were sampled for this number of images."""
        if images != len(self):
            raise ValueError(f"images: expected {len(self)}, one for each parameter row, got {images}")

    def column(self, name: str) -> torch.Tensor:
        """Return one parameter (B, V) of `COLUMNS`, as a view of the table."""
        return self.table[:, :, COLUMNS.index(name)]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "ViewParameters":
        """Return itself: the table stays on the host, also where the pixels are on a device."""
        return self

    def pin_memory(self) -> "ViewParameters":
        return ViewParameters(self.preset, self.table.pin_memory())


def sample_parameters(seeds: UInt64Array, preset: ViewPreset, sizes: NDArray[np.integer]) -> ViewParameters:
    """Sample the augmentation parameters of every view of every image.

    The distributions are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter (in
    RandomApply), RandomGrayscale, GaussianBlur (in RandomApply) and RandomSolarize. The parameters of an
    image depend only on its seed and its size.

    Args:
        seeds: (B,) uint64, from `hf_ssl.random.image_seeds`.
        preset: the settings of the views.
        sizes: (B, 2) height and width of the images in pixels.

    Raises:
        ValueError: `sizes` does not belong to `seeds`, or an image has no pixels.
    """
    seeds, sizes = np.asarray(seeds, np.uint64), np.asarray(sizes)
    if sizes.shape != (len(seeds), 2):
        raise ValueError(f"sizes: expected shape ({len(seeds)}, 2), one row for each seed, got {sizes.shape}")
    if sizes.size and sizes.min() < 1:
        raise ValueError("sizes: expected images of at least 1 x 1 pixel, got an image without pixels")
    views = preset.expand()
    table = np.empty((len(seeds), len(views), len(COLUMNS)), np.float32)
    for number, settings in enumerate(views):
        first = number * _NUMBERS_PER_VIEW
        table[:, number, :4] = sample_boxes(seeds, first, settings, sizes)
        numbers = uniforms(seeds, first + _CROP_NUMBERS, CHANGE_NUMBERS)
        table[:, number, 4:] = sample_changes(numbers, settings)
    return ViewParameters(preset, torch.from_numpy(table))


def sample_boxes(
    seeds: UInt64Array, first: int, settings: ViewSettings, sizes: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Sample boxes (B, 4) top, left, height, width, as torchvision's RandomResizedCrop.get_params does.

    Up to ten times, this function samples an area (uniform) and an aspect ratio (log-uniform). It takes the
    first rounded box that fits into the image. If none fits, it takes the largest centered box with an
    allowed ratio.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    box_height, box_width = _central_box(height, width, settings.ratio)
    top, left = np.floor((height - box_height) / 2), np.floor((width - box_width) / 2)
    log_low, log_high = np.log(settings.ratio[0]), np.log(settings.ratio[1])
    pending = np.arange(len(seeds))
    for attempt in range(_CROP_TRIES):
        number = uniforms(seeds[pending], first + 2 * attempt, 2)
        area = height[pending] * width[pending] * between(number[:, 0], *settings.scale)
        ratio = np.exp(between(number[:, 1], log_low, log_high))
        try_width, try_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (try_width > 0) & (try_width <= width[pending])
        fits &= (try_height > 0) & (try_height <= height[pending])
        done = pending[fits]
        box_height[done], box_width[done] = try_height[fits], try_width[fits]
        position = uniforms(seeds[done], first + 2 * _CROP_TRIES, 2)
        top[done] = np.floor(position[:, 0] * (height[done] - box_height[done] + 1))
        left[done] = np.floor(position[:, 1] * (width[done] - box_width[done] + 1))
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


def sample_changes(numbers: NDArray[np.float64], settings: ViewSettings) -> NDArray[np.float64]:
    """Return the columns after the box, from numbers in [0, 1).

    Args:
        numbers: (N, CHANGE_NUMBERS) for N views.
        settings: the settings of these views.

    Returns:
        (N, len(COLUMNS) - 4) the parameters of flip, color jitter and `OPERATIONS`.
    """
    numbers = numbers.T
    flip, jitter, order, brightness, contrast, saturation, hue = numbers[:7]
    columns = (
        flip < settings.flip,
        jitter < settings.jitter,
        np.floor(order * len(JITTER_ORDERS)),
        between(brightness, max(0.0, 1 - settings.brightness), 1 + settings.brightness),
        between(contrast, max(0.0, 1 - settings.contrast), 1 + settings.contrast),
        between(saturation, max(0.0, 1 - settings.saturation), 1 + settings.saturation),
        between(hue, -settings.hue, settings.hue),
        *(operation.sample(numbers[list(operation.numbers)], settings) for operation in OPERATIONS),
    )
    return np.stack(columns, axis=1)
