# SPDX-License-Identifier: Apache-2.0
"""Reads the numbers of an image: with Pillow, or with tifffile and imagecodecs where Pillow is wrong.

Pillow 11 to 13.0 opens some files without an error and returns other pixels than the file contains. For these
files, this module uses the extra `scientific` (tifffile and imagecodecs). Without the extra, such a file is a
broken image, and the message names its format and the extra. `tests/data/test_pixels.py` lists the formats.
"""

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import pyarrow as pa

from hf_ssl.data.faults import (
    BITS,
    SAMPLE_FORMAT,
    UNSIGNED,
    Fault,
    find_fault,
    ppm_white,
    read_jpegxl_header,
)
from hf_ssl.data.formats import READABLE
from hf_ssl.data.headers import avif_header, jpeg2000_header
from hf_ssl.data.pixels import BrokenImage, Decoded, Samples, array_image
from hf_ssl.data.scientific import ORIENTATION, read_tiff, turned

EncodedBytes: TypeAlias = bytes | pa.Buffer
ImageData: TypeAlias = EncodedBytes | PIL.Image.Image | np.ndarray

EXTRA = "hf_ssl[scientific]"
_DECODING = 7  # increase it if decoding gives other pixels
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_image(data: ImageData, *, exact: bool = False) -> Decoded:
    """Return a decoded image, rotated by its EXIF orientation.

    Args:
        data: the encoded bytes, an image of Pillow, or an array (H, W) or (H, W, C) of numbers.
        exact: whether all bits of colors of more than 8 bits are needed. Pillow returns 8 bits.

    Raises:
        BrokenImage: the file needs the extra `scientific`, or does not state what its channels are.
        Exception: the file is damaged; Pillow raises anything from OSError to KeyError.
    """
    if isinstance(data, np.ndarray):
        return array_image(data) if data.dtype == np.uint8 else Samples(data)
    if isinstance(data, PIL.Image.Image):
        encoded = _own_file(data, exact)
        if encoded is None:
            return _read_opened(data, None, exact)
        data = encoded
    view = memoryview(data).cast("B")
    if not len(view):
        raise BrokenImage("zero bytes")
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError:
        if bytes(view[:4]) in _TIFF:
            return _with_extra(Fault("a TIFF file of a kind that Pillow cannot read", read_tiff), view)
        raise
    return _read_opened(image, view, exact)


def can_read_all() -> bool:
    """Return whether the extra `scientific` is installed."""
    return all(find_spec(name) is not None for name in ("tifffile", "imagecodecs"))


def decoder_state() -> str:
    """Return a text for names of caches. The text changes if decoding changes or can read more files."""
    formats = [ending for ending in (".avif", ".heic", ".jxl") if ending in READABLE]
    return "".join([str(_DECODING), *formats, ".scientific" if can_read_all() else ""])


def is_deep(image: PIL.Image.Image, data: EncodedBytes) -> bool:
    """Return whether the pixels of an opened file may have more than 8 bits per channel, from its header."""
    return (
        image.mode.startswith(("I", "F")) or find_fault(image, memoryview(data).cast("B"), True) is not None
    )


def _own_file(image: PIL.Image.Image, exact: bool) -> bytes | None:
    """Return the bytes of an image that is open but not loaded, if Pillow may return wrong pixels.

    The function does not load the image: a data set can keep it, and must return the same pixels again.
    """
    file: Any = getattr(image, "fp", None)
    is_avif = image.format == "AVIF"  # Pillow sets `tile` when it loads these files
    if file is None or not (is_avif or getattr(image, "tile", None)) or image.tell():
        return None
    is_unknown = image.format in ("JPEG2000", "FITS", "AVIF", "PPM") or _few_bits(image) is not None
    is_unknown |= image.format in ("PNG", "SGI") and (exact or "transparency" in image.info)
    if not is_unknown and not find_fault(image, None, exact):
        return None
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    if is_avif and content[4:8] != b"ftyp":  # the image is loaded: `fp` contains its pixels
        return None
    if is_avif and not (exact or b"clap" in content):  # Pillow returns the right pixels
        return None
    return content


