# SPDX-License-Identifier: Apache-2.0
"""The pixels of files by format, depth and layout, compared with the numbers that an own writer stored.

`tests/image_files.py` writes the files without an image library. `jpeg2000.json` contains JPEG 2000 files of
the same numbers (base64), which imagecodecs 2026.3.6 wrote. If the extra `scientific` is installed, tifffile
and imagecodecs also read the files and must return the stored numbers.

Pillow 12.3 opens the files marked `pillow_is_wrong` without an error and returns other pixels. It cannot open
those marked `unknown_to_pillow`. With the extra, the pixels are right. Without it, the message names the
extra.
"""

import base64
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
from image_files import fits, png, pnm, sgi, tiff
from messages import mentions

from hf_ssl.data.decode import BrokenImage, EncodedImage, decode, size_in_header, stored_image
from hf_ssl.data.photos import read_photo
from hf_ssl.data.readers import can_read_all
from hf_ssl.errors import UserError

SHAPE = (5, 6)
JPEG2000 = {
    name: base64.b64decode(content)
    for name, content in json.loads((Path(__file__).parent / "jpeg2000.json").read_text()).items()
}


def ramp(white: float, dtype: Any = np.uint16) -> np.ndarray:
    """Return 30 gray values from 0 to `white` (H, W). Whole numbers are rounded."""
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE) * (white / (np.prod(SHAPE) - 1))
    return (values if np.dtype(dtype).kind == "f" else np.rint(values)).astype(dtype)


def colors(white: float, dtype: Any = np.uint16, channels: int = 3) -> np.ndarray:
    """Return values from 0 to `white` (H, W, C), with other values in each channel."""
    return np.stack([np.roll(ramp(white, dtype), 7 * number) for number in range(channels)], -1)


def scaled(values: np.ndarray, white: float, black: float = 0) -> np.ndarray:
    """Return the expected pixels."""
    inside = np.clip(values.astype(np.float64), black, white)
    return np.rint((inside - black) * 255 / (white - black))


def over_white(values: np.ndarray, white: float) -> np.ndarray:
    """Return the expected pixels of values whose last channel is the opacity."""
    *shown, opacity = np.moveaxis(values / white, -1, 0)
    return np.rint(255 * np.stack([opacity * each + 1 - opacity for each in shown], -1))


class File(NamedTuple):
    """A file with its expected pixels (H, W) or (H, W, 3).

    Attributes:
        content: the bytes.
        expected: the pixels; None: the file is never read, and the message contains `words`.
        needs_extra: whether the file cannot be read without the extra.
        value_range: the value of `data.value_range`.
        tolerance: largest difference. Pillow returns the upper 8 bits of colors of 16 bits.
        words: part of the message.
        stored: the numbers of the file, up to an offset.
    """

    content: bytes
    expected: np.ndarray | None
    needs_extra: bool = False
    value_range: tuple[float, float] | None = None
    tolerance: int = 0
    words: str = "hf_ssl[scientific]"
    stored: np.ndarray | None = None


def ok(content: bytes, values: np.ndarray, white: float, **options: Any) -> File:
    return File(content, scaled(values, white), stored=values, **options)


def pillow_is_wrong(content: bytes, values: np.ndarray, white: float, **options: Any) -> File:
    return ok(content, values, white, needs_extra=True, **options)


unknown_to_pillow = pillow_is_wrong


def never(content: bytes, words: str, **options: Any) -> File:
    return File(content, None, words=words, **options)


def plain(values: np.ndarray, maximum: int) -> bytes:
    """Return a PGM or PPM file whose numbers are text."""
    height, width = values.shape[:2]
    text = " ".join(map(str, values.flatten()))
    return f"P{2 if values.ndim == 2 else 3} {width} {height} {maximum}\n{text}\n".encode()


def with_box(content: bytes, kind: bytes, form: str, *numbers: int) -> bytes:
    """Return a JPEG 2000 file with a further box in its header."""
    box = struct.pack(">I4s", 8 + struct.calcsize(form), kind) + struct.pack(form, *numbers)
    start = content.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", content, start)
    head = struct.pack(">I", length + len(box)) + content[start + 4 : start + length]
    return content[:start] + head + box + content[start + length :]


