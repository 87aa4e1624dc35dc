# SPDX-License-Identifier: Apache-2.0
"""Both stages together equal torchvision, independent of batch, chunks and order."""

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from messages import mentions
from PIL import Image

from hf_ssl.views import (
    Crops,
    ViewOverrides,
    ViewPreset,
    Views,
    ViewSettings,
    augment,
    crop,
    montage,
    pipeline,
)
from hf_ssl.views.parameters import COLUMNS
from hf_ssl.views.preset import FURTHER_MEAN, FURTHER_STD

PROBABILITIES = [item.name for item in fields(ViewSettings) if "probability" in item.metadata["expected"]]
EVERYTHING = dict.fromkeys(PROBABILITIES, 0.5) | {"jitter": 0.8, "gray": 0.3, "solarize": 0.4}
PRESETS = {
    "simclr": ViewPreset(size=32),
    "bicubic": ViewPreset(size=32, interpolation="bicubic", **EVERYTHING),
    "shrinking": ViewPreset(size=11, **EVERYTHING),
    "shrinking bicubic": ViewPreset(size=11, interpolation="bicubic", **EVERYTHING),
    "large blur": ViewPreset(size=40, blur_kernel=23, blur=1.0, blur_sigma=(0.1, 4.0)),
    "two kinds of global view": ViewPreset(
        size=24, count=4, blur=1.0, hue=0.1,
        second=ViewOverrides(blur=0.1, solarize=0.5, hue=0.0, interpolation="bicubic",
        solarize_threshold=0.3),
    ),
    "local": ViewPreset(
        size=24, scale=(0.4, 1.0), **EVERYTHING,
        local=ViewOverrides(count=3, size=12, scale=(0.05, 0.4), solarize=0.0),
    ),
    "enlarged": ViewPreset(
        size=16, enlarge=40, **EVERYTHING, local=ViewOverrides(count=2, size=8, blur=0.9, scale=(0.05, 0.4))
    ),
    "one view, no hue": ViewPreset(size=20, count=1, hue=0.0, saturation=0.0, jitter=1.0),
    "rotated": ViewPreset(
        size=33, quarter_turns=0.5, rotation=0.5, rotation_degrees=180,
        second=ViewOverrides(rotation_degrees=20),
    ),
    "nothing but crops": ViewPreset(size=20, flip=0, jitter=0, gray=0, blur=0),
}  # fmt: skip


def assert_equal(views, expected_views, preset):
    tensors = [views.pixel_values] + ([] if views.local_pixel_values is None else [views.local_pixel_values])
    expected_sizes = [preset.final_size] * preset.count
    expected_sizes += [preset.final_local_size] * preset.local_count
    unsure_share = []
    for image, rows in enumerate(expected_views):
        got = [view for tensor in tensors for view in tensor[image]]
        assert [view.shape[-1] for view in got] == expected_sizes
        for number, (view, (expected, unsure)) in enumerate(zip(got, rows, strict=True)):
            # The tolerance is in units of pixels before normalization.
            error = ((view - expected) * torch.tensor(preset.std)[:, None, None]).abs()
            error[unsure] = 0
            assert error.max() < 1e-5, f"image {image}, view {number}: {error.max()}"
            unsure_share.append(unsure.float().mean())
    assert torch.stack(unsure_share).mean() < 0.02


