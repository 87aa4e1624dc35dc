# SPDX-License-Identifier: Apache-2.0
"""Reads the numbers of TIFF, PNG and JPEG 2000 files with tifffile and imagecodecs (the extra `scientific`).

`hf_ssl.data.readers` uses these functions for the files that Pillow opens with other pixels.
"""

import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from hf_ssl.data.pixels import BrokenImage, Samples

ORIENTATION = 0x0112
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: values[::-1].swapaxes(0, 1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: lambda values: values.swapaxes(0, 1)[::-1],
}
"""EXIF orientation -> the rotated or mirrored array, as by the method `transpose` of Pillow."""

# Values of tags of TIFF files.
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
_DROPPED, _ALPHA = 0, 2

_CODESTREAM = b"\xff\x4f\xff\x51"
_CMYK = 12
GRAY_ADVICE = "keep one channel, or three with RGB as the tag PhotometricInterpretation"
"""What to do with a gray TIFF file of several channels."""


def turned(samples: Samples, orientation: int) -> Samples:
    """Return the values as they are shown with an EXIF orientation."""
    return samples if orientation == 1 else samples._replace(values=_TURNS[orientation](samples.values))


class Codestream(NamedTuple):
    """What the header of a JPEG 2000 file states: bits and signs of its components, and their meaning."""

    bits: set[int]
    signed: bool
    components: int
    has_opacity: bool
    is_cmyk: bool


def jpeg2000_header(view: memoryview) -> Codestream:
    """Return the header of a JPEG 2000 file. Source: ITU-T T.800, annexes A.5.1 (SIZ) and I.5.3 (jp2h)."""
    content = bytes(view)
    start = content.index(_CODESTREAM)
    boxes = content[:start]
    (components,) = struct.unpack_from(">H", view, start + 40)
    sizes = [view[start + 42 + 3 * number] for number in range(components)]
    has_opacity, position = False, boxes.find(b"cdef")
    if position >= 0:
        (count,) = struct.unpack_from(">H", boxes, position + 4)
        entries = [struct.unpack_from(">HHH", boxes, position + 6 + 6 * number) for number in range(count)]
        has_opacity = any(kind == 1 and channel == components - 1 for channel, kind, _ in entries)
    color = boxes.find(b"colr")
    is_cmyk = (
        color >= 0 and boxes[color + 4] == 1 and boxes[color + 7 : color + 11] == struct.pack(">I", _CMYK)
    )
    bits, signed = {(size & 0x7F) + 1 for size in sizes}, any(size & 0x80 for size in sizes)
    return Codestream(bits, signed, components, has_opacity, is_cmyk)


def read_tiff(view: memoryview) -> Samples:
    """Return the first image of a TIFF file.

    Raises:
        ImportError: the extra is not installed.
        BrokenImage: the file is larger than Pillow's limit, or has another kind of colors.
    """
    import imagecodecs  # noqa: F401  tifffile needs it for most compressed files
    import tifffile

    with tifffile.TiffFile(io.BytesIO(view)) as file:
        page: Any = file.pages[0]
        _check_size(page.imagewidth * page.imagelength * page.samplesperpixel)
        kind, extra = int(page.photometric), tuple(int(sample) for sample in page.extrasamples)
        if page.axes not in ("YX", "YXS", "SYX") or kind not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            raise BrokenImage(
                f"expected a gray or RGB image, got a TIFF file of the kind {page.photometric.name}"
            )
        values = page.asarray()
        orientation = page.tags.valueof(ORIENTATION, default=1)
        bits = page.bitspersample
    values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
    channels = 1 if values.ndim == 2 else values.shape[2]
    colors = 3 if kind == RGB else 1
    if colors == 1 and channels > 2:
        raise BrokenImage(
            f"expected a gray or RGB image, got a gray TIFF file of {channels} channels; {GRAY_ADVICE}"
        )
    if channels > 4 or channels != colors + len(extra) or not set(extra) <= {_DROPPED, _ALPHA}:
        raise BrokenImage(
            f"expected a gray or RGB image, got a TIFF file of {channels} channels of other kinds"
        )
    if values.ndim == 3 and extra and extra[0] == _DROPPED:  # as Pillow does
        values = values[..., :colors]
    if kind == WHITE_IS_ZERO:
        if values.dtype.kind != "u":
            raise BrokenImage(f"expected black as 0, got a TIFF file of {values.dtype} in which white is 0")
        values = (2**bits - 1 - values.astype(np.int64)).astype(values.dtype)
    samples = Samples(values, bits if values.dtype.kind == "u" and bits <= 16 else None)
    return turned(samples, orientation if orientation in _TURNS else 1)


def read_png(view: memoryview) -> Samples:
    """Return the numbers of a PNG file."""
    from imagecodecs import png_decode

    return Samples(png_decode(bytes(view)))


def read_jpeg2000(view: memoryview) -> Samples:
    """Return the numbers of a JPEG 2000 file.

    Raises:
        ImportError: the extra is not installed.
        BrokenImage: the channels have different numbers of bits.
    """
    from imagecodecs import jpeg2k_decode

    header = jpeg2000_header(view)
    values = jpeg2k_decode(bytes(view))
    (bits,) = header.bits if len(header.bits) == 1 else (None,)
    if bits is None:
        raise BrokenImage("expected channels of the same number of bits, got a JPEG 2000 file of others")
    return Samples(values, bits if values.dtype.kind == "u" and bits <= 16 else None)


def _check_size(count: int) -> None:
    """Raise BrokenImage for an image larger than the limit of Pillow, which did not open it."""
    limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 2**62)
    if count > 4 * limit:
        raise BrokenImage(
            f"expected at most {limit:,} pixels, got {count:,} numbers; it may be a decompression bomb"
        )
