# SPDX-License-Identifier: Apache-2.0
"""Makes the model's input from uint8 pixels (stage two of the augmentation), in batches, on their device.

Legend: B images, V views of one kind, N rows (views of some images, flattened), C channels, S side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from hf_ssl.views.cropping import Crops, crop_batch
from hf_ssl.views.operations import OPERATIONS, Operation, jitter_, jitter_groups, to_device
from hf_ssl.views.parameters import COLUMNS, ViewParameters
from hf_ssl.views.preset import COLOR_STRENGTHS, FURTHER_MEAN, FURTHER_STD, ViewPreset, ViewSettings

Table = NDArray[np.float32]
Sampled = dict[str, NDArray[np.float32]]
_CPU_CHUNK_PIXELS = 128 * 32 * 32  # fits into a core's cache from one operation to the next
_DEVICE_CHUNK_PIXELS = 256 * 224 * 224  # limits the memory of intermediate results to about a gigabyte
# Views with equal values of these settings are made in one batch. The table contains everything else.
_batch_settings = attrgetter(
    "size", "interpolation", *(name for operation in OPERATIONS for name in operation.batch_settings)
)

_MOVING = [operation for operation in OPERATIONS if operation.moves_pixels]


@dataclass(frozen=True)
class Views:
    """The augmented images that a model receives: float32, normalized."""

    pixel_values: Tensor
    """(B, V, C, H, W), the global views."""
    local_pixel_values: Tensor | None = None
    """(B, L, C, h, w), the local views, if the preset has any."""


def augment(images: Tensor | Crops, parameters: ViewParameters, mirrored: Sequence[int] = ()) -> Views:
    """Return the augmented views of a batch (stage two). Equal input gives equal views.

    The steps are crop, flip, color jitter, the operations of `OPERATIONS`, enlargement and normalization.
    Every operation changes only the samples for which it was sampled. The table on the host contains this
    choice, so the host never waits for an accelerator. Crops and blur are matrix products. Where TF32 is
    allowed for float32 products, pixels are exact only to 1e-3.

    The preset has a mean for each channel of the image. Further channels, such as depth, follow them. They
    are cropped, flipped, rotated and enlarged like the image. Color jitter and those of `OPERATIONS` that
    move no pixels do not change them. Their normalization is `FURTHER_MEAN` and `FURTHER_STD`.

    Args:
        images: (B, C, H, W) uint8 images of one size, which are cropped here, or the `Crops` of stage one.
        parameters: sampled for these images.
        mirrored: further channels whose values a flip reverses (0 becomes 255), such as the horizontal part
            of surface normals.

    Raises:
        ValueError: the parameters were sampled for other images.
    """
    preset = parameters.preset
    parameters.check_count(len(images))
    if isinstance(images, Tensor):
        _check_boxes(images, parameters)
    global_input = images.global_crops if isinstance(images, Crops) else images
    pixel_values = _views(global_input, parameters, mirrored, 0, preset.count, preset.final_size)
    if not preset.local_count:
        return Views(pixel_values)
    local_input = images.local_crops if isinstance(images, Crops) else images
    if local_input is None:
        raise ValueError("images: expected crops for the preset's local views, got none")
    end = preset.count + preset.local_count
    side = preset.final_local_size
    local_pixel_values = _views(local_input, parameters, mirrored, preset.count, end, side)
    return Views(pixel_values, local_pixel_values)


def montage(
    views: Views, preset: ViewPreset, path: Path, max_images: int = 8, further: Sequence[int] = ()
) -> None:
    """Write a PNG of views, so that a user sees a wrong preset before the first epoch.

    Each row shows the views of one image, local views last. The colors are those before normalization. Of
    images with neither 1 nor 3 channels, the picture shows the first channel.

    Args:
        views: the views of some images.
        preset: their settings.
        path: the picture.
        max_images: number of rows.
        further: numbers of channels of further image columns, each 1 or 3. They are shown to the right of
            each view.
    """
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    extra = sum(further)
    mean = torch.tensor([*preset.mean, *[FURTHER_MEAN] * extra])[:, None, None]
    std = torch.tensor([*preset.std, *[FURTHER_STD] * extra])[:, None, None]
    kinds = [kind for kind in (views.pixel_values, views.local_pixel_values) if kind is not None]
    height, width = (max(kind.shape[axis] for kind in kinds) for axis in (-2, -1))
    tiles = []
    for kind in kinds:
        pixels = kind[:max_images].detach().float().cpu() * std + mean
        pixels = pixels.mul(255).round().clamp(0, 255).to(torch.uint8)
        if further:
            parts = [part.expand(-1, -1, 3, -1, -1) for part in pixels.split([len(preset.mean), *further], 2)]
            pixels = torch.stack(parts, dim=2).flatten(1, 2)
        pixels = pixels if pixels.shape[2] == 3 else pixels[:, :, :1]
        below, beside = height - pixels.shape[-2], width - pixels.shape[-1]
        tiles.append(pad(pixels, (0, beside, 0, below), value=255))
    rows = torch.cat(tiles, dim=1)
    to_pil_image(make_grid(rows.flatten(0, 1), nrow=rows.shape[1], pad_value=255)).save(path)


def _check_boxes(images: Tensor, parameters: ViewParameters) -> None:
    top, left, box_height, box_width = parameters.table.numpy()[..., :4].reshape(-1, 4).T
    height, width = images.shape[-2:]
    if len(top) and ((top + box_height).max() > height or (left + box_width).max() > width):
        raise ValueError(
            "images: expected those for which the parameters were sampled, got images of "
            f"{height} x {width} pixels"
        )


def _views(
    images: Tensor,
    parameters: ViewParameters,
    mirrored: Sequence[int],
    start: int,
    end: int,
    final_size: int,
) -> Tensor:
    """Return views `start` to `end - 1` of the preset: (B, end - start, C, final_size, final_size)."""
    preset, table = parameters.preset, parameters.table.numpy()[:, start:end]
    out = torch.empty(*table.shape[:2], images.shape[-3], final_size, final_size, device=images.device)
    budget = _CPU_CHUNK_PIXELS if images.device.type == "cpu" else _DEVICE_CHUNK_PIXELS
    settings = preset.expand()[start:end]
    for _, group in groupby(range(end - start), lambda number: _batch_settings(settings[number])):
        numbers = list(group)
        first_settings = settings[numbers[0]]
        views = slice(numbers[0], numbers[-1] + 1)
        step = max(1, budget // (first_settings.size**2 * len(numbers)))
        for first in range(0, len(table), step):
            chunk = slice(first, first + step)
            rows = table[chunk, views].reshape(-1, len(COLUMNS))
            source = images[chunk] if images.dim() == 4 else images[chunk, views].flatten(0, 1)
            colors = len(preset.mean)
            pixels = _augment_chunk(source, images.dim() == 4, rows, first_settings, colors, mirrored)
            if preset.enlarge is not None:
                pixels = interpolate(pixels, (final_size, final_size), mode="bilinear", align_corners=False)
            _normalize_into(out[chunk, views], pixels, preset)
    return out


def _augment_chunk(
    source: Tensor,
    crop_here: bool,
    table: Table,
    settings: ViewSettings,
    colors: int,
    mirrored: Sequence[int],
) -> Tensor:
    """Return one chunk of views in [0, 1], (N, C, S, S) float32.

    The rows are sorted twice, so that the samples of every operation are contiguous and change in place.
    Gathering them and writing them back would cost as much as the operations.

    Args:
        source: (N / V, C, H, W) images, each for V rows of the table, or (N, C, S, S) crops.
        crop_here: whether `source` contains images.
        table: the augmentation parameters (N, columns).
        settings: the settings of one of the views. `_batch_settings` is equal for all of them.
        colors: number of channels of the image, which come before the further channels.
        mirrored: further channels whose values a flip reverses.
    """
    sampled = dict(zip(COLUMNS, table.T, strict=True))
    rows = sort_for_jitter(sampled)
    if crop_here:
        images = source.index_select(0, to_device(rows // (len(table) // len(source)), source.device))
        flip = sampled["flip"][rows]
        pixels = crop_batch(images, table[rows, :4], flip, settings.size, settings.interpolation)
    else:
        pixels = _planes(source, sampled["flip"], rows)
    if pixels.shape[1] == colors:
        return change_pixels(pixels, sampled, rows, settings)
    flipped = to_device(sampled["flip"][rows] > 0, pixels.device)[:, None, None]
    for channel in mirrored:
        pixels[:, channel] = torch.where(flipped, 1 - pixels[:, channel], pixels[:, channel])
    changed = change_pixels(pixels[:, :colors].contiguous(), sampled, rows, settings)
    further = _operate(pixels[:, colors:], sampled, rows, settings, _MOVING)
    return torch.cat((changed, further), dim=1)


def sort_for_jitter(sampled: Sampled) -> NDArray[np.int64]:
    """Return row numbers (N,) in the order in which `change_pixels` takes the samples."""
    return np.argsort(_jitter_groups(sampled), kind="stable")


def change_pixels(
    pixels: Tensor, sampled: Sampled, rows: NDArray[np.int64], settings: ViewSettings
) -> Tensor:
    """Apply color jitter and `OPERATIONS` to samples in the order `rows`. Return them in ascending order.

    Args:
        pixels: (N, C, S, S) float32 in [0, 1]. They may change in place.
        sampled: the parameters (N,) by their names in `COLUMNS`, in ascending order of the samples.
        rows: row numbers of the samples, from `sort_for_jitter`.
        settings: the settings of the samples.
    """
    order = sampled["order"].astype(np.int64)
    factors = np.stack([sampled[name] for name in COLOR_STRENGTHS], axis=1)
    jitter_(pixels, _jitter_groups(sampled)[rows], order[rows], factors[rows])
    return _operate(pixels, sampled, rows, settings, OPERATIONS)


def _operate(
    pixels: Tensor,
    sampled: Sampled,
    rows: NDArray[np.int64],
    settings: ViewSettings,
    operations: Sequence[Operation],
) -> Tensor:
    """Apply operations to samples in the order `rows`. Return them in ascending order."""
    sorting = _sort_for_operations(sampled)
    pixels = _arrange(pixels, rows, sorting)
    for operation in operations:
        values = sampled[operation.parameter][sorting]
        for run in _runs(values > 0):
            operation.apply(pixels[run], values[run], settings)
    return _arrange(pixels, sorting, np.arange(len(rows)))


def _jitter_groups(sampled: Sampled) -> NDArray[np.int64]:
    return jitter_groups(sampled["jitter"] > 0, sampled["order"].astype(np.int64), sampled["hue"])


def _sort_for_operations(sampled: Sampled) -> NDArray[np.int64]:
    """Return row numbers in an order in which the samples of each operation form few contiguous runs.

    There are four groups, in this order: samples of the second operation only, of both operations, of the
    first operation only, and of neither. Within a group, the parameters of the other operations determine the
    order.
    """
    first, second, *others = (sampled[operation.parameter] > 0 for operation in OPERATIONS)
    return np.lexsort((*reversed(others), np.where(second, first, 3 - first)))


def _planes(crops: Tensor, flip: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
    """Return crops as float32 planes in [0, 1] (N, C, S, S), in the order `rows`, flipped where `flip` is 1.

    The crops are uint8 (N, C, S, S), channels last in memory.
    """
    flipped_first = np.argsort(flip == 0, kind="stable")
    interleaved = crops.permute(0, 2, 3, 1).index_select(0, to_device(flipped_first, crops.device))
    for run in _runs(flip[flipped_first] > 0):
        interleaved[run] = interleaved[run].flip(2)
    interleaved = _arrange(interleaved, flipped_first, rows)
    return torch.empty(crops.shape, device=crops.device).copy_(interleaved.permute(0, 3, 1, 2)).mul_(1 / 255)


def _arrange(pixels: Tensor, now: NDArray[np.int64], wanted: NDArray[np.int64]) -> Tensor:
    """Return the samples in the order `wanted` (row numbers). Their current order is `now`."""
    if np.array_equal(now, wanted):
        return pixels
    position = np.empty_like(now)
    position[now] = np.arange(len(now))
    return pixels.index_select(0, to_device(position[wanted], pixels.device))


def _runs(chosen: NDArray[np.bool_]) -> list[slice]:
    """Return the contiguous runs of True."""
    padded = np.zeros(len(chosen) + 2, np.bool_)
    padded[1:-1] = chosen
    edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return [slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _normalize_into(out: Tensor, pixels: Tensor, preset: ViewPreset) -> None:
    """Write pixels (N, C, H, W), minus the mean and divided by the deviation, to `out` (B, V, C, H, W)."""
    pixels = pixels.view(out.shape)
    further = [(FURTHER_MEAN, FURTHER_STD)] * (out.shape[2] - len(preset.mean))
    for channel, (mean, std) in enumerate([*zip(preset.mean, preset.std, strict=True), *further]):
        offset = pixels.new_full((), -mean / std)
        torch.add(offset, pixels[:, :, channel], alpha=1 / std, out=out[:, :, channel])
