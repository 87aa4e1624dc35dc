# SPDX-License-Identifier: Apache-2.0
"""The grid of CPC and the jigsaw of PIRL equal loops over images, patches and pixels."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import mentions
from scipy.stats import chisquare
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tv

from hf_ssl.errors import UserError
from hf_ssl.random import image_seeds, uniforms
from hf_ssl.views import (
    ViewSettings,
    cut_patches,
    enlarged,
    grid_layout,
    jigsaw_layout,
    reduced,
    sample_patches,
)
from hf_ssl.views.operations import JITTER_ORDERS
from hf_ssl.views.patches import PATCH_COLUMNS, rotate_and_shear

MEAN, STD = (0.5, 0.4, 0.3, 0.45, 0.6), (0.2, 0.3, 0.25, 0.15, 0.35)
CHANGES = ViewSettings(
    flip=0.5,
    jitter=0.7,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray=0.3,
    blur=0.4,
    solarize=0.3,
    quarter_turns=0.3,
    rotation=0.3,
    rotation_degrees=60,
)
FLIPS = ViewSettings(flip=0.5, jitter=0, gray=0, blur=0)
SEEDS = image_seeds(0, 0, np.arange(3000, dtype=np.uint64))


def normalization(channels):
    return {"mean": MEAN[:channels], "std": STD[:channels]}


def make_views(count, shape):
    pixels = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return tv.normalize(pixels, MEAN[: shape[0]], STD[: shape[0]])


def cut(images, layout, seeds=SEEDS):
    table = sample_patches(seeds[: len(images)], layout)
    return cut_patches(images, layout, table, **normalization(images.shape[1]))


def rows_of(table):
    """Yield (image, position, {name: value}) for every patch."""
    for image, patches in enumerate(table.double().tolist()):
        for position, row in enumerate(patches):
            yield image, position, dict(zip(PATCH_COLUMNS, row, strict=True))


def changed(pixels, sampled, settings):
    """Return a patch (C, S, S) in [0, 1] with the changes of one table row, by torchvision."""
    if sampled["flip"]:
        pixels = tv.horizontal_flip(pixels)
    for part in JITTER_ORDERS[int(sampled["order"])] if sampled["jitter"] else ():
        name = ("brightness", "contrast", "saturation", "hue")[part]
        pixels = getattr(tv, f"adjust_{name}")(pixels, sampled[name])
    if sampled["gray"]:
        pixels = tv.rgb_to_grayscale(pixels, 3)
    if sampled["sigma"]:
        pixels = tv.gaussian_blur(pixels, [settings.blur_kernel] * 2, [sampled["sigma"]] * 2)
    if sampled["solarize"]:
        pixels = tv.solarize(pixels, settings.solarize_threshold)
    if sampled["quarter_turns"]:
        pixels = tv.rotate(pixels, 90 * sampled["quarter_turns"])
    if sampled["degrees"]:
        side = pixels.shape[-1]
        pixels = tv.pad(pixels, [side] * 4, padding_mode="symmetric")
        pixels = tv.rotate(pixels, sampled["degrees"], tv.InterpolationMode.BILINEAR)
        pixels = tv.center_crop(pixels, [side, side])
    return pixels


def slow_patches(images, layout, table):
    """Return the patches (B, P, C, size, size), one pixel at a time. Colors change a patch at a time."""
    channels, side, margin = images.shape[1], layout.sub_crop, (layout.size - layout.sub_crop) // 2
    result = torch.zeros(*table.shape[:2], channels, layout.size, layout.size, dtype=images.dtype)
    for image, position, sampled in rows_of(table):
        top, left = int(sampled["top"]), int(sampled["left"])
        patch = torch.empty(channels, side, side, dtype=images.dtype)
        for channel in range(channels):
            for y in range(side):
                for x in range(side):
                    patch[channel, y, x] = images[image, channel, top + y, left + x]
        if layout.settings is not None:
            mean, std = (torch.tensor(values[:channels])[:, None, None] for values in (MEAN, STD))
            patch = (changed(patch * std + mean, sampled, layout.settings) - mean) / std
        for channel in range(channels):
            if sampled["channel"] in (0, channel + 1):
                inside = slice(margin, margin + side)
                result[image, position, channel, inside, inside] = patch[channel]
    return result


GRIDS = {
    "CIFAR": ((3, 32, 32), {"patch": 8, "stride": 4}),
    "odd, not square, gray": ((1, 13, 21), {"patch": 5, "stride": 4}),
    "five channels": ((5, 9, 7), {"patch": 3, "stride": 2}),
    "without overlap": ((3, 12, 18), {"patch": 6, "stride": 6}),
    "with gaps": ((3, 11, 7), {"patch": 3, "stride": 4}),
    "single pixels": ((3, 2, 3), {"patch": 1, "stride": 1}),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("count", [1, 3])
def test_a_grid_contains_the_pixels_at_its_indices(name, count):
    shape, sizes = GRIDS[name]
    patch, stride = sizes["patch"], sizes["stride"]
    images = make_views(count, shape)
    patches = cut(images, grid_layout(shape, **sizes))
    rows, columns = ((side - patch) // stride + 1 for side in shape[1:])
    assert patches.shape == (count, rows, columns, shape[0], patch, patch)
    for image, row, column, channel, y, x in np.ndindex(*patches.shape):
        expected = images[image, channel, row * stride + y, column * stride + x]
        assert patches[image, row, column, channel, y, x] == expected


@pytest.mark.parametrize(("patch", "sub_crop"), [(8, 7), (8, 5), (7, 6), (7, 4), (8, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_sub_crops_are_padded_back(patch, sub_crop, count):
    shape = (3, patch + 6, patch + 3)
    layout = grid_layout(shape, patch=patch, stride=3, sub_crop=sub_crop)
    images = make_views(count, shape)
    expected = slow_patches(images, layout, sample_patches(SEEDS[:count], layout))
    assert torch.equal(cut(images, layout), expected.view(count, 3, 2, 3, patch, patch))


LAYOUTS = {
    "grid": lambda shape, **keywords: grid_layout(shape, patch=9, stride=4, **keywords),
    "grid with sub-crops": lambda shape, **keywords: grid_layout(
        shape, patch=9, stride=4, sub_crop=8, **keywords
    ),
    "jigsaw": jigsaw_layout,
}
each = pytest.mark.parametrize("name", LAYOUTS)


@each
@pytest.mark.parametrize("count", [1, 5])
def test_each_patch_has_its_own_augmentation(name, count):
    """It equals torchvision's, which is applied to one patch after the other."""
    layout = LAYOUTS[name]((3, 25, 29), settings=CHANGES, color_dropping=0.3)
    images = make_views(count, (3, 25, 29))
    table = sample_patches(SEEDS[:count], layout)
    for parameter in ("flip", "jitter", "gray", "sigma", "solarize", "quarter_turns", "degrees", "channel"):
        values = table[..., PATCH_COLUMNS.index(parameter)]
        assert (values == 0).any() and (values > 0).any(), f"all patches have the same {parameter}"
    patches = cut(images, layout).view(count, layout.num_patches, 3, layout.size, layout.size)
    expected = slow_patches(images, layout, table)
    differing = (patches - expected).abs() > 2e-4
    # Near the threshold of the solarization, the rounding error decides.
    solarized = table[..., PATCH_COLUMNS.index("solarize")] > 0
    assert not differing[~solarized].any() and differing.float().mean() < 1e-3


