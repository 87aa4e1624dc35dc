# SPDX-License-Identifier: Apache-2.0
"""The reference: torchvision, one view at a time, with the same augmentation parameters."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from hf_ssl.random import image_seeds
from hf_ssl.views import sample_parameters
from hf_ssl.views.operations import JITTER_ORDERS, OPERATIONS
from hf_ssl.views.parameters import COLUMNS


def torchvision_rotation(pixels, degrees):
    """Rotate an image (C, S, S). The padding by mirrored edges is as large as the corners need."""
    margin = pixels.shape[-1] // 4 + 2
    padded = tv.pad(pixels, [margin] * 4, padding_mode="symmetric")
    return tv.center_crop(tv.rotate(padded, degrees, InterpolationMode.BILINEAR), pixels.shape[-2:])


# The reference of each operation: (pixels (C, S, S), parameter, settings of the view) -> pixels.
REFERENCES = {
    "gray": lambda pixels, _, view: tv.rgb_to_grayscale(pixels, 3),
    "sigma": lambda pixels, sigma, settings: tv.gaussian_blur(
        pixels, [settings.blur_kernel] * 2, [sigma] * 2
    ),
    "solarize": lambda pixels, _, view: tv.solarize(pixels, view.solarize_threshold),
    "quarter_turns": lambda pixels, turns, view: tv.rotate(pixels, 90 * turns),
    "degrees": lambda pixels, degrees, view: torchvision_rotation(pixels, degrees),
}
# Operations with steps: where rounding errors decide on which side of a step a pixel is, as a mask.
STEPS = {
    "solarize": lambda pixels, _, view: (pixels - view.solarize_threshold).abs() < 1e-5,
}
_MISSING = {operation.parameter for operation in OPERATIONS} - REFERENCES.keys()
assert not _MISSING, f"add a reference to REFERENCES (tests/views/conftest.py): {_MISSING}"


def torchvision_crop(image, sampled, settings):
    """Crop and resize an image (C, H, W), uint8 or float, to (C, S, S) of the same type.

    For uint8, this function calls torch's own resizing. torchvision also calls it, but not on every kind of
    processor (see test_cropping).
    """
    box = [int(sampled[name]) for name in ("top", "left", "height", "width")]
    if image.dtype == torch.uint8:
        part, size = tv.crop(image, *box)[None], [settings.size] * 2
        return interpolate(part, size, mode=settings.interpolation, antialias=True)[0]
    mode = InterpolationMode(settings.interpolation)
    return tv.resized_crop(image, *box, [settings.size] * 2, mode, antialias=True)


def torchvision_jitter(pixels, sampled, settings):
    for part in JITTER_ORDERS[int(sampled["order"])]:
        name = ("brightness", "contrast", "saturation", "hue")[part]
        if getattr(settings, name):  # torchvision's ColorJitter leaves out a part whose strength is 0
            pixels = getattr(tv, f"adjust_{name}")(pixels, sampled[name])
    return pixels


def torchvision_view(pixels, sampled, settings, preset):
    """Return the finished view of a crop, float (C, S, S) in [0, 1], and a mask of pixels that may differ.

    Near a step of an operation, the rounding error decides; see `STEPS`.
    """
    if sampled["flip"]:
        pixels = tv.horizontal_flip(pixels)
    if sampled["jitter"]:
        pixels = torchvision_jitter(pixels, sampled, settings)
    unsure = torch.zeros_like(pixels)
    for operation in OPERATIONS:
        value = sampled[operation.parameter]
        if value:
            if operation.parameter in STEPS:
                unsure = torch.maximum(unsure, STEPS[operation.parameter](pixels, value, settings).float())
            pixels = REFERENCES[operation.parameter](pixels, value, settings)
            if operation.moves_pixels:
                unsure = REFERENCES[operation.parameter](unsure, value, settings)
    if preset.enlarge:
        side = settings.size * preset.enlarge // preset.size
        pixels, unsure = (
            tv.resize(image, [side, side], InterpolationMode.BILINEAR, antialias=False)
            for image in (pixels, unsure)
        )
    return tv.normalize(pixels, list(preset.mean), list(preset.std)), unsure > 0


@pytest.fixture
def operations_with_steps():
    return list(STEPS)


@pytest.fixture
def reference():
    """Return a function: images, parameters -> for each image, a list of (pixels, unsure) of its views."""

    def views(images, parameters, from_uint8_crops=False):
        preset, result = parameters.preset, []
        for image, rows in zip(images, parameters.table.double().tolist(), strict=True):
            result.append([])
            for row, settings in zip(rows, preset.expand(), strict=True):
                sampled = dict(zip(COLUMNS, row, strict=True))
                if from_uint8_crops:
                    pixels = torchvision_crop(image, sampled, settings).float() / 255
                else:
                    # Like torchvision for uint8 images, hf_ssl clamps bicubic values.
                    pixels = torchvision_crop(image.float() / 255, sampled, settings).clamp(0, 1)
                result[-1].append(torchvision_view(pixels, sampled, settings, preset))
        return result

    return views


@pytest.fixture
def make_images():
    """Return a function that makes images (count, channels, height, width) uint8.

    They have smooth parts, edges, gray and saturated pixels, and noise.
    """

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
def sample_for():
    """Return a function that samples augmentation parameters for images numbered 0, 1, ..."""

    def make(images, preset, run_seed=0):
        keys = np.arange(len(images), dtype=np.uint64)
        sizes = np.array([image.shape[-2:] for image in images])
        return sample_parameters(image_seeds(run_seed, 0, keys), preset, sizes)

    return make