def _read_opened(image: PIL.Image.Image, view: memoryview | None, exact: bool) -> Decoded:
    """Return an image that Pillow opened.

    Args:
        image: the image.
        view: the bytes of its file; None: an image in memory.
        exact: see `read_image`.
    """
    fault = find_fault(image, view, exact)
    original = None if fault is not None else _original(image, view)
    orientation = orientation_of(image)  # loads PNG files
    if fault is not None:
        samples = _with_extra(fault, view)
        if (box := _shown_box(image, view)) is not None:
            left, top, right, bottom = box
            samples = samples._replace(values=samples.values[top:bottom, left:right])
        return turned(samples, orientation)
    if image.format == "PNG" and view is not None:
        _check_png(view)
    image.load()  # a lazy image reads its file now
    box = _shown_box(image, view)
    image = image if box is None else image.crop(box)
    if original is not None:
        return turned(original(np.asarray(image)), orientation)
    return image if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


def _shown_box(image: PIL.Image.Image, view: memoryview | None) -> tuple[int, int, int, int] | None:
    """Return the part of an AVIF image that is shown: left, top, right, bottom. None: the whole image.

    Pillow (11.3 to 13.0) and imagecodecs return the whole image. Source: ISO/IEC 14496-12 (CleanApertureBox).
    """
    aperture = avif_header(view).aperture if image.format == "AVIF" and view is not None else None
    if aperture is None or 0 in aperture[1::2]:
        return None
    width, height, right, down = (Fraction(*aperture[place : place + 2]) for place in range(0, 8, 2))
    left, top = (image.width - width) / 2 + right, (image.height - height) / 2 + down
    box = int(left), int(top), int(left + width), int(top + height)
    is_inside = 0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height
    return box if is_inside and left == box[0] and top == box[1] else None


def _few_bits(image: Any) -> int | None:
    """Return the bits (2 or 4) of a gray file that is not loaded; None if Pillow does not scale them to 8."""
    for *_, options in getattr(image, "tile", None) or ():
        mode = options if isinstance(options, str) else (options or ("",))[0]
        if isinstance(mode, str) and mode.startswith(("L;2", "L;4")):
            return int(mode[2])
    return None


def _few_bits_numbers(image: Any, bits: int) -> Callable[[np.ndarray], Samples]:
    """Return the function from Pillow's pixels to the numbers of a gray PNG or TIFF file of 2 or 4 bits.

    Pillow (11 to 13.0) scales the pixels to 8 bits, so a mask would have other class numbers. Pillow does not
    scale the transparent value of a PNG file.
    """
    white, key = 2**bits - 1, image.info.get("transparency")

    def numbers(values: np.ndarray) -> Samples:
        values = values // (255 // white)
        if isinstance(key, int):
            values = np.dstack([values, np.where(values == key, 0, white).astype(np.uint8)])
        return Samples(values, bits)

    return numbers


def _pgm_numbers(image: Any) -> Callable[[np.ndarray], Samples]:
    """Return the function from Pillow's pixels to the numbers of a PGM file.

    Pillow (11 to 13.0) scales them, so that the maximum in the header becomes 255 or 65,535. A mask would
    have other class numbers.
    """
    maximum = ppm_white(image)
    scale, kind = (maximum / 255, np.uint8) if image.mode == "L" else (maximum / 65535, np.uint16)
    return lambda values: Samples(np.rint(values * scale).astype(kind), white=maximum)