def cmyk(content: bytes, bits: int) -> bytes:
    """Return a JPEG 2000 file of four components whose header states CMYK colors of `bits` bits."""
    changed = bytearray(content)
    place = content.index(b"colr") + 7
    changed[place : place + 4] = struct.pack(">I", 12)
    place = content.index(b"\xff\x4f\xff\x51") + 42
    changed[place : place + 12 : 3] = bytes([bits - 1] * 4)
    return bytes(changed)


TWELVE = (0.0, 4095.0)
G8, G12, G16 = ramp(255, np.uint8), ramp(4095), ramp(65535)
C8, C12, C16 = colors(255, np.uint8), colors(4095), colors(65535)
A8, A16 = colors(255, np.uint8, 4), colors(65535, np.uint16, 4)
UNIT, C1 = ramp(1, np.float32), colors(1, np.float32)
FILES = {
    "png_gray_1": ok(png(ramp(1, np.uint8), bits=1), ramp(1, np.uint8), 1),
    "png_gray_2": ok(png(ramp(3, np.uint8), bits=2), ramp(3, np.uint8), 3),
    "png_gray_4": ok(png(ramp(15, np.uint8), bits=4), ramp(15, np.uint8), 15),
    "png_gray_8": ok(png(G8), G8, 255),
    "png_gray_8_with_a_range": ok(png(G8), G8, 255, value_range=TWELVE),
    "png_gray_16": ok(png(G16), G16, 65535),
    "png_gray_16_of_12": ok(png(G12), G12, 65535),
    "png_gray_16_of_12_with_its_range": ok(png(G12), G12, 4095, value_range=TWELVE),
    "png_gray_16_clipped": ok(png(G16), G16, 4095, value_range=TWELVE),
    "png_gray_16_from_1000": File(png(G16), scaled(G16, 3000, 1000), value_range=(1000, 3000)),
    "png_gray_alpha_8": File(png(A8[..., :2]), over_white(A8[..., :2], 255), tolerance=1),
    "png_rgb_8": ok(png(C8), C8, 255),
    "png_rgb_16": ok(png(C16), C16, 65535, tolerance=1),
    "png_rgb_16_with_a_range": unknown_to_pillow(png(C12), C12, 4095, value_range=TWELVE),
    "png_rgba_8": File(png(A8), over_white(A8, 255), tolerance=1),
    "png_rgba_16": File(png(A16), over_white(A16, 65535), tolerance=2),
    "png_palette": ok(png(ramp(29, np.uint8), palette=C8.tobytes()), C8, 255),
    "pgm_8": ok(pnm(G8, 255), G8, 255),
    "pgm_4_states_its_white": ok(pnm(ramp(15, np.uint8), 15), ramp(15), 15),
    "pgm_12_states_its_white": ok(pnm(G12, 4095), G12, 4095),
    "pgm_12_with_a_range": ok(pnm(G12, 4095), G12, 2000, value_range=(0, 2000)),
    "pgm_16": ok(pnm(G16, 65535), G16, 65535),
    "pgm_16_of_12_with_its_range": ok(pnm(G12, 65535), G12, 4095, value_range=TWELVE),
    "ppm_8": ok(pnm(C8, 255), C8, 255),
    "ppm_16": ok(pnm(C16, 65535), C16, 65535, tolerance=1),
    "pgm_12_plain": ok(plain(G12, 4095), G12, 4095),
    "pgm_12_plain_with_a_range": ok(plain(G12, 4095), G12, 2000, value_range=(0, 2000)),
    "ppm_16_plain_with_a_range": never(plain(C16, 65535), "PPM", value_range=TWELVE),
    "ppm_16_with_a_range": never(pnm(C16, 65535), "PPM", value_range=TWELVE),
    "sgi_8": ok(sgi(C8), C8, 255),
    "sgi_16": ok(sgi(C16), C16, 65535, tolerance=1),
    "sgi_16_with_a_range": never(sgi(C16), "SGI", value_range=TWELVE),
    "fits_8": ok(fits(G8), G8, 255),
    "fits_8_with_a_scale": never(fits(G8, zero=100), "FITS"),
    "fits_16": never(fits(ramp(255, np.int16)), "FITS"),
    "fits_16_with_a_scale": never(fits((G16.astype(int) - 32768).astype(np.int16), zero=32768), "FITS"),
    "fits_float32": never(fits(UNIT), "FITS", value_range=(0, 1)),
    "tiff_gray_8": ok(tiff(G8), G8, 255),
    "tiff_gray_8_white_is_0": ok(tiff(G8, photometric=0), 255 - G8, 255),
    "tiff_gray_10": unknown_to_pillow(tiff(ramp(1023), bits=10), ramp(1023), 1023),
    "tiff_gray_12": ok(tiff(G12, bits=12), G12, 4095),
    "tiff_gray_12_big": unknown_to_pillow(tiff(G12, bits=12, order=">"), G12, 4095),
    "tiff_gray_14": unknown_to_pillow(tiff(ramp(16383), bits=14), ramp(16383), 16383),
    "tiff_gray_16": ok(tiff(G16), G16, 65535),
    "tiff_gray_16_big": ok(tiff(G16, order=">"), G16, 65535),
    "tiff_gray_16_deflate": ok(tiff(G16, compress=True), G16, 65535),
    "tiff_gray_16_big_deflate": ok(tiff(G16, order=">", compress=True), G16, 65535),
    "tiff_gray_16_of_12_with_its_range": ok(tiff(G12), G12, 4095, value_range=TWELVE),
    "tiff_gray_16_white_is_0": pillow_is_wrong(tiff(G16, photometric=0), 65535 - G16, 65535),
    "tiff_gray_16_white_is_0_deflate": pillow_is_wrong(
        tiff(G16, photometric=0, compress=True), 65535 - G16, 65535
    ),
    "tiff_gray_16_white_is_0_big": unknown_to_pillow(
        tiff(G16, photometric=0, order=">"), 65535 - G16, 65535
    ),
    "tiff_int8": pillow_is_wrong(tiff(ramp(100, np.int8)), ramp(100), 255),
    "tiff_int8_with_a_range": pillow_is_wrong(
        tiff((ramp(200) - 100).astype(np.int8)), ramp(200), 200, value_range=(-100, 100)
    ),
    "tiff_int16": ok(tiff(ramp(255, np.int16)), ramp(255), 255),
    "tiff_int16_big": ok(tiff(ramp(255, np.int16), order=">"), ramp(255), 255),
    "tiff_int16_big_deflate": pillow_is_wrong(
        tiff(ramp(255, np.int16), order=">", compress=True), ramp(255), 255
    ),
    "tiff_int16_with_a_range": ok(
        tiff((ramp(900) - 300).astype(np.int16)), ramp(900), 900, value_range=(-300, 600)
    ),
    "tiff_int16_without_a_range": never(tiff(ramp(900, np.int16)), "data.value_range"),
    "tiff_int32": ok(tiff(ramp(255, np.int32)), ramp(255), 255),
    "tiff_int32_big_deflate": pillow_is_wrong(
        tiff(ramp(4095, np.int32), order=">", compress=True), G12, 4095, value_range=TWELVE
    ),
    "tiff_int32_with_a_range": ok(tiff(ramp(4095, np.int32)), G12, 4095, value_range=TWELVE),
    "tiff_int32_without_a_range": never(tiff(ramp(4095, np.int32)), "data.value_range"),
    "tiff_uint32": ok(tiff(ramp(255, np.uint32)), ramp(255), 255),
    "tiff_uint32_of_32_bits": ok(
        tiff(ramp(2**32 - 1, np.uint32)), ramp(2**32 - 1, np.uint32), 2**32 - 1, value_range=(0, 2**32 - 1)
    ),
    "tiff_uint32_big": unknown_to_pillow(tiff(ramp(255, np.uint32), order=">"), ramp(255), 255),
    "tiff_int64": unknown_to_pillow(tiff(ramp(255, np.int64)), ramp(255), 255),
    "tiff_float16": unknown_to_pillow(tiff(UNIT.astype(np.float16)), UNIT.astype(np.float16), 1),
    "tiff_float32": ok(tiff(UNIT), UNIT, 1),
    "tiff_float32_big": ok(tiff(UNIT, order=">"), UNIT, 1),
    "tiff_float32_deflate": ok(tiff(UNIT, compress=True), UNIT, 1),
    "tiff_float32_big_deflate": pillow_is_wrong(tiff(UNIT, order=">", compress=True), UNIT, 1),
    "tiff_float32_with_a_range": ok(tiff(UNIT * 40), UNIT * 40, 40, value_range=(0, 40)),
    "tiff_float32_without_a_range": never(tiff(UNIT * 40), "data.value_range"),
    "tiff_float64": unknown_to_pillow(tiff(UNIT.astype(np.float64)), UNIT, 1),
    "tiff_gray_alpha_8": File(tiff(A8[..., :2], extra=[2]), over_white(A8[..., :2], 255), tolerance=1),
    "tiff_gray_alpha_8_planes": File(
        tiff(A8[..., :2], extra=[2], planar=True), over_white(A8[..., :2], 255), True, tolerance=1
    ),
    "tiff_gray_alpha_8_planes_deflate": File(
        tiff(A8[..., :2], extra=[2], planar=True, compress=True),
        over_white(A8[..., :2], 255),
        True,
        tolerance=1,
    ),
    "tiff_gray_of_three_channels": never(tiff(C8, extra=[0, 0]), "TIFF file"),
    "tiff_gray_of_three_channels_16": never(tiff(C16, extra=[0, 0]), "TIFF file"),
    "tiff_gray_of_three_channels_planes_deflate": never(
        tiff(C16, extra=[0, 0], planar=True, compress=True), "TIFF file"
    ),
    "tiff_gray_of_five_channels_planes_deflate": never(
        tiff(np.concatenate([A8, A8[..., :1]], -1), extra=[0] * 4, planar=True, compress=True),
        "TIFF file",
    ),
    "tiff_rgb_8": ok(tiff(C8, photometric=2), C8, 255),
    "tiff_rgb_8_planes": ok(tiff(C8, photometric=2, planar=True), C8, 255),
    "tiff_rgb_8_planes_deflate": ok(tiff(C8, photometric=2, planar=True, compress=True), C8, 255),
    "tiff_rgb_16": ok(tiff(C16, photometric=2), C16, 65535, tolerance=1),
    "tiff_rgb_16_big": ok(tiff(C16, photometric=2, order=">"), C16, 65535, tolerance=1),
    "tiff_rgb_16_deflate": ok(tiff(C16, photometric=2, compress=True), C16, 65535, tolerance=1),
    "tiff_rgb_16_planes": pillow_is_wrong(tiff(C16, photometric=2, planar=True), C16, 65535),
    "tiff_rgb_16_planes_big": pillow_is_wrong(tiff(C16, photometric=2, planar=True, order=">"), C16, 65535),
    "tiff_rgb_16_planes_deflate": ok(
        tiff(C16, photometric=2, planar=True, compress=True), C16, 65535, tolerance=1
    ),
    "tiff_rgb_16_with_a_range": unknown_to_pillow(tiff(C12, photometric=2), C12, 4095, value_range=TWELVE),
    "tiff_rgb_float32": unknown_to_pillow(tiff(C1, photometric=2), C1, 1),
    "tiff_rgba_8": File(tiff(A8, photometric=2, extra=[2]), over_white(A8, 255), tolerance=1),
    "tiff_rgba_16_planes": File(
        tiff(A16, photometric=2, planar=True, extra=[2]), over_white(A16, 65535), True, tolerance=1
    ),
    "tiff_rgb_and_another_channel": ok(tiff(A8, photometric=2, extra=[0]), A8[..., :3], 255),
    "tiff_preview": never(tiff(C8, photometric=2, subfile=1), "preview"),
    "tiff_page": ok(tiff(C8, photometric=2, subfile=0), C8, 255),
    "tiff_four_channels": never(tiff(A8, photometric=2), "ExtraSamples"),
    "jpeg2000_gray_4": ok(JPEG2000["gray_4"], ramp(15), 15),
    "jpeg2000_gray_8": ok(JPEG2000["gray_8"], G8, 255),
    "jpeg2000_gray_9": pillow_is_wrong(JPEG2000["gray_9"], ramp(511), 511),
    "jpeg2000_gray_12": ok(JPEG2000["gray_12"], G12, 4095),
    "jpeg2000_gray_12_with_a_range": ok(JPEG2000["gray_12"], G12, 2000, value_range=(0, 2000)),
    "jpeg2000_gray_16": ok(JPEG2000["gray_16"], G16, 65535),
    "jpeg2000_gray_16_codestream": ok(JPEG2000["gray_16_codestream"], G16, 65535),
    "jpeg2000_gray_signed": pillow_is_wrong(
        JPEG2000["gray_signed_8"], G8, 255, value_range=(-128, 127)
    ),
    "jpeg2000_rgb_8": ok(JPEG2000["rgb_8"], C8, 255),
    "jpeg2000_rgb_12": pillow_is_wrong(JPEG2000["rgb_12"], C12, 4095),
    "jpeg2000_rgb_16": pillow_is_wrong(JPEG2000["rgb_16"], C16, 65535),
    "jpeg2000_rgb_16_codestream": pillow_is_wrong(JPEG2000["rgb_16_codestream"], C16, 65535),
    "jpeg2000_two_channels": never(JPEG2000["two_8"], "channel definition"),
    "jpeg2000_four_channels": never(JPEG2000["four_8"], "channel definition"),
    "jpeg2000_four_channels_codestream": never(JPEG2000["four_8_codestream"], "channel definition"),
    "jpeg2000_cmyk_16": never(cmyk(JPEG2000["four_8"], 16), "CMYK"),
    "jpeg2000_bgr": pillow_is_wrong(
        with_box(JPEG2000["rgb_8"], b"cdef", ">10H", 3, 0, 0, 3, 1, 0, 2, 2, 0, 1), C8[..., ::-1], 255
    ),
    "jpeg2000_four_colors_in_a_palette": never(
        with_box(
            with_box(JPEG2000["gray_8"].replace(b"\0\0\0\x11\0\0\0", b"\0\0\0\x10\0\0\0"),
                     b"pclr", ">HB4B4B", 1, 4, 7, 7, 7, 7, 1, 2, 3, 4),
            b"cmap", ">HBBHBBHBBHBB", 0, 1, 0, 0, 1, 1, 0, 1, 2, 0, 1, 3,
        ),
        "channel definition",
    ),
}  # fmt: skip


