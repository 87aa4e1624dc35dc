# SPDX-License-Identifier: Apache-2.0
"""Color spaces equal the stored results of scikit-image, and the gradient magnitude equals a loop."""

import math

import numpy as np
import pytest
import torch
from messages import mentions
from methods.authors import stored

from hf_ssl.views import COLOR_SPACES, gradient_magnitude, to_color_space
from hf_ssl.views.color_spaces import linear_map

CASES = stored()["colors"]
STORED = [space for space in COLOR_SPACES if space in CASES and space != "rgb"]


def pixels(*shape, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def stored_colors():
    """Return the colors of the stored cases as an image (3, 1, N)."""
    return torch.tensor(CASES["rgb"], dtype=torch.float64).T[:, None] / 255


def test_three_color_spaces_have_stored_cases():
    assert STORED == ["lab", "ydbdr", "ycbcr"]


@pytest.mark.parametrize("space", STORED)
def test_colors_and_statistics_equal_those_of_the_authors(space):
    case, found = CASES[space], COLOR_SPACES[space]
    assert found.mean == pytest.approx(case["mean"], rel=1e-12)
    assert found.std == pytest.approx(case["std"], rel=1e-12)
    expected = torch.tensor(case["values"], dtype=torch.float64)
    torch.testing.assert_close(to_color_space(stored_colors(), space)[:, 0].T, expected, rtol=0, atol=1e-9)
    low = to_color_space(stored_colors().float(), space)[:, 0].T.double()
    torch.testing.assert_close(low, expected, rtol=1e-6, atol=2e-4)  # Lab subtracts numbers near 500


def test_lab_equals_a_loop_over_pixels():
    def slow(color):
        lights = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in color]
        rows = ((0.412453, 0.35758, 0.180423), (0.212671, 0.71516, 0.072169), (0.019334, 0.119193, 0.950227))
        xyz = [sum(map(math.prod, zip(row, lights, strict=True))) for row in rows]
        xyz = [value / white for value, white in zip(xyz, (0.95047, 1.0, 1.08883), strict=True)]
        x, y, z = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz]
        return [116 * y - 16, 500 * (x - y), 200 * (y - z)]

    images = pixels(2, 3, 4, 5) ** 3  # many dark colors
    found = to_color_space(images, "lab")
    for n, h, w in np.ndindex(2, 4, 5):
        assert found[n, :, h, w].tolist() == pytest.approx(slow(images[n, :, h, w].tolist()), abs=1e-9)


@pytest.mark.parametrize("space", COLOR_SPACES)
def test_linear_color_spaces_are_declared(space):
    first, second = pixels(2, 3, 6, 7)
    half = to_color_space((first + second) / 2, space)
    is_linear = torch.allclose(
        half, (to_color_space(first, space) + to_color_space(second, space)) / 2, atol=1e-12
    )
    assert is_linear == COLOR_SPACES[space].is_linear == (space != "lab")


@pytest.mark.parametrize("space", COLOR_SPACES)
def test_shapes_types_and_groups(space):
    found = COLOR_SPACES[space]
    assert sum(found.groups) == len(found.channels) == 3
    image = pixels(3, 5, 6, dtype=torch.float32)
    assert to_color_space(image, space).dtype == torch.float32
    together = to_color_space(image.expand(2, 4, 3, 5, 6), space)
    torch.testing.assert_close(together[1, 2], to_color_space(image, space))


@pytest.mark.parametrize("space", COLOR_SPACES)
def test_values_outside_of_the_range_are_finite(space):
    wide = 3 * pixels(3, 20, 20) - 1
    assert to_color_space(wide, space).isfinite().all()


def test_gradient_magnitude_equals_a_loop_over_pixels():
    images = pixels(2, 3, 4, 5)
    found = gradient_magnitude(images)
    assert found.shape == (2, 1, 4, 5)
    light = 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    for n, h, w in np.ndindex(2, 4, 5):
        across = (light[n, h, min(w + 1, 4)] - light[n, h, max(w - 1, 0)]) / 2
        down = (light[n, min(h + 1, 3), w] - light[n, max(h - 1, 0), w]) / 2
        assert found[n, 0, h, w].item() == pytest.approx(math.hypot(across, down), abs=1e-12)


def test_the_gradient_of_a_ramp_is_its_slope():
    ramp = torch.arange(6, dtype=torch.float64).expand(3, 5, 6) * 0.1
    inner = gradient_magnitude(ramp)[0, :, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.1))
    assert not gradient_magnitude(torch.full((3, 1, 1), 0.7)).any()


def test_linear_map_leaves_out_zeros_and_keeps_the_number_of_rows():
    image = pixels(3, 2, 2)
    found = linear_map(image, ((0, 0, 0), (0, 2, 0)), (0, 1))
    torch.testing.assert_close(found, torch.stack([torch.zeros(2, 2).double(), 2 * image[1] + 1]))


@pytest.mark.parametrize("function", [lambda x: to_color_space(x, "lab"), gradient_magnitude])
@pytest.mark.parametrize("image", [torch.rand(1, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_images_without_three_channels_and_bytes_are_errors(function, image):
    with pytest.raises(ValueError, match=mentions("rgb", "(..., 3, height, width)", image.dtype)):
        function(image)


def test_an_unknown_color_space_is_an_error():
    with pytest.raises(ValueError, match=mentions("space", "ydbdr", "hsv")):
        to_color_space(torch.rand(3, 2, 2), "hsv")