def test_flips_are_exact():
    layout = jigsaw_layout((1, 17, 16), settings=FLIPS)
    images = make_views(3, (1, 17, 16))
    expected = slow_patches(images, layout, sample_patches(SEEDS[:3], layout))
    torch.testing.assert_close(cut(images, layout), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sub_crop", [None, 4, 1])
@pytest.mark.parametrize("shape", [(3, 17, 16), (1, 15, 23), (3, 6, 6)])
def test_a_jigsaw_equals_a_loop_over_its_cells(shape, sub_crop):
    if sub_crop == 4 and shape[1] == 6:
        sub_crop = 2
    layout = jigsaw_layout(shape, sub_crop=sub_crop)
    images = make_views(4, shape)
    table = sample_patches(SEEDS[:4], layout)
    patches = cut(images, layout)
    assert patches.shape == (4, 9, shape[0], layout.size, layout.size)
    assert torch.equal(patches, slow_patches(images, layout, table))
    height, width = shape[1] // 3, shape[2] // 3
    before = (shape[1] - 3 * height) // 2, (shape[2] - 3 * width) // 2
    for image, patch_rows in enumerate(table):
        assert sorted(patch_rows[:, 0].tolist()) == list(range(9))
        for cell, top, left in patch_rows[:, :3].long().tolist():
            row, column = divmod(cell, 3)
            assert 0 <= top - before[0] - row * height <= height - layout.sub_crop, image
            assert 0 <= left - before[1] - column * width <= width - layout.sub_crop, image


@pytest.mark.parametrize(
    ("size", "cell", "sub_crop"), [(255, 85, 64), (224, 74, 55), (96, 32, 24), (64, 21, 15), (32, 10, 7)]
)
def test_the_sizes_of_a_jigsaw_follow_those_of_the_view(size, cell, sub_crop):
    layout = jigsaw_layout((3, size, size))
    assert (layout.cell, layout.sub_crop, layout.size) == ((cell, cell), sub_crop, sub_crop)


def test_the_kernel_of_a_blur_follows_the_sub_crop():
    """It does not follow `settings.size`, which is that of views. A kernel in the settings is kept."""
    sides = {64: 7, 24: 3, 41: 5}
    for side, kernel in sides.items():
        layout = jigsaw_layout((3, 255, 255), sub_crop=side, settings=replace(CHANGES, size=224))
        assert (layout.settings.size, layout.settings.blur_kernel) == (side, kernel)
    layout = jigsaw_layout((3, 255, 255), settings=replace(CHANGES, blur_kernel=9))
    assert layout.settings.blur_kernel == 9


def test_the_sizes_of_cpc():
    assert grid_layout((3, 256, 256), patch=64, stride=32, sub_crop=60).shape == (7, 7)
    assert grid_layout((3, 32, 32), patch=8, stride=4).shape == (7, 7)
    assert grid_layout((3, 30, 30), patch=10, stride=5).shape == (5, 5)


# Rotation and shear


def slow_affine(patch, sampled):
    """Return a patch (C, S, S) that is rotated and sheared, one pixel at a time."""
    side, angle = patch.shape[-1], math.radians(sampled["turn"])
    result, center = torch.zeros_like(patch), (patch.shape[-1] - 1) / 2
    for row in range(side):
        for column in range(side):
            x, y = column - center, row - center
            x, y = x + sampled["shear_x"] * y, y + sampled["shear_y"] * x
            x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
            left, top = math.floor(x + center), math.floor(y + center)
            for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= i < side and 0 <= j < side:
                    weight = (1 - abs(y + center - i)) * (1 - abs(x + center - j))
                    result[:, row, column] += weight * patch[:, i, j]
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {"rotation": 40.0, "shear": 0.3},
        {"rotation": 180.0},
        {"shear": 0.9, "settings": CHANGES, "color_dropping": 0.3},
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_patches_are_rotated_and_sheared_pixel_by_pixel(changes, count):
    """The changes of colors come first, and zeros come from outside of the sub-crop."""
    layout = grid_layout((3, 13, 17), patch=9, stride=4, sub_crop=7, **changes)
    images = make_views(count, (3, 13, 17)).double()
    table = sample_patches(SEEDS[:count], layout)
    found = cut(images, layout).flatten(1, 2)
    before = cut(images, replace(layout, rotation=0.0, shear=0.0)).flatten(1, 2)
    assert not torch.isclose(found, before).all(4).all(3).all(2).any()
    inside = slice(1, 8)
    for image, position, sampled in rows_of(table):
        expected = torch.zeros(3, 9, 9, dtype=torch.float64)
        expected[:, inside, inside] = slow_affine(before[image, position, :, inside, inside], sampled)
        torch.testing.assert_close(found[image, position], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [5, 8])
def test_quarter_turns_are_counterclockwise(side):
    pixels = torch.randn(4, 2, side, side, dtype=torch.float64)
    zeros = np.zeros(4, np.float32)
    found = rotate_and_shear(pixels, np.array([0, 90, 180, -90], np.float32), zeros, zeros)
    expected = [pixels[turn].rot90(turn, (1, 2)) for turn in range(4)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)
    half = rotate_and_shear(pixels.bfloat16(), zeros, zeros, zeros)
    assert half.dtype == torch.bfloat16 and torch.equal(half, pixels.bfloat16())


def test_angles_and_shears_are_uniform_and_have_their_own_numbers():
    """Interrupted runs resume with these numbers, so their positions must never change."""
    layout = grid_layout((3, 24, 24), patch=16, stride=8, rotation=30.0, shear=0.3)
    table = sample_patches(SEEDS, layout)
    assert layout.is_random and table.shape[1] == 4
    for image, position, sampled in list(rows_of(table))[:40]:
        numbers = uniforms(SEEDS[image : image + 1], 2**19 + 64 * position + 61, 3)[0]
        for name, largest, number in zip(
            ("turn", "shear_x", "shear_y"), (30, 0.3, 0.3), numbers, strict=True
        ):
            assert sampled[name] == pytest.approx(largest * (2 * number - 1), rel=1e-6, abs=1e-6)
    plain = replace(layout, rotation=0.0, shear=0.0)
    assert not plain.is_random and not sample_patches(SEEDS, plain)[..., -3:].any()
    assert torch.equal(sample_patches(SEEDS, plain)[..., :-3], table[..., :-3])


# Parameters


@each
def test_parameters_are_those_numbers_of_the_images_streams(name):
    """Interrupted runs resume with these numbers, so their positions must never change."""
    layout = LAYOUTS[name]((3, 25, 29), settings=CHANGES, color_dropping=0.3)
    first = 2**18 if name == "jigsaw" else 2**19
    table = sample_patches(SEEDS[:20], layout)
    for image, position, sampled in rows_of(table):
        seed, cell = SEEDS[image : image + 1], int(sampled["cell"])
        if name == "jigsaw":
            order = uniforms(seed, first + 9 * 64, 9)[0]
            assert cell == sorted(range(9), key=order.__getitem__)[position]
        else:
            assert cell == position
        numbers = uniforms(seed, first + 64 * cell, 19)[0].tolist()
        row, column = divmod(cell, layout.shape[1])
        for axis, place, number in zip((0, 1), (row, column), numbers[:2], strict=True):
            corner = layout.first[axis] + place * layout.step[axis]
            corner += int(number * (layout.cell[axis] - layout.sub_crop + 1))
            assert sampled[("top", "left")[axis]] == corner
        assert sampled["channel"] == (1 + int(3 * numbers[3]) if numbers[2] < 0.3 else 0)
        assert sampled["flip"] == (numbers[4] < CHANGES.flip)
        assert sampled["jitter"] == (numbers[5] < CHANGES.jitter)
        assert sampled["order"] == int(numbers[6] * 24)
        assert sampled["brightness"] == pytest.approx(0.6 + 0.8 * numbers[7], rel=1e-6)
        assert sampled["gray"] == (numbers[11] < CHANGES.gray)
        assert sampled["solarize"] == (numbers[14] < CHANGES.solarize)
        assert sampled["quarter_turns"] == (1 + int(3 * numbers[16]) if numbers[15] < 0.3 else 0)
        degrees = (120 * numbers[18] - 60) % 360 if numbers[17] < 0.3 else 0
        assert sampled["degrees"] == pytest.approx(degrees, rel=1e-6)


@each
def test_patches_of_an_image_do_not_depend_on_the_batch(name):
    layout = LAYOUTS[name]((3, 25, 29), settings=CHANGES, color_dropping=0.3)
    images, order = make_views(6, (3, 25, 29)), [4, 0, 5, 2]
    table = sample_patches(SEEDS[:6], layout)
    assert torch.equal(sample_patches(SEEDS[order], layout), table[order])
    whole = cut_patches(images, layout, table, **normalization(3))
    part = cut_patches(images[order], layout, table[order], **normalization(3))
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-5)
    for image in range(6):
        alone = cut_patches(images[image : image + 1], layout, table[image : image + 1], **normalization(3))
        torch.testing.assert_close(alone[0], whole[image], rtol=0, atol=1e-5)


