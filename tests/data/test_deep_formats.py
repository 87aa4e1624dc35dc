# SPDX-License-Identifier: Apache-2.0
"""JPEG XL, AVIF and HEIC files of more than 8 bits per channel, and rotated JPEG XL files.

libjxl wrote the JPEG XL files below from pictures of these tests.
"""

import base64
import io
import sys

import numpy as np
import PIL.features
import PIL.Image
import pytest
import torch
from image_files import JPEGXL_GRAY12, JPEGXL_RGB16
from messages import mentions

from hf_ssl.data import formats
from hf_ssl.data.decode import BrokenImage, EncodedImage, ImageObject, decode, size_in_header
from hf_ssl.data.formats import has_further_pages
from hf_ssl.data.headers import JpegxlHeader, avif_header, jpegxl_header
from hf_ssl.data.readers import can_read_all
from hf_ssl.data.value_range import report_values

_BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
RGB12 = bytes.fromhex("ff0a00101850b4080804010038004b188b15c26902f7011cd57cff07")
"""One pixel: 0, 100, 4095 of 12 bits."""
FLOAT = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a000000286a786c63ff0a00107200458b0804010048004b188b15c202097ce0080000a01f00000000"
)
"""One pixel: 0, 0.25, 2."""
TURNED = bytes.fromhex(f"{_BOXES}000000256a786c63ff0a00700b041497040802010038004b188b15c249411e4044fffefb01")
"""A red pixel above a blue one, stored side by side with the orientation 6."""

GRAY_ALPHA16 = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a0000002e6a786c63ff0a000006e047f00350dc0808"
    "08100050004b188b15428a06b1a163c8db7c00e0f9ff53ff3f"
)
"""4 x 1 pixels of gray: 0, 100, 4095 and 65535. Only the last pixel is transparent."""
ANIMATED = bytes.fromhex(
    "ff0a00104113008809080201002c004b188b15c249411e40a43f080205002c004b188b15c249411e40d41f"
)
"""One pixel, first red, then blue."""
PREMULTIPLIED = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a000000296a786c63ff0a0070fc087ea00408081000"
    "48004b188b15428a04301e600f4246daffbf7e3f"
)
"""Two pixels of the color 100, 50, 0 of 255: opaque and half transparent. The file contains colors that are
multiplied by the opacity."""
CMYK = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a000000236a786c63ff0a0010208a1f900808100034004b188b15c24942e50144f64f00"
)
CROPPED = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAAElbWV0YQAAAAAAAAAoaGRscgAAAAAAAAAAcGljdAAAAA"
    "AAAAAAAAAAAGxpYmF2aWYAAAAADnBpdG0AAAAAAAEAAAAeaWxvYwAAAABEAAABAAEAAAABAAABTQAAAFcAAAAoaWlu"
    "ZgAAAAAAAQAAABppbmZlAgAAAAABAABhdjAxQ29sb3IAAAAAnWlwcnAAAAB8aXBjbwAAABRpc3BlAAAAAAAAABAAAA"
    "AMAAAAEHBpeGkAAAAAAwgICAAAAAxhdjFDgSAAAAAAABNjb2xybmNseAABAA0AAIAAAAAoY2xhcAAAAAoAAAABAAAA"
    "CAAAAAEAAAABAAAAAQAAAAAAAAABAAAACWlyb3QBAAAAGWlwbWEAAAAAAAAAAQABBgECgwSFhgAAAF9tZGF0EgAKCD"
    "gM/thAQ0AIMkkQAAA5ULskd9TvurVnNa6X/h/R40t3cu2abt7l6tgxqQMjwycfJ85wZEr1oeXD4vdB1Wp+ff/wdNn0PiR5crjWTpefhTkY4Ddm"
)
"""An AVIF file of libavif. Its clean aperture is 10 x 8 blue pixels. The others are red. It is rotated by 90
degrees."""

needs_extra = pytest.mark.skipif(not can_read_all(), reason="needs the extra scientific")
RED_ABOVE_BLUE = [[[255], [0]], [[0], [0]], [[0], [255]]]

needs_jxl = pytest.mark.skipif(".jxl" not in formats.READABLE, reason="needs pillow-jxl-plugin")
needs_heif = pytest.mark.skipif(".heic" not in formats.READABLE, reason="needs pillow-heif")
needs_avif = pytest.mark.skipif(not PIL.features.check("avif"), reason="needs a Pillow with AVIF")


def exif(orientation):
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def values_of(data, low, high):
    return decode(data, 3, (low, high)).permute(1, 2, 0).tolist()


