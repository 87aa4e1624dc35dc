# SPDX-License-Identifier: Apache-2.0
"""Transparent pixels of all depths are blended with white. `data.value_range` does not change opacity."""

import io
import struct

import numpy as np
import PIL.Image
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


KEY = 4
"""The transparent gray value of the files below."""


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_gray_value_of_png_files(bits):
    """Pillow 13.0 scales the pixels of 2 and 4 bits, but not this value. It returns no opacity of 16 bits."""
    white = 2**bits - 1
    key = min(KEY, white)
    values = np.array([[0, key, white, white // 2]], np.uint16 if bits == 16 else np.uint8)
    content = png(values, bits=bits if bits < 8 else None, before=[(b"tRNS", struct.pack(">H", key))])
    wanted = np.where(values == key, 255, np.rint(values * (255 / white)))
    opened = stored_image(PIL.Image.open(io.BytesIO(content))).read()
    for data in (content, opened):
        assert decode(data, 1).tolist() == [wanted.tolist()]
    if bits == 16:
        assert decode(content, 1, (0, 8)).tolist() == [[[0, 255, 255, 255]]]


@needs_extra
def test_the_transparent_color_of_png_files_of_16_bits():
    """Pillow 13.0 compares the transparent color with the upper 8 bits of the pixels."""
    values = np.array([[[300, 0, 0], [301, 0, 0], [65535, 0, 0]]], np.uint16)
    content = png(values, before=[(b"tRNS", struct.pack(">HHH", 300, 0, 0))])
    opened = stored_image(PIL.Image.open(io.BytesIO(content))).read()
    for data in (content, opened):
        assert pixels(data) == [[[255] * 3, [1, 0, 0], [255, 0, 0]]]
    assert pixels(content, (0, 602)) == [[[255] * 3, [128, 0, 0], [255, 0, 0]]]


@needs_extra
def test_opacity_in_tiff_files():
    values = np.array([[[0, 255], [255, 255], [200, 0], [100, 128]]], np.uint8)
    # White is 0: the opacity keeps its meaning.
    assert pixels(tiff(values, photometric=0, extra=[2])) == [[[255] * 3, [0] * 3, [255] * 3, [205] * 3]]
    # The colors were multiplied by the opacity.
    values = np.array([[[100, 50, 0, 255], [100, 50, 0, 128], [0, 0, 0, 0]]], np.uint16) * 257
    wanted = [[[100, 50, 0], [227, 177, 127], [255, 255, 255]]]
    for planar in (False, True):
        for numbers in (values, (values // 257).astype(np.uint8), (values / 65535).astype(np.float32)):
            shown = np.array(pixels(tiff(numbers, photometric=2, extra=[1], planar=planar)))
            assert np.abs(shown - wanted).max() <= 1
    signed = tiff(values.astype(np.int32), photometric=2, extra=[1])
    with pytest.raises(BrokenImage, match=mentions("opacity", "int32")):
        decode(signed, 3)


@pytest.mark.parametrize("mode", ["RGBa", "La", "P"])
def test_images_of_pillow_with_opacity_in_other_modes(mode):
    half = PIL.Image.new("LA", (1, 1), (100, 128))
    image = half.convert("La") if mode == "La" else half.convert("RGBA").convert("RGBa")
    if mode == "P":
        image = PIL.Image.new("P", (1, 1))
        image.putpalette([100, 100, 100, 128], "RGBA")
    for channels in (1, 3):
        assert (decode(image, channels).int() - 177).abs().max() <= 1
