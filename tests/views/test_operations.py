# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from hf_ssl.views.operations import (
    JITTER_ORDERS,
    blur_,
    gaussian_weights,
    gray_,
    hue_,
    jitter_,
    jitter_groups,
    mix_,
    quarter_turns_,
    rotate_,
    solarize_,
)


def pixels(count, channels=3, side=16):
    """Return noise with rows of black, white, gray, pure and nearly gray colors, whose hue is sensitive."""
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    images[:, :, 0] = 0.0
    images[:, :, 1] = 1.0
    images[:, :, 2] = images[:, :1, 2]
    images[:, :, 3] = images[:, :, 3].round()
    images[:, :, 4] = 0.5 + 1e-6 * images[:, :, 4]
    images[:, :, 5] = (images[:, :, 5] * 4).round() / 4
    return images


@pytest.mark.parametrize("turn", [-0.5, -0.3, -1 / 6, -1e-4, 0.0, 1e-4, 0.1, 1 / 3, 0.5])
def test_hue(turn):
    images = pixels(6)
    got = images.clone()
    hue_(got, torch.full((6,), turn))
    torch.testing.assert_close(got, tv.adjust_hue(images, turn), rtol=0, atol=1e-5)


def test_each_sample_has_its_own_hue():
    images, turns = pixels(7), torch.linspace(-0.5, 0.5, 7)
    got = images.clone()
    hue_(got, turns)
    for view, image, turn in zip(got, images, turns.tolist(), strict=True):
        torch.testing.assert_close(view, tv.adjust_hue(image, turn), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.7, 3.0])
def test_brightness_contrast_and_saturation(factor, channels):
    images = pixels(4, channels)
    share, rest = torch.full((4, 1), factor), torch.full((4, 1), 1 - factor)
    for name, of_mean, of_gray in (
        ("brightness", None, None), ("contrast", rest, None), ("saturation", None, rest)
    ):  # fmt: skip
        if name == "saturation" and channels == 1:
            continue
        got = images.clone()
        mix_(got, share, of_mean, of_gray)
        expected = getattr(tv, f"adjust_{name}")(images, factor)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_color_jitter_in_all_orders():
    """Every order has three samples: with color jitter, with jitter except hue, without color jitter."""
    order = np.repeat(np.arange(24), 3)
    generator = np.random.default_rng(0)
    factors = generator.uniform([0, 0, 0, -0.5], [2, 2, 2, 0.5], (72, 4)).astype(np.float32)
    factors[1::3, 3] = 0
    jitter = np.arange(72) % 3 < 2
    shuffled = generator.permutation(72)
    order, factors, jitter = order[shuffled], factors[shuffled], jitter[shuffled]
    groups = jitter_groups(jitter, order, factors[:, 3])
    rows = np.argsort(groups, kind="stable")
    images = pixels(72)
    got = images[rows].clone()
    jitter_(got, groups[rows], order[rows], factors[rows])
    for view, row in zip(got, rows, strict=True):
        expected = images[row]
        for part in JITTER_ORDERS[order[row]] if jitter[row] else ():
            name = ("brightness", "contrast", "saturation", "hue")[part]
            expected = getattr(tv, f"adjust_{name}")(expected, float(factors[row, part]))
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_a_batch_without_color_jitter_does_not_change():
    images = pixels(3)
    got = images.clone()
    groups = jitter_groups(np.zeros(3, bool), np.zeros(3, np.int64), np.ones(3, np.float32))
    jitter_(got, groups, np.zeros(3, np.int64), np.full((3, 4), 0.5, np.float32))
    assert torch.equal(got, images)


def test_gray():
    images = pixels(3)
    got = images.clone()
    gray_(got)
    torch.testing.assert_close(got, tv.rgb_to_grayscale(images, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_solarize(threshold, channels):
    images = pixels(3, channels)
    images[:, :, 6] = threshold
    got = images.clone()
    solarize_(got, threshold)
    assert torch.equal(got, tv.solarize(images, threshold))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("side", "kernel"), [(5, 9), (16, 1), (32, 3), (32, 23), (33, 9), (64, 5), (96, 9), (100, 41)]
)
def test_blur_equals_torchvision(side, kernel, channels):
    """There are one or several tiles, some of them narrow, and kernels across tiles and across the image."""
    images = torch.rand(6, channels, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.1, 2.0, 6.0])
    got = images.clone()
    blur_(got, sigma, kernel)
    for view, image, one in zip(got, images, sigma.tolist(), strict=True):
        expected = tv.gaussian_blur(image, [kernel, kernel], [one, one])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_weights_of_the_blur_sum_to_one_and_are_never_denormal():
    weights = gaussian_weights(torch.linspace(0.1, 3, 500), 11)
    torch.testing.assert_close(2 * weights.sum(1) - weights[:, 0], torch.ones(500))
    assert weights[weights > 0].min() > 1e-21
    assert (weights.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [1, 2, 15, 16])
def test_quarter_turns_are_exact_and_counterclockwise(side, channels):
    images = torch.rand(5, channels, side, side, generator=torch.Generator().manual_seed(0))
    got = images.clone()
    quarter_turns_(got, np.array([1, 3, 2, 1, 3], np.float32))
    for view, image, turns in zip(got, images, (1, 3, 2, 1, 3), strict=True):
        assert torch.equal(view, tv.rotate(image, 90.0 * turns))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [15, 32])
def test_a_rotation_equals_torchvision_inside_and_mirrors_the_edges(side, channels):
    images = pixels(8, channels, side)
    degrees = np.array([1, 12.5, 30, 45, 90, 180, 271, 359.5], np.float32)
    got = images.clone()
    rotate_(got, degrees)
    for view, image, one in zip(got, images, degrees.tolist(), strict=True):
        constant = tv.rotate(image, one, InterpolationMode.BILINEAR)
        inside = tv.rotate(torch.ones(1, side, side), one, InterpolationMode.BILINEAR)[0] > 1 - 1e-4
        torch.testing.assert_close(view[:, inside], constant[:, inside], rtol=0, atol=1e-5)
        mirrored = tv.rotate(
            tv.pad(image, [side] * 4, padding_mode="symmetric"), one, InterpolationMode.BILINEAR
        )
        torch.testing.assert_close(view, tv.center_crop(mirrored, [side, side]), rtol=0, atol=1e-5)


def test_a_rotation_of_2_by_2_pixels_by_hand():
    """At 45 degrees, the top left pixel has the value above the center, which is that of the top edge."""
    image = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    rotate_(image, np.array([45], np.float32))
    torch.testing.assert_close(image, torch.tensor([[[[0.5, 2.5], [1.0, 3.0]]]]))