def orientation_of(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation that remains after Pillow loads the image.

    Pillow rotates TIFF files itself. libjxl rotates JPEG XL files by the orientation in their header, and
    ignores their EXIF data. pillow-jxl-plugin (1.3) returns these EXIF data, so their orientation has no
    effect here. The plug-in does not rotate JPEG XL files that contain a JPEG file (`jpeg`).
    """
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the pixels are readable although the EXIF data are damaged
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TRANSPOSES else 1


def _with_extra(fault: Fault, view: memoryview | None) -> Samples:
    if fault.read is None:
        raise BrokenImage(f"expected a file that hf_ssl can read, got {fault.file}; {fault.advice}")
    if view is None:
        raise BrokenImage(
            f"expected an image that Pillow opens correctly, got {fault.file}; use the path or the bytes "
            f"of the file, with {EXTRA} installed"
        )
    try:
        return fault.read(view)
    except ImportError:
        raise BrokenImage(
            f"expected a file that Pillow reads correctly, got {fault.file}; install {EXTRA}, or convert "
            "the file"
        ) from None
    except BrokenImage:
        raise
    except Exception as error:  # for damaged files, the libraries raise any error
        raise BrokenImage(f"{fault.file}: {type(error).__name__}: {error}") from error


def _check_png(view: memoryview) -> None:
    """Raise BrokenImage if the compressed pixels of a PNG file are damaged.

    Pillow 12.3 checks the checksums of all chunks before the pixels, but not those of the pixels (IDAT). It
    returns other pixels than the file had. Source: PNG specification, section 5.3.
    """
    position, found = 8, False  # after the signature
    while position + 8 <= len(view):
        (length,) = struct.unpack_from(">I", view, position)
        is_pixels = view[position + 4 : position + 8] == b"IDAT"
        if found and not is_pixels:
            return
        end = position + 8 + length
        if is_pixels:
            if end + 4 > len(view):
                raise BrokenImage("the PNG file is truncated in its pixels; copy the file again")
            (checksum,) = struct.unpack_from(">I", view, end)
            if zlib.crc32(view[position + 4 : end]) != checksum:
                raise BrokenImage("the pixels of the PNG file do not have its checksum; copy the file again")
        position, found = end + 4, is_pixels


def _original(image: Any, view: memoryview | None) -> Callable[[np.ndarray], Samples] | None:
    """Return the function from Pillow's pixels to the numbers of the file; None for 8 bits per channel."""
    if image.format == "JPEG2000" and view is not None and image.mode in ("L", "I;16"):
        (bits,) = jpeg2000_header(view).bits
        shift = (16 if image.mode == "I;16" else 8) - bits  # of Pillow, so that 4,095 becomes 65,520
        return None if bits == 8 else lambda values: Samples((values >> shift).astype(np.uint16), bits)
    if (few_bits := _few_bits(image)) is not None:
        return _few_bits_numbers(image, few_bits)
    if image.format == "PPM" and (image.mode == "I" or (image.mode == "L" and ppm_white(image) < 255)):
        return _pgm_numbers(image)
    if not image.mode.startswith(("I", "F")):
        return None
    key = image.info.get("transparency")
    if image.mode == "I;16" and isinstance(key, int):  # of a PNG file
        return lambda values: Samples(
            np.dstack([values, np.where(values == key, 0, 65535).astype(np.uint16)])
        )
    if image.format == "JXL" and image.mode == "I;16":
        # pillow-jxl-plugin scales the values, so that the largest number of these bits becomes 65,535.
        bits = min(16, read_jpegxl_header(image, view).bits)
        white = 2**bits - 1
        return lambda values: Samples(np.rint(values * (white / 65535)).astype(np.uint16), bits)
    if image.format == "HEIF" and image.mode == "I;16":
        bits = image.info.get("bit_depth", 16)
        return lambda values: Samples(values >> (16 - bits), bits)  # pillow-heif shifts the values
    if image.format == "TIFF":
        bits, sign = image.tag_v2.get(BITS, (1,))[0], image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
        if bits == 32 and sign == UNSIGNED:
            return lambda values: Samples(values.view(np.uint32))
        return lambda values: Samples(values, bits if 8 < bits < 16 else None)
    return Samples
