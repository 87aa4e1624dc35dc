# SPDX-License-Identifier: Apache-2.0
"""Transparent pixels of all depths are blended with white. `data.value_range` does not change opacity."""

import numpy as np
import pytest
from image_files import png, tiff
from messages import mentions

from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, stored_image
from hf_ssl.data.readers import can_read_all
from hf_ssl.data.value_range import report_values

needs_extra = pytest.mark.skipif(not can_read_all(), reason="needs the extra scientific")
HALF = {"uint16": 32768, "float32": 0.5, "int32": 128}
WHITE = {"uint16": 65535, "float32": 1, "int32": 255}


def pixels(data, value_range=None):
    """Return the pixels (H, W, 3)."""
    return decode(data, 3, value_range).permute(1, 2, 0).tolist()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("colors", [1, 3])
def test_the_range_of_the_colors_does_not_change_opacity(dtype, colors):
    middle, low, high = [10] * colors, [0] * colors, [20] * colors
    opaque, half = WHITE[dtype], HALF[dtype]
    values = np.array([[[*middle, opaque], [*high, half], [*low, half], [*low, 0]]], dtype)
    wanted = [[[128] * 3, [255] * 3, [127] * 3, [255] * 3]]
    assert pixels(stored_image(values).read(), (0, 20)) == wanted
    if not can_read_all():
        return
    if dtype == "uint16":
        assert pixels(png(values), (0, 20)) == wanted
    if dtype != "int32":
        content = tiff(values, photometric=2 if colors == 3 else 1, extra=[2])
        assert pixels(content, (0, 20)) == wanted
        assert report_values([EncodedImage(content, None)], (0, 20), "images").found == (0, 20)


def test_opacity_outside_of_its_limits_is_an_error():
    values = np.array([[[10, 10, 10, 1000]]], np.int32)
    with pytest.raises(BrokenImage, match=mentions("opacity", 255, 1000)):
        decode(stored_image(values).read(), 3, (0, 20))


@needs_extra
def test_opaque_images_that_would_be_dark_are_reported(caplog):
    values = np.full((2, 2, 4), 4000, np.uint16)
    values[..., 3] = 65535
    assert report_values([EncodedImage(png(values), None)], None, "opaque").found == (4000, 4000)
    assert "data.value_range" in caplog.text


@needs_extra
def test_images_of_8_bits_have_no_range_even_if_only_the_extra_reads_them():
    values = np.array([[[7, 255], [200, 255]]], np.uint8)
    content = tiff(values, extra=[2], planar=True)
    assert pixels(content, (0, 100)) == [[[7] * 3, [200] * 3]]
    assert report_values([EncodedImage(content, None)], None, "gray") is None
