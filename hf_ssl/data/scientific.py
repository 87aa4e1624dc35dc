# SPDX-License-Identifier: Apache-2.0
"""Reads the numbers of image files with tifffile and imagecodecs (the extra `scientific`).

`hf_ssl.data.readers` uses these functions for the files that Pillow opens with other pixels.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

from hf_ssl.data.headers import avif_header, jpeg2000_header, jpegxl_header
from hf_ssl.data.pixels import BrokenImage, Samples, white_of

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
_DROPPED, _PREMULTIPLIED, _ALPHA = 0, 1, 2

GRAY_ADVICE = "keep one channel, or three with RGB as the tag PhotometricInterpretation"
"""What to do with a gray TIFF file of several channels."""


def turned(samples: Samples, orientation: int) -> Samples:
    """Return the values as they are shown with an EXIF orientation."""
    return samples if orientation == 1 else samples._replace(values=_TURNS[orientation](samples.values))


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
                f"expected a gray or RGB image, got a TIFF file of the kind {page.photometric.name}; "
                "convert it to RGB"
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
    kinds = {_DROPPED, _PREMULTIPLIED, _ALPHA}
    if channels > 4 or channels != colors + len(extra) or not set(extra) <= kinds:
        raise BrokenImage(
            f"expected a gray or RGB image, got a TIFF file of {channels} channels of other kinds; "
            "keep the first three channels"
        )
    if values.ndim == 3 and extra and extra[0] == _DROPPED:  # as Pillow does
        values = values[..., :colors]
    if kind == WHITE_IS_ZERO:
        if values.dtype.kind != "u" or _PREMULTIPLIED in extra:
            raise BrokenImage(
                f"expected black as 0, got a TIFF file of {values.dtype} in which white is 0; invert it"
            )
        inverted = values if values.ndim == 2 else values[..., :1]  # not the opacity
        inverted[...] = 2**bits - 1 - inverted.astype(np.int64)
    samples = _with_bits(values, bits)
    if extra and extra[0] == _PREMULTIPLIED:
        samples = _divided_by_opacity(samples)
    return turned(samples, orientation if orientation in _TURNS else 1)


def _divided_by_opacity(samples: Samples) -> Samples:
    """Return the colors before they were multiplied by the opacity.

    Raises:
        BrokenImage: the value of full opacity is not known for the type of the numbers.
    """
    values, white = samples.values, white_of(samples)
    if values.dtype.kind not in "uf" or (values.dtype.kind == "u" and values.dtype.itemsize > 2):
        raise BrokenImage(
            f"expected uint8, uint16 or floating-point colors, got {values.dtype} colors that are multiplied "
            "by the opacity; convert the file"
        )
    colors, opacity = values[..., :-1].astype(np.float64), values[..., -1:].astype(np.float64)
    found = np.divide(colors * white, opacity, out=np.zeros_like(colors), where=opacity > 0)
    found = np.where(colors <= opacity, np.minimum(found, white), found)  # rounding
    if values.dtype.kind == "u":
        found = np.rint(np.minimum(found, white))
    return samples._replace(values=np.concatenate([found, opacity], -1).astype(values.dtype))


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
    return _with_bits(values, bits)


def read_jpegxl(view: memoryview) -> Samples:
    """Return the numbers of the first frame of a JPEG XL file, rotated by the orientation in its header."""
    from imagecodecs import jpegxl_decode

    header = jpegxl_header(view)
    samples = _with_bits(jpegxl_decode(bytes(view), index=0), header.bits)
    return _divided_by_opacity(samples) if header.is_premultiplied else samples


def read_avif(view: memoryview) -> Samples:
    """Return the numbers of an AVIF file with one image. The result is neither rotated nor cropped."""
    from imagecodecs import avif_decode

    return _with_bits(avif_decode(bytes(view)), avif_header(view).bits)


def read_heif(view: memoryview) -> Samples:
    """Return the numbers of an HEIC file. This function needs pillow-heif and not the extra `scientific`."""
    from pillow_heif import open_heif

    file = open_heif(io.BytesIO(view), convert_hdr_to_8bit=False, hdr_to_16bit=False)
    return _with_bits(np.asarray(file), file.info["bit_depth"])


def _with_bits(values: np.ndarray, bits: int) -> Samples:
    known = values.dtype.kind == "u" and bits <= min(16, 8 * values.dtype.itemsize)
    return Samples(values, bits if known else None)


def _check_size(count: int) -> None:
    """Raise BrokenImage for an image larger than the limit of Pillow, which did not open it."""
    limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 2**62)
    if count > 4 * limit:
        raise BrokenImage(
            f"expected at most {limit:,} pixels, got {count:,} numbers; it may be a decompression bomb"
        )
