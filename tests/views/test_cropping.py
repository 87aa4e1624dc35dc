# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from messages import mentions
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from hf_ssl.views import ViewOverrides, ViewPreset, crop, cropping
from hf_ssl.views.cropping import crop_batch


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_worker_crops_equal_torch_to_the_last_bit_and_torchvision_within_a_level(
    channels, interleaved, interpolation, make_images, sample_for
):
    preset = ViewPreset(
        size=24, interpolation=interpolation, local=ViewOverrides(count=3, size=10, scale=(0.05, 0.3))
    )
    images = [make_images(1, channels, 12 + 5 * i, 70 - 3 * i, seed=i)[0] for i in range(15)]
    if interleaved:
        images = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    parameters = sample_for(images, preset)
    crops = crop(images, parameters)
    assert crops.global_crops.dtype == torch.uint8
    for i, (image, rows) in enumerate(zip(images, parameters.table.long().tolist(), strict=True)):
        views = [*crops.global_crops[i], *crops.local_crops[i]]
        for view, row, settings in zip(views, rows, preset.expand(), strict=True):
            size = [settings.size] * 2
            part = tv.crop(image, *row[:4]).contiguous()[None]
            assert torch.equal(view, interpolate(part, size, mode=interpolation, antialias=True)[0])
            theirs = tv.resized_crop(image, *row[:4], size, InterpolationMode(interpolation), antialias=True)
            # On some processors, torchvision resizes bilinear crops in float32 and rounds once at the end.
            # Version 0.21 does so on all except those whose newest instruction set is AVX2, version 0.29 on
            # those without AVX2.
            assert (view.int() - theirs.int()).abs().max() <= (0 if interpolation == "bicubic" else 1)


def test_a_crop_of_the_right_size_does_not_change(make_images, sample_for):
    images = make_images(3, 3, 24, 24)
    parameters = sample_for(images, ViewPreset(size=24, count=1, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    assert torch.equal(crop(list(images), parameters).global_crops[:, 0], images)


def boxes_of(height, width, generator, count=300):
    """Return boxes of all kinds, some of which touch the border or contain a single pixel."""
    tall = torch.randint(1, height + 1, (count,), generator=generator)
    wide = torch.randint(1, width + 1, (count,), generator=generator)
    top = (torch.rand(count, generator=generator) * (height - tall + 1)).long()
    left = (torch.rand(count, generator=generator) * (width - wide + 1)).long()
    boxes = torch.stack([top, left, tall, wide], dim=1)
    boxes[0] = torch.tensor([0, 0, height, width])
    boxes[1] = torch.tensor([height - 1, width - 1, 1, 1])
    return boxes.numpy()


@pytest.mark.parametrize("table", [True, False], ids=["looked up", "computed"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (28, 37, 20), (40, 33, 9), (16, 16, 96)])
def test_batched_crops_equal_torchvision(height, width, size, interpolation, table, make_images, monkeypatch):
    if not table:
        monkeypatch.setattr(cropping, "_TABLE_BYTES", 0)
    mode = InterpolationMode(interpolation)
    generator = torch.Generator().manual_seed(0)
    boxes = boxes_of(height, width, generator)
    images = make_images(len(boxes), 3, height, width)
    flip = (torch.rand(len(boxes), generator=generator) < 0.5).numpy()
    got = crop_batch(images, boxes.astype(np.float32), flip.astype(np.float32), size, interpolation)
    for image, box, flipped, view in zip(images, boxes.tolist(), flip, got, strict=True):
        expected = tv.resized_crop(image.float() / 255, *box, [size, size], mode, antialias=True)
        expected = expected.clamp(0, 1)
        expected = expected.flip(-1) if flipped else expected
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_parameters_of_other_images_raise_an_error(make_images, sample_for):
    images = make_images(4, 3, 32, 32)
    parameters = sample_for(images, ViewPreset(size=8))
    with pytest.raises(ValueError, match=mentions("10 x 32")):
        crop([image[:, :10] for image in images], parameters)


def test_a_batch_without_images(sample_for):
    parameters = sample_for([torch.zeros(3, 5, 5)], ViewPreset(size=8))[:0]
    assert crop([], parameters).global_crops.shape == (0, 2, 3, 8, 8)
