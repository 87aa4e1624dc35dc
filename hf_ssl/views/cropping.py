# SPDX-License-Identifier: Apache-2.0
"""Crop and resize: image by image on uint8 (stage one, in loader workers), or a whole batch on its device.

Legend: B images, V views, N rows (views of some images, flattened), C channels, H, W sides of the images,
S side of a view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hf_ssl.views.operations import to_device
from hf_ssl.views.parameters import ViewParameters

_TABLE_BYTES = 2**25
_FAST_CHANNELS = 4  # torch 2.14 takes ten times as long for an image with more channels


@dataclass(frozen=True)
class Crops:
    """The result of stage one: crops of the views' size in pixels, without flip and color changes."""

    global_crops: Tensor
    """(B, V, C, S, S) uint8, channels last in memory."""
    local_crops: Tensor | None = None

    def __len__(self) -> int:
        return self.global_crops.shape[0]

    def __getitem__(self, samples: slice) -> "Crops":
        return self._map(lambda crops: crops[samples])

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Crops":
        return self._map(lambda crops: crops.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Crops":
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Crops":
        local_crops = None if self.local_crops is None else function(self.local_crops)
        return Crops(function(self.global_crops), local_crops)


def crop(images: Sequence[Tensor], parameters: ViewParameters) -> Crops:
    """Crop every view of every image and resize it, on uint8 (stage one).

    The result equals torch's `interpolate(..., antialias=True)` of the uint8 crop, bit for bit. torchvision's
    `resized_crop` calls that function for bicubic crops, so it gives the same result. For bilinear crops,
    torchvision computes in float32 on some processors, depending on its version. It then differs by at most
    one level of 255. Images with channels last in memory (`decoded.permute(2, 0, 1)`, the output of decoders)
    are cropped fastest.

    Args:
        images: B tensors (C, H, W) uint8 on the CPU, each of its own size.
        parameters: sampled for these images.

    Raises:
        ValueError: the parameters were sampled for other images.
    """
    parameters.check_count(len(images))
    preset, views = parameters.preset, parameters.preset.expand()
    channels = images[0].shape[0] if images else len(preset.mean)
    shapes = ((preset.count, preset.size), (preset.local_count, preset.local_size))
    buffers = [
        torch.empty(len(images), count, size, size, channels, dtype=torch.uint8) for count, size in shapes
    ]
    boxes = parameters.table[:, :, :4].to(torch.int64).tolist()
    for image, rows, global_out, local_out in zip(images, boxes, *buffers, strict=True):
        for box, settings, out in zip(rows, views, [*global_out, *local_out], strict=True):
            for first in range(0, channels, _FAST_CHANNELS):
                some = slice(first, first + _FAST_CHANNELS)
                out[..., some] = _crop_one(image[some], box, settings.size, settings.interpolation)
    global_crops, local_crops = (buffer.permute(0, 1, 4, 2, 3) for buffer in buffers)
    return Crops(global_crops, local_crops if preset.local_count else None)


def _crop_one(image: Tensor, box: list[int], size: int, interpolation: str) -> Tensor:
    """Return the resized crop (size, size, C) of an image (C, H, W)."""
    top, left, height, width = box
    patch = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    channels = patch.shape[2]
    if patch.shape != (height, width, channels):
        got = f"{image.shape[1]} x {image.shape[2]}"
        raise ValueError(
            f"images: expected those for which the parameters were sampled, got an image of {got} pixels"
        )
    # torch uses its fast path for a batch of one only with these strides.
    strides = (height * width * channels, 1, width * channels, channels)
    patch = patch.as_strided((1, channels, height, width), strides)
    return interpolate(patch, (size, size), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def crop_batch(
    images: Tensor, boxes: NDArray[np.float32], flip: NDArray[np.float32], size: int, interpolation: str
) -> Tensor:
    """Crop, resize and flip a batch by two small matrix products per sample, with antialiasing.

    It works on any device.

    Args:
        images: (N, C, H, W) uint8.
        boxes: (N, 4) top, left, height, width.
        flip: (N,) 1.0 for samples that are flipped.
        size: side of the result.
        interpolation: "bilinear" or "bicubic".

    Returns:
        (N, C, size, size) float32 in [0, 1]. Bicubic values outside this range are clamped, as torchvision
        does for uint8.
    """
    count, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.T
    columns = _weights(left, box_width, flip, width, size, interpolation, images.device)
    rows = _weights(top, box_height, np.zeros_like(flip), height, size, interpolation, images.device)
    narrow = images.to(torch.float32).reshape(count, channels * height, width) @ columns.transpose(1, 2)
    rows = rows.mul_(1 / 255).repeat_interleave(channels, dim=0)
    views = (rows @ narrow.view(count * channels, height, size)).view(count, channels, size, size)
    return views.clamp_(0, 1) if interpolation == "bicubic" else views


def resampling_weights(
    start: Tensor, length: Tensor, flip: Tensor, side: int, size: int, interpolation: str
) -> Tensor:
    """Return the weights of the input pixels in each output pixel along one axis: (N, size, side).

    The antialiasing is that of Pillow and torch: the filter is stretched by the factor by which the box
    shrinks. Pixels outside the box have weight 0, and the weights of an output pixel sum to 1. Where `flip`
    is 1, the output pixels are in reverse order.

    Args:
        start, length: (N,) the box along this axis, in pixels.
        flip: (N,) 0 or 1.
        side: side of the input in pixels.
        size: side of the output in pixels.
        interpolation: "bilinear" or "bicubic".
    """
    scale = (length / size)[:, None, None]
    output = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    output = output + flip[:, None, None] * (size - 1 - 2 * output)
    pixel = torch.arange(side, device=start.device, dtype=torch.float32) - start[:, None, None]
    distance = ((pixel + 0.5 - (output + 0.5) * scale) / scale.clamp(min=1)).abs_()
    weights = _FILTERS[interpolation](distance)
    weights *= (pixel >= 0) & (pixel < length[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def _weights(
    start: NDArray[np.float32],
    length: NDArray[np.float32],
    flip: NDArray[np.float32],
    side: int,
    size: int,
    interpolation: str,
    device: torch.device,
) -> Tensor:
    """Return `resampling_weights`, from a table of all boxes if such a table is small."""
    if 4 * size * side * side * (side + 1) > _TABLE_BYTES:
        start_, length_, flip_ = (
            to_device(np.ascontiguousarray(values), device) for values in (start, length, flip)
        )
        return resampling_weights(start_, length_, flip_, side, size, interpolation)
    shorter = (length - 1) * (side + 1 - length / 2)
    index = (2 * (shorter + start) + flip).astype(np.int64)
    return _table(side, size, interpolation, device).index_select(0, to_device(index, device))


@lru_cache(maxsize=8)
def _table(side: int, size: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the weights of all boxes, sorted by length, start and flip: (side * (side + 1), size, side)."""
    lengths = range(1, side + 1)
    boxes = [
        (start, length, flip) for length in lengths for start in range(side - length + 1) for flip in (0, 1)
    ]
    start, length, flip = to_device(np.array(boxes, np.float32), device).unbind(1)
    return resampling_weights(start, length, flip, side, size, interpolation)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    """Return the cubic kernel of Keys (1981) with a = -0.5.

    Pillow and torch use this kernel for bicubic resizing with antialiasing.
    """
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far * (distance < 2))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
