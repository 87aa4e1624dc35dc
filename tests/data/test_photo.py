# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: what is a picture is read as anybody sees it, the rest ends in one sentence."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import JPEGXL_RGB16
from messages import mentions
from PIL import Image

from hf_ssl.data import photos
from hf_ssl.data.decode import decode
from hf_ssl.data.formats import READABLE
from hf_ssl.data.photos import read_photo
from hf_ssl.errors import UserError

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def huge_png(width: int, height: int) -> bytes:
    """A header that promises many pixels, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encoded(noise(), "JPEG", exif=exif)


SIXTEEN = Image.fromarray(np.full((30, 40), 65535, np.uint16))
GOOD = {
    "png": (encoded(noise(), "PNG"), (30, 40)),
    "jpeg": (encoded(noise(), "JPEG"), (30, 40)),
    "webp": (encoded(noise(), "WEBP"), (30, 40)),
    "bmp": (encoded(noise(), "BMP"), (30, 40)),
    "tiff": (encoded(noise(), "TIFF"), (30, 40)),
    "gray": (encoded(noise("L"), "PNG"), (30, 40)),
    "palette": (encoded(noise("P"), "PNG"), (30, 40)),
    "cmyk": (encoded(noise("CMYK"), "JPEG"), (30, 40)),
    "transparent": (encoded(noise("RGBA"), "PNG"), (30, 40)),
    "16 bits": (encoded(SIXTEEN, "PNG"), (30, 40)),
    "animated": (animation(), (6, 8)),
    "turned": (rotated(), (40, 30)),
    "one pixel": (encoded(noise(size=(1, 1)), "PNG"), (1, 1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_are_read(name: str, tmp_path: Path) -> None:
    data, size = GOOD[name]
    pixels = read_photo(data)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, *size)
    path = tmp_path / "without_ending"
    path.write_bytes(data)
    assert torch.equal(read_photo(path), pixels)
    assert read_photo(data, channels=1).shape == (1, *size)


def test_pixels_are_what_people_see() -> None:
    assert torch.equal(read_photo(GOOD["png"][0]), torch.from_numpy(np.array(noise())).permute(2, 0, 1))
    assert (read_photo(GOOD["16 bits"][0]) == 255).all()
    assert read_photo(GOOD["animated"][0])[:, 0, 0].tolist() == [255, 0, 0]


BAD = {
    "empty": (b"", ["empty"]),
    "text": (b"hello", ["picture"]),
    "html": (b"<!doctype html><html><img src=x></html>", ["picture"]),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", ["picture"]),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", ["picture"]),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ["picture"]),
    "only a signature": (b"\x89PNG\r\n\x1a\n", ["picture"]),
    "cut jpeg": (GOOD["jpeg"][0][:-200], ["damaged"]),
    "cut png": (GOOD["png"][0][:-1500], ["damaged"]),
    "cut webp": (GOOD["webp"][0][:-300], ["picture"]),
    "many pixels": (
        huge_png(10_000, 9_000),
        ["10,000 x 9,000", 50],
    ),
    "a bomb": (huge_png(100_000, 100_000), ["pixels", 50]),
    "a line": (
        encoded(noise(size=(210, 10)), "PNG"),
        ["210 x 10", 20],
    ),
    "floats": (encoded(Image.new("F", (40, 30), 1.5), "TIFF"), ["1.5", 8]),
    "jpeg 2000": (encoded(noise(), "JPEG2000"), ["JPEG 2000"]),
    "jpeg xl": (JPEGXL_RGB16, ["JPEG XL"]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_rest_is_one_sentence(name: str) -> None:
    data, parts = BAD[name]
    with pytest.raises(UserError, match=mentions(*parts)) as refused:
        read_photo(data)
    assert "\n" not in str(refused.value) and "/" not in str(refused.value)
    assert not re.search(r"hf_ssl|data\.|install|expected", str(refused.value)), "a visitor has no settings"


@pytest.mark.parametrize(("kind", "ending"), [("AVIF", ".avif"), ("HEIF", ".heic")])
def test_pictures_of_phones_are_read_if_a_data_set_of_them_is(
    kind: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ending not in READABLE:
        pytest.skip(f"this installation does not read {ending}")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(noise(), kind, exif=exif.tobytes())  # pillow-heif (1.8) turns bytes into a rotation
    assert torch.equal(read_photo(data), decode(data, 3))
    assert read_photo(data).shape == (3, 40, 30)
    monkeypatch.setattr(photos, "decode", None)
    with pytest.raises(UserError, match=r"\d x \d"):  # before it is decoded
        read_photo(data, max_pixels=1199)


def test_a_heic_picture_without_its_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "FORMATS", ("JPEG", "PNG"))
    with pytest.raises(UserError, match=mentions("HEIC", "JPEG")):
        read_photo(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_limits_come_before_reading_and_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("went on")

    monkeypatch.setattr(photos, "decode", fail)
    with pytest.raises(UserError, match=mentions("40 x 30")):
        read_photo(GOOD["png"][0], max_pixels=1199)
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(30_000_000)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(UserError, match=mentions("30 MB", "20 MB")):
        read_photo(path)
    with pytest.raises(UserError, match=mentions("0 MB")):
        read_photo(bytes(100), max_bytes=99)