@needs_jxl
def test_colors_of_more_than_8_bits_use_the_range():
    """pillow-jxl-plugin 1.3 returns their upper 8 bits."""
    assert values_of(JPEGXL_RGB16, 0, 4095) == [[[0, 6, 255]], [[255, 19, 0]]]
    assert values_of(RGB12, 0, 200) == [[[0, 128, 255]]]
    assert values_of(RGB12, 0, 4095) == decode(RGB12, 3).permute(1, 2, 0).tolist() == [[[0, 6, 255]]]
    assert values_of(FLOAT, 0, 2) == [[[0, 32, 255]]]


@needs_jxl
def test_gray_of_12_bits_has_its_own_numbers():
    """pillow-jxl-plugin 1.3 scales them to 16 bits."""
    assert decode(JPEGXL_GRAY12, 1).tolist() == [[[0, 6, 255], [255, 0, 6]]]
    assert decode(JPEGXL_GRAY12, 1, (0, 200)).tolist() == [[[0, 128, 255], [255, 0, 128]]]
    found = report_values([EncodedImage(JPEGXL_GRAY12, None)], None, "these images")
    assert found.found == (0, 4095) and found.limits == (0, 4095)


@needs_jxl
def test_the_message_about_an_opened_file_says_what_to_do():
    with pytest.raises(BrokenImage, match=mentions("path or the bytes")):
        decode(PIL.Image.open(io.BytesIO(JPEGXL_RGB16)), 3, (0, 4095))


@needs_jxl
@pytest.mark.parametrize("orientation", [None, 1, 6, 8])
def test_exif_data_do_not_rotate_jpeg_xl_again(orientation):
    """pillow-jxl-plugin 1.3 returns rotated pixels and the orientation in the EXIF data."""
    data = TURNED
    if orientation is not None:
        content = b"\0\0\0\0" + exif(orientation).removeprefix(b"Exif\0\0")
        data += (len(content) + 8).to_bytes(4, "big") + b"Exif" + content
        assert PIL.Image.open(io.BytesIO(data)).getexif().get(0x0112) == orientation
    assert decode(data, 3).tolist() == RED_ABOVE_BLUE
    assert size_in_header(EncodedImage(data, None)) == (2, 1)
    assert size_in_header(ImageObject(PIL.Image.open(io.BytesIO(data)))) == (2, 1)


@needs_jxl
def test_a_jpeg_file_inside_of_jpeg_xl_is_rotated_once():
    codecs = pytest.importorskip("imagecodecs")
    file = io.BytesIO()
    image = PIL.Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    image.save(file, "JPEG", exif=exif(6))
    data = bytes(codecs.jpegxl_encode_jpeg(file.getvalue()))
    assert PIL.Image.open(io.BytesIO(data)).size == (32, 16)  # not rotated
    pixels = decode(data, 3)
    assert pixels.shape == (3, 32, 16) and pixels[0, 4, 4] > 200 and pixels[2, 28, 4] > 200
    assert size_in_header(EncodedImage(data, None)) == (32, 16)


@pytest.mark.parametrize(
    ("file", "header"),
    [
        (JPEGXL_RGB16, JpegxlHeader(16)),
        (RGB12, JpegxlHeader(12)),
        (JPEGXL_GRAY12, JpegxlHeader(12)),
        (FLOAT, JpegxlHeader(32, True)),
        (TURNED, JpegxlHeader(8)),
        (GRAY_ALPHA16, JpegxlHeader(16)),
        (ANIMATED, JpegxlHeader(is_animated=True)),
        (PREMULTIPLIED, JpegxlHeader(16, is_premultiplied=True)),
        (CMYK, JpegxlHeader(has_black=True)),
    ],
)
def test_headers_of_jpeg_xl(file, header):
    assert jpegxl_header(memoryview(file)) == header


@needs_avif
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_avif(bits, channels):
    """Pillow 12.3 returns 8 bits."""
    codecs = pytest.importorskip("imagecodecs")
    values = np.zeros((16, 16, channels), np.uint8 if bits == 8 else np.uint16)
    values[:8], values[:, 8:] = 100, 200
    values[..., 3:] = 2**bits - 1
    data = bytes(
        codecs.avif_encode(values[..., 0] if channels == 1 else values, level=100, bitspersample=bits)
    )
    assert avif_header(memoryview(data)).bits == bits
    low, middle, high = (0, 100, 200) if bits == 8 else (0, 128, 255)
    found = decode(data, 1, (0, 200))[0]
    assert found[4, 4] == middle and found[4, 12] == found[12, 12] == high and found[12, 4] == low
    plain = decode(data, 1)[0, 4, 4]
    assert abs(int(plain) - 100 * 255 / (2**bits - 1)) <= 1


