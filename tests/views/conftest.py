# SPDX-License-Identifier: Apache-2.0
"""The judge: torchvision, one view at a time, given what `draw` drew."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from hf_ssl.views import draw, seeds
from hf_ssl.views.drawing import COLUMNS, JITTER_ORDERS


def torchvision_crop(image, drawn, settings):
    """Crop and resize an image (C, H, W), uint8 or float, to (C, S, S) of the same type.

    For uint8, this function calls torch's own resizing. torchvision also calls it, but not on every kind of
    processor (see test_cropping).
    """
    box = [int(drawn[name]) for name in ("top", "left", "height", "width")]
    if image.dtype == torch.uint8:
        part, size = tv.crop(image, *box)[None], [settings.size] * 2
        return interpolate(part, size, mode=settings.interpolation, antialias=True)[0]
    mode = InterpolationMode(settings.interpolation)
    return tv.resized_crop(image, *box, [settings.size] * 2, mode, antialias=True)


def torchvision_jitter(pixels, drawn, settings):
    for part in JITTER_ORDERS[int(drawn["order"])]:
        name = ("brightness", "contrast", "saturation", "hue")[part]
        if getattr(settings, name):  # torchvision's ColorJitter leaves out a part whose strength is 0
            pixels = getattr(tv, f"adjust_{name}")(pixels, drawn[name])
    return pixels


def torchvision_view(pixels, drawn, settings, preset):
    """float (C, S, S) in [0, 1], cropped, to the finished view, and where it may differ: close to the
    threshold of the solarisation a rounding error decides."""
    if drawn["flip"]:
        pixels = tv.horizontal_flip(pixels)
    if drawn["jitter"]:
        pixels = torchvision_jitter(pixels, drawn, settings)
    if drawn["gray"]:
        pixels = tv.rgb_to_grayscale(pixels, 3)
    if drawn["sigma"]:
        pixels = tv.gaussian_blur(pixels, [settings.blur_kernel] * 2, [drawn["sigma"]] * 2)
    unsure = torch.zeros_like(pixels)
    if drawn["solarize"]:
        unsure = ((pixels - settings.solarize_threshold).abs() < 1e-5).float()
        pixels = tv.solarize(pixels, settings.solarize_threshold)
    if preset.enlarge:
        side = settings.size * preset.enlarge // preset.size
        pixels, unsure = (
            tv.resize(image, [side, side], InterpolationMode.BILINEAR, antialias=False)
            for image in (pixels, unsure)
        )
    return tv.normalize(pixels, list(preset.mean), list(preset.std)), unsure > 0


@pytest.fixture
def judge():
    """views(images, parameters, crops) -> list over images of lists over views of (pixels, unsure)."""

    def views(images, parameters, from_uint8_crops=False):
        preset, result = parameters.preset, []
        for image, rows in zip(images, parameters.table.double().tolist(), strict=True):
            result.append([])
            for row, settings in zip(rows, preset.expand(), strict=True):
                drawn = dict(zip(COLUMNS, row, strict=True))
                if from_uint8_crops:
                    pixels = torchvision_crop(image, drawn, settings).float() / 255
                else:
                    # Bicubic overshoots; on uint8 images torchvision clamps it, and so do we.
                    pixels = torchvision_crop(image.float() / 255, drawn, settings).clamp(0, 1)
                result[-1].append(torchvision_view(pixels, drawn, settings, preset))
        return result

    return views


@pytest.fixture
def make_images():
    """Images with smooth parts, edges, grey and saturated pixels and noise: (count, channels, height, width)
    uint8."""

    def make(count, channels, height, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        low = torch.rand(count, channels, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(low, (height, width), mode="bicubic") * 400 - 70
        images += 40 * torch.randn(count, 1, height, width, generator=generator)
        images[:, :, height // 4 : height // 2, : width // 3] = 128
        images[:, 0, -3:, :] = 255
        return images.clamp(0, 255).to(torch.uint8)

    return make


@pytest.fixture
def draw_for():
    """Parameters for images numbered 0, 1, ... of given sizes."""

    def make(images, preset, run_seed=0):
        keys = np.arange(len(images), dtype=np.uint64)
        return draw(seeds(run_seed, 0, keys), preset, np.array([image.shape[-2:] for image in images]))

    return make