@pytest.mark.parametrize("name", PRESETS)
def test_batched_crops_and_all_operations_equal_torchvision(name, make_images, sample_for, reference):
    images = make_images(40, 3, 26, 31)
    parameters = sample_for(images, PRESETS[name])
    assert_equal(augment(images, parameters), reference(images, parameters), PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_worker_crops_and_all_operations_equal_torchvision(name, make_images, sample_for, reference):
    images = [make_images(1, 3, 20 + 3 * i, 50 - 2 * i, seed=i)[0] for i in range(16)]
    parameters = sample_for(images, PRESETS[name])
    crops = crop(images, parameters)
    expected = reference(images, parameters, from_uint8_crops=True)
    assert_equal(augment(crops, parameters), expected, PRESETS[name])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels, make_images, sample_for, reference):
    preset = ViewPreset(size=20, saturation=0, hue=0, gray=0, solarize=0.5)
    preset.mean, preset.std = (0.4,) * channels, (0.2,) * channels
    if channels > 1:
        preset.jitter = 0.0
    preset.check(channels)
    images = make_images(20, channels, 25, 25)
    parameters = sample_for(images, preset)
    assert_equal(augment(images, parameters), reference(images, parameters), preset)
    crops = crop(list(images), parameters)
    assert crops.global_crops.shape == (20, 2, channels, 20, 20)
    assert_equal(augment(crops, parameters), reference(images, parameters, from_uint8_crops=True), preset)


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("name", ["simclr", "enlarged", "two kinds of global view"])
def test_a_view_does_not_depend_on_its_batch_or_on_chunks(
    name, in_worker, make_images, sample_for, monkeypatch
):
    images, preset = make_images(30, 3, 28, 28), PRESETS[name]
    parameters = sample_for(images, preset)

    def views(indices):
        source = images[indices]
        if in_worker:
            source = crop(list(source), parameters[indices])
        made = augment(source, parameters[indices])
        return [made.pixel_values] + ([made.local_pixel_values] if preset.local else [])

    whole = views(torch.arange(30))
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(views(shuffled), whole, strict=True):
        torch.testing.assert_close(got, expected[shuffled], rtol=0, atol=2e-6)
    for got, expected in zip(views(torch.tensor([17])), whole, strict=True):
        torch.testing.assert_close(got, expected[17:18], rtol=0, atol=2e-6)
    monkeypatch.setattr(pipeline, "_CPU_CHUNK_PIXELS", 3 * preset.size**2)
    for got, expected in zip(views(torch.arange(30)), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("in_worker", [False, True])
def test_rotations_change_no_other_view(in_worker, make_images, sample_for):
    """All other random numbers stay, and a probability of 0 leaves every bit."""
    images, preset = make_images(30, 3, 28, 28), ViewPreset(size=24, solarize=0.3)
    rotated = replace(preset, quarter_turns=0.3, rotation=0.3)
    parameters = sample_for(images, rotated)
    still = (parameters.column("quarter_turns") == 0) & (parameters.column("degrees") == 0)
    assert still.any() and not still.all()

    def views(chosen):
        sampled = sample_for(images, chosen)
        return augment(crop(list(images), sampled) if in_worker else images, sampled).pixel_values

    plain = views(preset)
    assert torch.equal(views(replace(preset, rotation_degrees=180.0)), plain)
    same = ((views(rotated) - plain).abs().amax((2, 3, 4)) < 2e-6).numpy()
    assert (same == still.numpy()).all()


def test_the_input_does_not_change_and_the_result_is_repeatable(make_images, sample_for):
    images = make_images(12, 3, 32, 32)
    parameters = sample_for(images, PRESETS["enlarged"])
    crops = crop(list(images), parameters)
    kept = images.clone(), crops.global_crops.clone(), crops.local_crops.clone(), parameters.table.clone()
    for source in (images, crops):
        one, two = augment(source, parameters), augment(source, parameters)
        assert torch.equal(one.pixel_values, two.pixel_values)
        assert torch.equal(one.local_pixel_values, two.local_pixel_values)
    for now, before in zip(
        (images, crops.global_crops, crops.local_crops, parameters.table), kept, strict=True
    ):
        assert torch.equal(now, before)


def test_views_are_contiguous_float32_also_from_a_worker(make_images, sample_for):
    images = make_images(6, 3, 32, 32)
    parameters = sample_for(images, PRESETS["local"])
    crops, parameters = pickle.loads(pickle.dumps((crop(list(images), parameters), parameters)))
    views = augment(crops, parameters)
    for tensor in (views.pixel_values, views.local_pixel_values):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("in_worker", [False, True])
def test_the_host_never_waits_for_the_device(name, in_worker, make_images, sample_for):
    """Tensors on the meta device have no values: an operation that waits for an accelerator raises here."""
    images = make_images(12, 3, 32, 32)
    parameters = sample_for(images, PRESETS[name])
    source = (crop(list(images), parameters) if in_worker else images).to("meta")
    views = augment(source, parameters.to("meta"))
    assert views.pixel_values.device.type == "meta"
    assert views.pixel_values.shape == augment(images, parameters).pixel_values.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_an_accelerator_equals_the_host(name, make_images, sample_for, operations_with_steps):
    images = make_images(64, 3, 32, 32)
    parameters = sample_for(images, PRESETS[name])
    for parameter in operations_with_steps:  # near a step, rounding decides
        parameters.column(parameter)[:] = 0
    host = augment(images, parameters)
    images = images.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        device = augment(images, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(device.pixel_values.cpu(), host.pixel_values, rtol=0, atol=1e-4)


def test_mismatched_batches_raise_an_error(make_images, sample_for):
    images = make_images(4, 3, 32, 32)
    parameters = sample_for(images, PRESETS["local"])
    with pytest.raises(ValueError, match=mentions(4, 3)):
        augment(images[:3], parameters)
    with pytest.raises(ValueError, match=mentions(4, 3)):
        crop(list(images[:3]), parameters)
    with pytest.raises(ValueError, match="local"):
        augment(Crops(crop(list(images), parameters).global_crops), parameters)
    with pytest.raises(ValueError, match=mentions("20 x 20")):
        augment(images[:, :, :20, :20], parameters)


def test_montage_has_a_row_of_views_for_each_image_in_the_colors_before_normalization(
    tmp_path, make_images, sample_for
):
    preset = ViewPreset(
        size=20, flip=0, jitter=0, gray=0, blur=0, scale=(1.0, 1.0), ratio=(1.0, 1.0),
        local=ViewOverrides(count=3, size=10),
    )  # fmt: skip
    images = make_images(5, 3, 20, 20)
    montage(augment(images, sample_for(images, preset)), preset, tmp_path / "views.png", max_images=4)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (2 + 4 * 22, 2 + 5 * 22, 3)
    for row in range(4):
        top = 2 + row * 22
        for left in (2, 24):
            tile = picture[top : top + 20, left : left + 20]
            assert (tile == images[row].permute(1, 2, 0).numpy()).all()
        for left in (46, 68, 90):
            assert (picture[top : top + 10, left : left + 10] != 255).any()
            assert (picture[top + 10 : top + 20, left : left + 20] == 255).all()
            assert (picture[top : top + 20, left + 10 : left + 20] == 255).all()
    assert (picture[22:24] == 255).all() and (picture[:, 22:24] == 255).all()


@pytest.mark.parametrize("channels", [1, 5])
def test_montage_of_other_numbers_of_channels(channels, tmp_path):
    preset = ViewPreset(mean=(0.5,) * channels, std=(0.25,) * channels)
    for count, images in ((3, 2), (1, 1)):
        views = Views(torch.full((images, count, channels, 8, 8), 1.0))
        montage(views, preset, tmp_path / "views.png")
        picture = np.asarray(Image.open(tmp_path / "views.png"))
        border = 0 if images * count == 1 else 2
        assert picture.shape == (images * (8 + border) + border, count * (8 + border) + border, 3)
        assert (picture[border : border + 8, border : border + 8] == 191).all()


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("name", ["bicubic", "two kinds of global view", "enlarged"])
def test_further_channels_are_only_cropped_flipped_and_rotated(name, in_worker, make_images, sample_for):
    """A flip also reverses the values of mirrored channels. The image itself is as without them."""
    preset, further = PRESETS[name], (FURTHER_MEAN, FURTHER_STD)
    images = make_images(20, 8, 26, 31)
    parameters = sample_for(images, preset)
    flip = parameters.table.numpy()[..., COLUMNS.index("flip")] > 0

    def views(channels, kept, mirrored=()):
        sampled = sample_for(images, kept)
        part = images[:, channels]
        made = augment(crop(list(part), sampled) if in_worker else part, sampled, mirrored)
        return [one for one in (made.pixel_values, made.local_pixel_values) if one is not None]

    # The same moves without other operations: their random numbers do not depend on other settings.
    nothing = {name: 0.0 for name in PROBABILITIES if name not in ("flip", "quarter_turns", "rotation")}
    plain = replace(preset, **nothing, mean=(further[0],) * 5, std=(further[1],) * 5)
    for part in ("second", "local"):
        if getattr(preset, part) is not None:
            setattr(plain, part, replace(getattr(preset, part), **nothing))
    found = views(slice(None), preset, mirrored=(4,))
    image, crops, start = views(slice(3), preset), views(slice(3, 8), plain), 0
    for one, expected_image, expected in zip(found, image, crops, strict=True):
        torch.testing.assert_close(one[:, :, :3], expected_image, rtol=0, atol=1e-6)
        mirrored = torch.from_numpy(flip[:, start : start + one.shape[1]])[..., None, None]
        assert mirrored.any() and not mirrored.all()
        expected = expected.clone()
        expected[:, :, 1] = torch.where(mirrored, -expected[:, :, 1], expected[:, :, 1])  # around the mean
        torch.testing.assert_close(one[:, :, 3:], expected, rtol=0, atol=1e-5)
        start += one.shape[1]


def test_montage_shows_further_columns_beside_the_image(tmp_path):
    preset = ViewPreset(mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = torch.zeros(2, 1, 7, 8, 8)
    pixels[:, :, 3] = 1.0  # a gray column; then a column with colors
    pixels[:, :, 4] = 2.0
    montage(Views(pixels), preset, tmp_path / "views.png", further=[1, 3])
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (2 + 2 * 10, 2 + 3 * 10, 3)
    for left, color in ((2, (128, 128, 128)), (12, (191, 191, 191)), (22, (255, 128, 128))):
        assert (picture[2:10, left : left + 8] == color).all()
