# SPDX-License-Identifier: Apache-2.0
"""A picture of what the network sees, for people: it catches a wrong preset before the first epoch does."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_ssl.views.pipeline import Views
from hf_ssl.views.preset import ViewPreset

_GAP = 2


def montage(views: Views, preset: ViewPreset, path: Path, max_images: int = 8) -> None:
    """Writes a PNG with a row for each image and its views side by side, local views last, colours as before
    normalisation. Images of neither 1 nor 3 channels show their first channel."""
    from PIL import Image

    rows = [views.pixel_values[:max_images]]
    if views.local_pixel_values is not None:
        rows.append(views.local_pixel_values[:max_images])
    blocks = [_tiles(block, preset) for block in rows]
    height = max(block.shape[1] for block in blocks)
    blocks = [
        np.pad(block, ((0, 0), (0, height - block.shape[1]), (0, 0), (0, 0)), constant_values=255)
        for block in blocks
    ]
    picture = np.concatenate(blocks, axis=2).reshape(-1, sum(block.shape[2] for block in blocks), 3)
    Image.fromarray(picture).save(path)


def _tiles(block: Tensor, preset: ViewPreset) -> np.ndarray:
    """(B, V, C, H, W) normalised to (B, H + gap, V * (W + gap), 3) uint8 on white."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    pixels = (block.detach().float().cpu() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    if pixels.shape[2] != 3:
        pixels = pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
    pixels = torch.nn.functional.pad(pixels, (0, _GAP, 0, _GAP), value=255)
    return pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).numpy()