@pytest.fixture(params=["with the extra", "without the extra"])
def extra(request, monkeypatch):
    """Whether the extra is there: as installed, and hidden."""
    if request.param == "with the extra":
        if not can_read_all():
            pytest.skip("the extra scientific is not installed")
        return True
    for name in ("tifffile", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    return False


def luma(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels @ [0.299, 0.587, 0.114]) if pixels.ndim == 3 else pixels


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_pixels_that_were_written_or_is_rejected(name, extra):
    file = FILES[name]
    if file.expected is None or (file.needs_extra and not extra):
        for channels in (1, 3):
            with pytest.raises(BrokenImage, match=mentions(file.words)) as error:
                decode(file.content, channels, file.value_range)
            assert len(str(error.value)) < 250
        return
    wanted = file.expected
    shown = decode(file.content, 3, file.value_range).permute(1, 2, 0).numpy().astype(int)
    three = wanted if wanted.shape[2:] == (3,) else np.repeat(wanted.reshape(*SHAPE, 1), 3, axis=2)
    assert np.abs(shown - three).max() <= file.tolerance
    gray = decode(file.content, 1, file.value_range)[0].numpy().astype(int)
    difference = np.abs(gray - luma(three))
    assert difference.max() <= file.tolerance + (wanted.ndim == 3)  # rounding of the luma
    assert size_in_header(EncodedImage(file.content, None)) == SHAPE or file.needs_extra


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("tiff", "jpeg2000", "png"))])
def test_independent_readers_return_the_written_numbers(name, extra):
    stored = FILES[name].stored
    if not extra or stored is None or "palette" in name:
        return
    import imagecodecs
    import tifffile

    if name.startswith("tiff"):
        values = tifffile.imread(io.BytesIO(FILES[name].content))
        values = np.moveaxis(values, 0, -1) if "planes" in name else values
        values = values[..., :3] if "another_channel" in name else values
    else:
        read = imagecodecs.png_decode if name.startswith("png") else imagecodecs.jpeg2k_decode
        values = read(FILES[name].content)
        values = (
            values
            if "png_gray" not in name or values.max() == stored.max()
            else values // (255 // stored.max())
        )
    if "white_is_0" in name:
        values = np.iinfo(values.dtype).max - values
    values, stored = values.astype(np.float64), stored.astype(np.float64)
    assert np.array_equal(values - values.min(), stored - stored.min())