def counts(values, choices):
    return np.bincount(np.asarray(values, np.int64).flatten(), minlength=choices)


def assert_uniform(values, choices):
    found = counts(values, choices)
    assert len(found) == choices and chisquare(found).pvalue > 1e-3


def column(table, name):
    return table[..., PATCH_COLUMNS.index(name)].numpy()


def test_places_channels_and_flips_are_independent_and_have_their_probabilities():
    layout = grid_layout((3, 24, 24), patch=16, stride=8, sub_crop=13, settings=FLIPS, color_dropping=0.4)
    table = sample_patches(SEEDS, layout)
    down = column(table, "top") - np.array([0, 0, 8, 8])
    right = column(table, "left") - np.array([0, 8, 0, 8])
    assert_uniform(down, 4)
    assert_uniform(right, 4)
    channel, flip = column(table, "channel"), column(table, "flip")
    assert (channel > 0).mean() == pytest.approx(0.4, abs=0.02)
    assert_uniform(channel[channel > 0] - 1, 3)
    assert flip.mean() == pytest.approx(0.5, abs=0.02)
    everything = np.concatenate((down, right, channel, flip), axis=1)
    assert abs(np.corrcoef(everything.T) - np.eye(16)).max() < 0.07


def test_permutations_are_uniform_and_independent_of_the_places():
    layout = jigsaw_layout((3, 30, 30), sub_crop=6)
    table = sample_patches(SEEDS, layout)
    cell = column(table, "cell")
    for position in range(9):
        assert_uniform(cell[:, position], 9)
    first_two = 9 * cell[:, 0] + cell[:, 1]
    assert (
        chisquare(counts(first_two, 81)[[9 * a + b for a in range(9) for b in range(9) if a != b]]).pvalue
        > 1e-3
    )
    assert_uniform(column(table, "top") % 10, 5)
    assert_uniform(column(table, "left") % 10, 5)
    places = np.concatenate((column(table, "top") % 10, column(table, "left") % 10, cell[:, :8]), axis=1)
    assert abs(np.corrcoef(places.T) - np.eye(26))[:18].max() < 0.08