@needs_avif
def test_avif_is_rotated_in_both_readers():
    """imagecodecs does not rotate the pixels."""
    codecs = pytest.importorskip("imagecodecs")
    file = io.BytesIO()
    PIL.Image.new("RGB", (32, 16)).save(file, "AVIF", exif=exif(6))
    assert codecs.avif_decode(file.getvalue()).shape == (16, 32, 3)
    assert decode(file.getvalue(), 3).shape == (3, 32, 16)
    assert size_in_header(EncodedImage(file.getvalue(), None)) == (32, 16)


@needs_heif
@pytest.mark.parametrize(("mode", "channels"), [("I;16", 1), ("RGB;16", 3), ("RGBA;16", 4)])
def test_heic_of_10_bits(mode, channels):
    """pillow-heif 1.8 returns 8 bits of colors, and shifts gray to 16 bits."""
    import pillow_heif

    values = np.zeros((16, 16, channels), np.uint16)
    values[:8], values[:, 8:] = 100, 200
    values[..., 3:] = 1023
    kinds = {"chroma": 444} if channels == 1 else {"chroma": 444, "matrix_coefficients": 0}
    file = io.BytesIO()
    pillow_heif.from_bytes(mode, (16, 16), (values << 6).tobytes()).save(file, quality=-1, **kinds)
    found = decode(file.getvalue(), 1, (0, 200))[0]
    assert found[4, 4] == 128 and found[4, 12] == found[12, 12] == 255 and found[12, 4] == 0
    assert abs(int(decode(file.getvalue(), 1)[0, 4, 4]) - 25) <= 1
    report = report_values([EncodedImage(file.getvalue(), None)], None, mode)
    assert report.limits == (0, 1023) and report.found[0] == 0 and report.found[1] in (200, 1023)


@needs_jxl
@needs_extra
def test_jpeg_xl_files_whose_pixels_the_plugin_changes():
    """pillow-jxl-plugin 1.3 returns wrong numbers of gray with opacity, and the last frame of animations."""
    assert decode(GRAY_ALPHA16, 1).tolist() == [[[0, 0, 16, 255]]]
    assert decode(GRAY_ALPHA16, 1, (0, 200)).tolist() == [[[0, 128, 255, 255]]]
    for value_range in (None, (0, 4095)):
        assert decode(ANIMATED, 3, value_range).flatten().tolist() == [255, 0, 0]
    assert decode(PREMULTIPLIED, 3).permute(1, 2, 0).tolist() == [[[100, 50, 0], [227, 177, 127]]]
    assert has_further_pages(ANIMATED) and not has_further_pages(GRAY_ALPHA16)
    with pytest.raises(BrokenImage, match=mentions("0 to 2", "data.value_range")):
        decode(FLOAT, 3)  # the plug-in would clip the values


@needs_jxl
def test_messages_about_jpeg_xl_files_that_are_not_read_say_what_to_do(monkeypatch):
    with pytest.raises(BrokenImage, match=mentions("CMYK", "RGB")):
        decode(CMYK, 3)
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    for data in (GRAY_ALPHA16, ANIMATED, PREMULTIPLIED, FLOAT):
        with pytest.raises(BrokenImage, match=mentions("JPEG XL", "hf_ssl[scientific]")):
            decode(data, 3)


@needs_avif
def test_avif_files_show_their_clean_aperture():
    """Pillow 13.0 returns the whole image."""
    opened = PIL.Image.open(io.BytesIO(CROPPED))
    for data in (CROPPED, opened, opened):
        pixels = decode(data, 3)
        assert pixels.shape == (3, 10, 8) and pixels[2].min() > 250 and pixels[0].max() < 5
    assert size_in_header(EncodedImage(CROPPED, None)) == (10, 8)
    assert size_in_header(ImageObject(PIL.Image.open(io.BytesIO(CROPPED)))) == (10, 8)


@needs_avif
@needs_extra
def test_an_opened_avif_file_of_10_bits_has_the_pixels_of_its_bytes():
    codecs = pytest.importorskip("imagecodecs")
    data = bytes(codecs.avif_encode(np.full((16, 16, 3), 513, np.uint16), level=100, bitspersample=10))
    opened = PIL.Image.open(io.BytesIO(data))
    for _ in range(2):
        assert torch.equal(decode(opened, 3, (512, 520)), decode(data, 3, (512, 520)))
    opened.load()
    assert torch.equal(decode(opened, 3, (512, 520)), decode(data, 3))  # Pillow has 8 bits


@needs_avif
@needs_extra
def test_an_avif_animation_of_10_bits_is_not_read_with_a_range():
    codecs = pytest.importorskip("imagecodecs")
    frames = np.zeros((2, 16, 16, 3), np.uint16)
    frames[0] = 1023
    data = bytes(codecs.avif_encode(frames, level=100, bitspersample=10))
    assert decode(data, 3).min() > 250
    with pytest.raises(BrokenImage, match=mentions("AVIF", "frame")):
        decode(data, 3, (0, 1023))