def test_a_gray_image_of_lab_colors_is_the_luma_of_the_colors():
    lab = np.stack([np.full(SHAPE, 255), np.zeros(SHAPE), np.zeros(SHAPE)], -1).astype(np.uint8)
    for lightness, pixel in ((0, 0), (255, 255), (128, 119)):  # L* of 50.2 is 119 in sRGB
        lab[..., 0] = lightness
        content = tiff(lab, photometric=8)
        for channels in (1, 3):
            assert (decode(content, channels).int() - pixel).abs().max() <= 1


def test_an_image_that_pillow_opened_has_the_same_pixels_or_is_rejected(extra):
    for name in (
        "tiff_rgb_16_planes",
        "tiff_gray_16_white_is_0",
        "jpeg2000_rgb_16",
        "jpeg2000_four_channels",
    ):
        file = FILES[name]
        for number, opened in enumerate([PIL.Image.open(io.BytesIO(file.content)) for _ in range(2)]):
            if number == 1:
                if name.startswith("jpeg2000"):
                    continue  # after Pillow has decoded the file, its depth is not known
                opened.load()
            if file.expected is not None and extra and number == 0:
                shown = decode(stored_image(opened).read(), 3).permute(1, 2, 0).numpy()
                assert np.array_equal(shown, np.broadcast_to(file.expected.reshape(*SHAPE, -1), shown.shape))
            else:
                with pytest.raises(BrokenImage, match=mentions("got a")):
                    decode(stored_image(opened).read(), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_deep_images_follow_their_orientation_like_those_of_8_bits(orientation, bits):
    file = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(G8).save(file, "PNG", exif=exif)
    wanted = decode(file.getvalue(), 1)
    for kind in ("PNG", "TIFF"):
        file = io.BytesIO()
        PIL.Image.fromarray(G8 if bits == 8 else G8.astype(np.uint16) * 257).save(file, kind, exif=exif)
        assert np.array_equal(decode(file.getvalue(), 1), wanted)
        assert size_in_header(EncodedImage(file.getvalue(), None)) == wanted.shape[1:]


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int64", "int16", "float64", "uint16"])
def test_arrays_in_memory_have_the_same_limits_as_files(dtype):
    white = 1 if dtype == "float64" else 65535 if dtype == "uint16" else 100
    values = ramp(white, dtype)
    wanted = scaled(values, white if white != 100 else 255)
    assert np.array_equal(decode(stored_image(values).read(), 1)[0], wanted)
    assert np.array_equal(decode(stored_image(values).read(), 1, (0, white))[0], scaled(values, white))
    assert np.array_equal(decode(stored_image(np.stack([values] * 3, -1)).read(), 3)[2], wanted)


@pytest.mark.parametrize("name", ["eXIf", "XMP"])
def test_the_size_of_a_png_file_that_is_rotated_by_data_after_its_pixels(name):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    text = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    chunk = (b"eXIf", exif.tobytes()[6:]) if name == "eXIf" else (b"iTXt", text)
    for place in ("before", "after"):
        content = png(C8, **{place: [chunk]})
        height, width = decode(content, 3).shape[1:]
        assert size_in_header(EncodedImage(content, None)) == (height, width)
        if name == "eXIf":
            assert (width, height) == SHAPE


def test_an_image_of_a_plugin_with_plain_tuples_as_tiles():
    """Pillow 11 and later has named tuples, and reads both."""
    image = PIL.Image.new("L", (2, 2), 7)
    image.tile = [("raw", (0, 0, 2, 2), 0, ("L", 0, 1))]
    assert decode(image, 1).unique().tolist() == [7]


def test_opened_fits_files_have_the_scale_of_the_file():
    opened = stored_image(PIL.Image.open(io.BytesIO(fits(G8, zero=100)))).read()
    with pytest.raises(BrokenImage, match=mentions("FITS")):
        decode(opened, 1)


def test_an_upload_has_the_pixels_of_the_value_range(extra):
    assert np.array_equal(read_photo(png(G12), value_range=TWELVE)[0], scaled(G12, 4095))
    assert np.array_equal(read_photo(tiff(G12), channels=1, value_range=TWELVE)[0], scaled(G12, 4095))
    if not extra:
        with pytest.raises(UserError, match=mentions("plane by plane", "PNG")):
            read_photo(tiff(C16, photometric=2, planar=True))