def test_a_grid_and_a_jigsaw_have_different_numbers():
    grid = grid_layout((3, 30, 30), patch=10, stride=10, sub_crop=6)
    tables = [sample_patches(SEEDS[:50], layout) for layout in (grid, jigsaw_layout((3, 30, 30), sub_crop=6))]
    tops = [column(table, "top") for table in tables]
    cells = column(tables[1], "cell").astype(int)
    assert (np.take_along_axis(tops[0], cells, axis=1) == tops[1]).mean() < 0.4


# Colors, types, sizes


def test_color_dropping_keeps_one_channel_and_the_mean_color_of_the_others():
    layout = grid_layout((3, 12, 12), patch=4, stride=4, color_dropping=1.0)
    images = make_views(2, (3, 12, 12))
    patches, whole = cut(images, layout), cut(images, replace(layout, color_dropping=0.0))
    kept = (patches == whole).flatten(4).all(-1)
    assert (kept.sum(-1) == 1).all() and kept.flatten(0, 2).any(0).all()
    assert (patches[~kept] == 0).all()


@each
def test_half_precision_autocast_and_double_give_the_same_patches(name):
    layout = LAYOUTS[name]((3, 25, 29), settings=replace(CHANGES, solarize=0), color_dropping=0.3)
    images = (make_views(3, (3, 25, 29)) * 16).round() / 16
    expected = cut(images, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cut(images, layout), expected, rtol=0, atol=0)
    for dtype in (torch.float64, torch.bfloat16):
        patches = cut(images.to(dtype), layout)
        assert patches.dtype == dtype
        torch.testing.assert_close(patches, expected.to(dtype), rtol=0, atol=0)


