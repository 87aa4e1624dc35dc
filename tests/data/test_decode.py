# SPDX-License-Identifier: Apache-2.0
import io
import struct
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch
from image_files import png
from messages import mentions
from transformers import BitImageProcessor

from hf_ssl.data import decode as decode_module
from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, size_in_header, stored_image
from hf_ssl.data.plain_headers import plain_shape

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchvision and Pillow

PROCESSOR = BitImageProcessor(
    do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, do_convert_rgb=True
)


def as_processor(data):
    """Return the pixels that a user gives to the exported encoder.

    transformers 5.20 drops transparency, so the user first lays it over white, as the card states. Later
    releases do this themselves.
    """
    with PIL.Image.open(data) as image:
        if version("transformers").startswith("5.20.") and image.has_transparency_data:
            white = PIL.Image.new("RGBA", image.size, "white")
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        return PROCESSOR(image, return_tensors="pt")["pixel_values"][0]


def smooth(mode="RGB"):
    """Return an image that JPEG changes little, in a mode of Pillow; transparent in places if possible."""
    y, x = np.mgrid[:40, :50]
    pixels = np.stack([5 * x, 6 * y, 2 * x + 3 * y, np.where(x > 25, 255, 90)], -1).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


FILES = {
    "rgb_png": ("RGB", "PNG", {}),
    "rgb_jpeg": ("RGB", "JPEG", {"quality": 90}),
    "rgb_coded_jpeg": ("RGB", "JPEG", {"keep_rgb": True}),
    "rgb_progressive_jpeg": ("RGB", "JPEG", {"progressive": True}),
    "rgb_webp": ("RGB", "WEBP", {}),
    "rgb_lossless_webp": ("RGB", "WEBP", {"lossless": True}),
    "gray_png": ("L", "PNG", {}),
    "gray_jpeg": ("L", "JPEG", {}),
    "one_bit_png": ("1", "PNG", {}),
    "gray_alpha_png": ("LA", "PNG", {}),
    "palette_png": ("P", "PNG", {}),
    "palette_gif": ("P", "GIF", {}),
    "transparent_palette_png": ("P", "PNG", {"transparency": 7}),
    "transparent_color_png": ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    "rgba_png": ("RGBA", "PNG", {}),
    "rgba_webp": ("RGBA", "WEBP", {"lossless": True}),
    "cmyk_jpeg": ("CMYK", "JPEG", {}),
    "cmyk_tiff": ("CMYK", "TIFF", {}),
    "bmp": ("RGB", "BMP", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_colors_equal_those_of_the_image_processor(name, encode, tmp_path):
    mode, kind, options = FILES[name]
    data = encode(smooth(mode), kind, **options)
    (tmp_path / "file").write_bytes(data)
    pixels = decode(data, 3)
    assert pixels.shape == (3, 40, 50) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, as_processor(tmp_path / "file"))


@pytest.mark.parametrize("name", FILES)
def test_gray_is_the_luma_of_the_colors(name, encode):
    mode, kind, options = FILES[name]
    data = encode(smooth(mode), kind, **options)
    shown = PIL.Image.fromarray(decode(data, 3).permute(1, 2, 0).contiguous().numpy())
    assert torch.equal(decode(data, 1)[0], torch.from_numpy(np.array(shown.convert("L"))))


@pytest.mark.parametrize("name", FILES)
def test_pillow_reads_the_same_pixels_as_torchvision(name, encode, monkeypatch):
    mode, kind, options = FILES[name]
    data = encode(smooth(mode), kind, **options)
    pixels = [decode(data, channels) for channels in (1, 3)]
    monkeypatch.setattr(decode_module, "torchvision_decode", None)
    assert all(torch.equal(decode(data, len(expected)), expected) for expected in pixels)


def test_a_transparent_image_is_laid_over_white(encode):
    image = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode(encode(image), 3).eq(255).all()
    assert decode(encode(PIL.Image.new("LA", (4, 4), (0, 0))), 1).eq(255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_uses_the_whole_range(kind, channels, encode):
    values = np.array([[0, 256, 257], [32768, 65534, 65535]], np.uint16)
    pixels = decode(encode(PIL.Image.fromarray(values), kind), channels)
    expected = np.rint(values * (255 / 65535))
    assert pixels.shape == (channels, 2, 3)
    assert all((channel.numpy() == expected).all() for channel in pixels)


def test_32_bit_integers_of_a_file_are_not_scaled(encode):
    inside = PIL.Image.fromarray(np.array([[0, 7, 255]], np.int32))
    assert decode(encode(inside, "TIFF"), 1).tolist() == [[[0, 7, 255]]]
    outside = encode(PIL.Image.fromarray(np.array([[0, 256]], np.int32)), "TIFF")
    with pytest.raises(BrokenImage, match=mentions(255, 0, 256, "data.value_range")):
        decode(outside, 1)
    assert decode(outside, 1, (0, 256)).tolist() == [[[0, 255]]]


@pytest.mark.parametrize(
    "kept", [np.asarray, torch.from_numpy, PIL.Image.fromarray, lambda pixels: pixels.astype(np.uint8)]
)
def test_32_bit_integers_in_memory_are_not_scaled(kept):
    values = np.array([[0, 100, 255]], np.int32)
    assert decode(stored_image(kept(values)).read(), 1).tolist() == [[[0, 100, 255]]]


def test_tensors_of_bfloat16_are_read():
    values = torch.tensor([[[0, 0.5, 1]]], dtype=torch.bfloat16)
    assert decode(stored_image(values).read(), 1).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("kept", [np.asarray, torch.from_numpy, PIL.Image.fromarray])
def test_floating_point_numbers_in_memory_are_0_to_1(kept):
    values = np.array([[0, 0.4, 1]], np.float32)
    assert decode(stored_image(kept(values)).read(), 1).tolist() == [[[0, 102, 255]]]
    with pytest.raises(BrokenImage, match=mentions(0, 1, "1.5", "data.value_range")):
        decode(stored_image(kept(values + 0.5)).read(), 1)


@pytest.mark.parametrize("kept", [np.asarray, torch.from_numpy, PIL.Image.fromarray])
def test_large_32_bit_integers_in_memory_are_broken(kept):
    with pytest.raises(BrokenImage, match=mentions(255, "int32", "uint16")):
        decode(stored_image(kept(np.array([[0, 256]], np.int32))).read(), 1)


def test_32_bit_integers_of_a_file_are_equal_before_and_after_pillow_opens_it(encode):
    content = encode(PIL.Image.fromarray(np.array([[0, 200, 255]], np.int32)), "TIFF")
    opened = PIL.Image.open(io.BytesIO(content))
    pixels = [decode(stored_image(each).read(), 1).tolist() for each in (content, opened)]
    assert pixels == [[[[0, 200, 255]]]] * 2


def test_floating_point_files_are_0_to_1(encode):
    values = np.array([[0, 0.4, 1]], np.float32)
    assert decode(encode(PIL.Image.fromarray(values), "TIFF"), 1).tolist() == [[[0, 102, 255]]]
    for wrong, word in ((1.5, "floating-point"), (np.nan, "NaN")):
        with pytest.raises(BrokenImage, match=word):
            decode(encode(PIL.Image.fromarray(values * np.float32(wrong)), "TIFF"), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(orientation, kind, encode):
    lossless = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    lossless = {"lossless": True} if kind == "WEBP" else lossless
    image = smooth()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encode(image, kind, exif=exif, **lossless), 3).numpy()
    stored = np.array(image).transpose(2, 0, 1)
    upright = {
        1: stored,
        2: stored[:, :, ::-1],
        3: stored[:, ::-1, ::-1],
        4: stored[:, ::-1],
        5: stored.transpose(0, 2, 1),
        6: stored.transpose(0, 2, 1)[:, :, ::-1],
        7: stored[:, ::-1, ::-1].transpose(0, 2, 1),
        8: stored.transpose(0, 2, 1)[:, ::-1],
    }[orientation]
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() <= (12 if kind == "JPEG" else 0)


ORIENTED = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 0x112, 3, 1, 6, 0x11A, 5, 1, 38) + bytes(4)


BESIDE = {
    "XMP data that are no UTF-8": (b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xa8\xff/>", False),
    "resolution of 72 / 0": (b"Exif\0\0" + ORIENTED + struct.pack("<II", 72, 0), True),
    "a directory that ends too early": (b"Exif\0\0" + ORIENTED[:12], False),
}


@pytest.mark.parametrize("name", BESIDE)
def test_damaged_data_beside_the_pixels_break_no_image(name, encode):
    """Reports 7668 and 8165 of datasets: the first one is an error, and the second one ends a stream."""
    content, turned = BESIDE[name]
    image = encode(PIL.Image.new("RGB", (16, 8), (200, 100, 50)), "JPEG")
    data = image[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + image[2:]
    assert decode(data, 3).shape == ((3, 16, 8) if turned else (3, 8, 16))


def test_an_image_with_damaged_exif_data_is_read(encode):
    data = encode(smooth(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\xff\xff")
    assert decode(data, 3).shape == (3, 40, 50)


PLAIN = ("rgb_jpeg", "rgb_coded_jpeg", "rgb_progressive_jpeg", "rgb_webp", "rgb_lossless_webp", "gray_jpeg")


@pytest.mark.parametrize("name", FILES)
def test_only_plain_files_are_decoded_by_torchvision(name, encode):
    mode, kind, options = FILES[name]
    shape = plain_shape(memoryview(encode(smooth(mode), kind, **options)))
    assert shape == ((1 if mode == "L" else 3, 40, 50) if name in PLAIN else None)


@pytest.mark.parametrize("name", ["rgb_png", "rgb_jpeg", "rgb_webp", "palette_gif", "rgba_png"])
def test_a_truncated_file_is_broken_or_gives_all_pixels(name, encode):
    mode, kind, options = FILES[name]
    data = encode(smooth(mode), kind, **options)
    whole = decode(data, 3)
    broken = 0
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            pixels = decode(data[:length], 3)
        except BrokenImage as error:
            broken += 1
            assert str(error)
        else:
            assert torch.equal(pixels, whole)  # only bytes after the pixels are missing
    assert broken > 50


def test_a_damaged_file_raises_no_other_error(encode):
    generator = np.random.default_rng(0)
    for name in ("rgb_png", "rgb_jpeg", "rgb_webp", "palette_gif", "cmyk_tiff"):
        mode, kind, options = FILES[name]
        data = np.frombuffer(encode(smooth(mode), kind, **options), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[generator.integers(0, len(data), 5)] = generator.integers(0, 256, 5)
            try:
                decode(damaged.tobytes(), 3)
            except BrokenImage:
                pass


def test_the_error_states_the_reason(encode, monkeypatch):
    with pytest.raises(BrokenImage, match="zero bytes"):
        decode(b"", 3)
    with pytest.raises(BrokenImage, match="not an image"):
        decode(b"hello", 3)
    with pytest.raises(BrokenImage, match=mentions("row")):
        EncodedImage(None, None).read()
    with pytest.raises(BrokenImage, match="exist"):
        EncodedImage(None, "/nowhere/image.png").read()
    data = encode(smooth())
    with pytest.raises(BrokenImage, match="truncated"):
        decode(data[: len(data) // 2], 3)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40 * 50 // 3)
    for kind in ("PNG", "BMP"):
        with pytest.raises(BrokenImage, match=mentions("1,332", "tiles")):
            decode(encode(smooth(), kind), 3)


@pytest.mark.parametrize(
    ("name", "reason"), [(".", "cannot be read: Is a directory"), ("none.png", "does not exist")]
)
def test_errors_of_files_have_one_wording(name: str, reason: str, tmp_path: Path) -> None:
    for read in (EncodedImage.read, size_in_header):
        with pytest.raises(BrokenImage, match=f"the file {reason}"):
            read(EncodedImage(None, str(tmp_path / name)))


def test_a_png_file_with_another_checksum_is_broken():
    """Pillow 12.3 returns changed pixels for such files."""
    content = png(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert decode(content, 1).flatten().tolist() == list(range(256))
    start = content.index(b"IDAT") + 4
    for place in (
        start + 20,
        len(content) - 14,
    ):  # in the pixels; in their checksum
        changed = bytearray(content)
        changed[place] ^= 1
        with pytest.raises(BrokenImage):
            decode(bytes(changed), 1)


@pytest.mark.parametrize("lost", range(1, 20))
def test_a_png_file_without_its_last_bytes_is_broken_or_equal(lost):
    content = png(np.arange(256, dtype=np.uint8).reshape(16, 16))
    try:
        pixels = decode(content[:-lost], 1)
    except BrokenImage as error:
        assert lost > 12 and "truncated" in str(error)  # the last chunk is empty, and only marks the end
    else:
        assert lost <= 12 and pixels.flatten().tolist() == list(range(256))
