# SPDX-License-Identifier: Apache-2.0
"""Stage two: from uint8 pixels and the draw to what the model sees, in batches, on the pixels' device.

Legend: B images, V views of one kind, N rows (views of some images, flattened), C channels, S side.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hf_ssl.views.blur import blur_
from hf_ssl.views.color import gray_, jitter_, jitter_groups, solarize_
from hf_ssl.views.cropping import Crops, crop_batch
from hf_ssl.views.drawing import COLUMNS, ViewParameters, send
from hf_ssl.views.preset import ViewPreset, ViewSettings

Table = NDArray[np.float32]
_CPU_CHUNK_PIXELS = 128 * 32 * 32  # what stays in a core's cache from one operation to the next
_DEVICE_CHUNK_PIXELS = 256 * 224 * 224  # bounds the memory of intermediate results to about a gigabyte


@dataclass(frozen=True)
class Views:
    """What a model is fed: float32, normalised."""

    pixel_values: Tensor
    """(B, V, C, H, W), the global views."""
    local_pixel_values: Tensor | None = None
    """(B, L, C, h, w), the local views, where the preset has any."""


def apply(images: Tensor | Crops, parameters: ViewParameters) -> Views:
    """Stage two: crop, flip, jitter, grey, blur, solarise, enlarge, normalise. Pure: same input, same views.

    Every operation touches the samples for which it was chosen and no others. Which ones is read from the
    table on the host, so an accelerator is never waited for. Crops and blur are matrix products: where those
    of float32 are allowed to be TF32, pixels are exact to 1e-3 only.

    Args:
        images: (B, C, H, W) uint8 images of one size, which are cropped here, or the `Crops` of stage one.
        parameters: drawn for these images.

    Raises:
        ValueError: the parameters were not drawn for these images.
    """
    preset = parameters.preset
    if len(images) != len(parameters):
        raise ValueError(f"expected one image for each of {len(parameters)} draws, got {len(images)} images")
    if isinstance(images, Tensor):
        _check_boxes(images, parameters)
    global_input = images.global_crops if isinstance(images, Crops) else images
    pixel_values = _views(global_input, parameters, 0, preset.global_count, preset.final_size)
    if not preset.local_count:
        return Views(pixel_values)
    local_input = images.local_crops if isinstance(images, Crops) else images
    if local_input is None:
        raise ValueError("expected crops for the local views of the preset, got none")
    end = preset.global_count + preset.local_count
    local_pixel_values = _views(local_input, parameters, preset.global_count, end, preset.final_local_size)
    return Views(pixel_values, local_pixel_values)


def _check_boxes(images: Tensor, parameters: ViewParameters) -> None:
    top, left, box_height, box_width = parameters.table.numpy()[..., :4].reshape(-1, 4).T
    height, width = images.shape[-2:]
    if len(top) and ((top + box_height).max() > height or (left + box_width).max() > width):
        raise ValueError(f"expected the images that were drawn for, got images of {height} x {width} pixels")


@dataclass(frozen=True)
class _Shared:
    """What views must have in common to be made in one batch; all else is in the table."""

    size: int
    interpolation: str
    blur_kernel: int
    solarize_threshold: float


def _shared(settings: ViewSettings) -> _Shared:
    return _Shared(settings.size, settings.interpolation, settings.blur_kernel, settings.solarize_threshold)


def _views(images: Tensor, parameters: ViewParameters, start: int, end: int, final_size: int) -> Tensor:
    """Views `start` to `end` of the preset: (B, end - start, C, final_size, final_size)."""
    preset, table = parameters.preset, parameters.table.numpy()[:, start:end]
    out = torch.empty(*table.shape[:2], images.shape[-3], final_size, final_size, device=images.device)
    budget = _CPU_CHUNK_PIXELS if images.device.type == "cpu" else _DEVICE_CHUNK_PIXELS
    settings = preset.expand()[start:end]
    for shared, run in groupby(range(end - start), lambda number: _shared(settings[number])):
        numbers = list(run)
        views = slice(numbers[0], numbers[-1] + 1)
        step = max(1, budget // (shared.size**2 * len(numbers)))
        for first in range(0, len(table), step):
            chunk = slice(first, first + step)
            rows = table[chunk, views].reshape(-1, len(COLUMNS))
            source = images[chunk] if images.dim() == 4 else images[chunk, views].flatten(0, 1)
            pixels = _make(source, images.dim() == 4, rows, shared)
            if preset.enlarge is not None:
                pixels = interpolate(pixels, (final_size, final_size), mode="bilinear", align_corners=False)
            _normalize_into(out[chunk, views], pixels, preset)
    return out


def _make(source: Tensor, crop_here: bool, table: Table, shared: _Shared) -> Tensor:
    """One chunk of views in [0, 1], (N, C, S, S) float32, from what was drawn, (N, columns), and pixels.

    Rows are sorted, twice, so that every operation finds its samples side by side and changes them in place:
    gathering them and putting them back would cost as much as the operations.

    Args:
        source: (N / V, C, H, W) images to be cropped, each for V rows of the table, or (N, C, S, S) crops.
    """
    drawn = dict(zip(COLUMNS, table.T, strict=True))
    order = drawn["order"].astype(np.int64)
    groups = jitter_groups(drawn["jitter"] > 0, order, drawn["hue"])
    rows = np.argsort(groups, kind="stable")
    if crop_here:
        images = source.index_select(0, send(rows // (len(table) // len(source)), source.device))
        pixels = crop_batch(images, table[rows, :4], drawn["flip"][rows], shared.size, shared.interpolation)
    else:
        pixels = _planes(source, drawn["flip"], rows)
    factors = np.stack([drawn[name] for name in ("brightness", "contrast", "saturation", "hue")], axis=1)
    jitter_(pixels, groups[rows], order[rows], factors[rows])

    # Grey and blurred samples overlap, so the blurred go first, with those that are both between the others.
    is_gray, sigma, is_solarized = drawn["gray"] > 0, drawn["sigma"], drawn["solarize"] > 0
    sorting = np.lexsort((is_solarized, np.where(sigma > 0, is_gray, 3 - is_gray)))
    pixels = _arrange(pixels, rows, sorting)
    for run in _runs(is_gray[sorting]):
        gray_(pixels[run])
    for run in _runs(sigma[sorting] > 0):
        blur_(pixels[run], send(sigma[sorting][run], pixels.device), shared.blur_kernel)
    for run in _runs(is_solarized[sorting]):
        solarize_(pixels[run], shared.solarize_threshold)
    return _arrange(pixels, sorting, np.arange(len(table)))


def _planes(crops: Tensor, flip: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
    """uint8 (N, C, S, S), channels interleaved, to float32 planes in [0, 1], sorted, flipped where chosen."""
    flipped_first = np.argsort(flip == 0, kind="stable")
    interleaved = crops.permute(0, 2, 3, 1).index_select(0, send(flipped_first, crops.device))
    for run in _runs(flip[flipped_first] > 0):
        interleaved[run] = interleaved[run].flip(2)
    interleaved = _arrange(interleaved, flipped_first, rows)
    return torch.empty(crops.shape, device=crops.device).copy_(interleaved.permute(0, 3, 1, 2)).mul_(1 / 255)


def _arrange(pixels: Tensor, now: NDArray[np.int64], wanted: NDArray[np.int64]) -> Tensor:
    """Samples that stand in the order `now` (row numbers) to the order `wanted`."""
    if np.array_equal(now, wanted):
        return pixels
    place = np.empty_like(now)
    place[now] = np.arange(len(now))
    return pixels.index_select(0, send(place[wanted], pixels.device))


def _runs(chosen: NDArray[np.bool_]) -> list[slice]:
    """Where True stands side by side."""
    padded = np.zeros(len(chosen) + 2, np.bool_)
    padded[1:-1] = chosen
    edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return [slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _normalize_into(out: Tensor, pixels: Tensor, preset: ViewPreset) -> None:
    """Writes (N, C, H, W) pixels less the mean, over the standard deviation, to `out` (B, V, C, H, W)."""
    pixels = pixels.view(out.shape)
    for channel, (mean, std) in enumerate(zip(preset.mean, preset.std, strict=True)):
        offset = pixels.new_full((), -mean / std)
        torch.add(offset, pixels[:, :, channel], alpha=1 / std, out=out[:, :, channel])