@each
def test_the_views_do_not_change_and_may_be_strided(name):
    layout = LAYOUTS[name]((3, 25, 29), settings=CHANGES, color_dropping=0.3)
    images = make_views(4, (3, 25, 29))
    before, expected = images.clone(), cut(images, layout)
    assert torch.equal(images, before)
    both = torch.stack((torch.zeros_like(images), images), dim=1)
    assert torch.equal(cut(both[:, 1], layout), expected)
    assert torch.equal(cut(images.contiguous(memory_format=torch.channels_last), layout), expected)
    assert not cut(images.requires_grad_(), layout).requires_grad


@each
def test_the_host_never_waits_for_the_device(name, monkeypatch):
    """Tensors on the meta device have no values: an operation that waits for an accelerator raises here.

    The meta device has no autocast.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **keywords: nullcontext())
    layout = LAYOUTS[name]((3, 25, 29), settings=CHANGES, color_dropping=0.3)
    layout = replace(layout, rotation=30.0, shear=0.3)
    images = make_views(4, (3, 25, 29))
    patches = cut(images.to("meta"), layout)
    assert patches.device.type == "meta" and patches.shape == cut(images, layout).shape


@pytest.mark.gpu
@each
def test_an_accelerator_equals_the_host(name):
    settings = replace(CHANGES, solarize=0)  # near the threshold of the solarization, rounding decides
    layout = LAYOUTS[name]((3, 25, 29), settings=settings, color_dropping=0.3)
    layout = replace(layout, rotation=30.0, shear=0.3)
    images = make_views(64, (3, 25, 29))
    host, images = cut(images, layout), images.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        device = cut(images, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(device.cpu(), host, rtol=0, atol=5e-4)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_enlarged_patches_equal_enlarging_one_at_a_time(factor):
    patches = cut(make_views(2, (3, 12, 16)), grid_layout((3, 12, 16), patch=8, stride=4))
    larger = enlarged(patches, factor)
    assert larger.shape == (2, 2, 3, 3, 8 * factor, 8 * factor)
    for place in np.ndindex(2, 2, 3):
        one = interpolate(patches[place][None], scale_factor=factor, mode="bilinear", align_corners=False)
        torch.testing.assert_close(larger[place], one[0], rtol=0, atol=1e-6)
    images = make_views(2, (3, 5, 7))
    assert enlarged(images, factor).shape == (2, 3, 5 * factor, 7 * factor)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 7, 8])
def test_enlarged_pixels_are_reduced_to_the_original_ones(factor):
    images = make_views(2, (3, 5, 7)).double()
    torch.testing.assert_close(reduced(enlarged(images, factor), factor), images, rtol=0, atol=1e-12)
    assert reduced(images, 1) is images


# Errors


@pytest.mark.parametrize(
    ("shape", "changed", "parts"),
    [
        ((3, 34, 34), {}, ["views.size", 8, 4, 34, 32, 36]),
        ((3, 32, 35), {}, ["views.size", 35, 32, 36]),
        ((3, 8, 8), {}, ["views.size", "two patches", 12, 8]),
        ((3, 32, 11), {}, ["views.size", "two patches", 12, 11]),
        ((3, 5, 32), {}, ["views.size", "two patches", 12, 5]),
        ((3, 32, 32), {"patch": 0}, ["patches.patch", 1, 0]),
        ((3, 32, 32), {"stride": 0}, ["patches.stride", 1, 0]),
        ((3, 32, 32), {"sub_crop": 9}, ["patches.sub_crop", 8, 9]),
        ((3, 32, 32), {"rotation": 181}, ["patches.rotation", 180, 181]),
        ((3, 32, 32), {"shear": 1.0}, ["patches.shear", "less than 1", 1.0]),
        ((3, 32, 32), {"sub_crop": 0}, ["patches.sub_crop", 8, 0]),
        ((3, 32, 32), {"color_dropping": 1.5}, ["patches.color_dropping", 0, 1, 1.5]),
        ((1, 32, 32), {"color_dropping": 0.5}, ["patches.color_dropping", 0, "1 channel", 0.5]),
        ((1, 32, 32), {"settings": replace(FLIPS, gray=0.2)}, ["patches.gray", "1 channel", 0.2]),
        ((3, 32, 32), {"settings": replace(FLIPS, flip=2)}, ["patches.flip", 2]),
    ],
)
def test_grids_that_cannot_be_cut(shape, changed, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        grid_layout(shape, **{"patch": 8, "stride": 4} | changed)


@pytest.mark.parametrize(
    ("shape", "changed", "parts"),
    [
        ((3, 32, 32), {"sub_crop": 11}, ["patches.sub_crop", 10, 11]),
        ((3, 64, 32), {"sub_crop": 11}, ["patches.sub_crop", 10, 11]),
        ((3, 32, 32), {"sub_crop": 0}, ["patches.sub_crop", 10, 0]),
        ((3, 5, 32), {}, ["views.size", 6, "5 x 32"]),
        ((2, 32, 32), {"color_dropping": 0.5}, ["patches.color_dropping", "2 channels", 0.5]),
        ((3, 32, 32), {"settings": replace(FLIPS, hue=0.7)}, ["patches.hue", 0.7]),
    ],
)
def test_jigsaws_that_cannot_be_cut(shape, changed, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        jigsaw_layout(shape, **changed)


def test_views_and_parameters_of_other_images_raise():
    layout = grid_layout((3, 16, 16), patch=8, stride=4)
    table = sample_patches(SEEDS[:2], layout)
    with pytest.raises(ValueError, match=mentions("images", "(3, 16, 16)", "(3, 16, 20)")):
        cut_patches(torch.zeros(2, 3, 16, 20), layout, table, **normalization(3))
    with pytest.raises(ValueError, match=mentions("table", 9, 3, "(2, 9,")):
        cut_patches(torch.zeros(3, 3, 16, 16), layout, table, **normalization(3))
