# SPDX-License-Identifier: Apache-2.0
"""JPEG XL, AVIF and HEIC files of more than 8 bits per channel, and rotated JPEG XL files.

libjxl wrote the JPEG XL files below from pictures of these tests.
"""

import io

import numpy as np
import PIL.features
import PIL.Image
import pytest
from messages import mentions

from hf_ssl.data import formats
from hf_ssl.data.decode import BrokenImage, EncodedImage, ImageObject, decode, size_in_header
from hf_ssl.data.headers import Depth, avif_depth, jpegxl_depth
from hf_ssl.data.value_range import report_values

_BOXES = "0000000c4a584c200d0a870a00000014667479706a786c20000000006a786c20"
RGB16 = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a0000002f6a786c63ff0a080000e007a0b810080201005c004b188b15420ad8388042f30144904266"
    "f3fb0b1c0fee0f"
)
"""2 x 1 pixels: 0, 100, 4095 and 65535, 300, 7."""
RGB12 = bytes.fromhex("ff0a00101850b4080804010038004b188b15c26902f7011cd57cff07")
"""One pixel: 0, 100, 4095 of 12 bits."""
GRAY12 = bytes.fromhex("ff0a084018142d020804010044004b188b15c26936c23492cd237dfdef4f01")
"""2 x 3 pixels: 0, 100, 4095 and 4095, 0, 100."""
FLOAT = bytes.fromhex(
    f"{_BOXES}000000096a786c6c0a000000286a786c63ff0a00107200458b0804010048004b188b15c202097ce0080000a01f00000000"
)
"""One pixel: 0, 0.25, 2."""
TURNED = bytes.fromhex(f"{_BOXES}000000256a786c63ff0a00700b041497040802010038004b188b15c249411e4044fffefb01")
"""A red pixel above a blue one, stored side by side with the orientation 6."""

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
    assert values_of(RGB16, 0, 4095) == [[[0, 6, 255]], [[255, 19, 0]]]
    assert values_of(RGB12, 0, 200) == [[[0, 128, 255]]]
    assert values_of(RGB12, 0, 4095) == decode(RGB12, 3).permute(1, 2, 0).tolist() == [[[0, 6, 255]]]
    assert values_of(FLOAT, 0, 2) == [[[0, 32, 255]]]


@needs_jxl
def test_gray_of_12_bits_has_its_own_numbers():
    """pillow-jxl-plugin 1.3 scales them to 16 bits."""
    assert decode(GRAY12, 1).tolist() == [[[0, 6, 255], [255, 0, 6]]]
    assert decode(GRAY12, 1, (0, 200)).tolist() == [[[0, 128, 255], [255, 0, 128]]]
    found = report_values([EncodedImage(GRAY12, None)], None, "these images")
    assert found.found == (0, 4095) and found.limits == (0, 4095)


@needs_jxl
def test_an_opened_file_of_colors_names_what_to_do():
    with pytest.raises(BrokenImage, match=mentions("path or the bytes")):
        decode(PIL.Image.open(io.BytesIO(RGB16)), 3, (0, 4095))


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
    ("file", "depth"),
    [
        (RGB16, Depth(16)),
        (RGB12, Depth(12)),
        (GRAY12, Depth(12)),
        (FLOAT, Depth(32, True)),
        (TURNED, Depth(8)),
    ],
)
def test_headers_of_jpeg_xl(file, depth):
    assert jpegxl_depth(memoryview(file)) == depth


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
    assert avif_depth(memoryview(data)).bits == bits
    low, middle, high = (0, 100, 200) if bits == 8 else (0, 128, 255)
    found = decode(data, 1, (0, 200))[0]
    assert found[4, 4] == middle and found[4, 12] == found[12, 12] == high and found[12, 4] == low
    plain = decode(data, 1)[0, 4, 4]
    assert abs(int(plain) - 100 * 255 / (2**bits - 1)) <= 1


@needs_avif
def test_avif_is_rotated_in_both_readers():
    """imagecodecs returns pixels that are not rotated, like Pillow before it reads the orientation."""
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
