# SPDX-License-Identifier: Apache-2.0
"""Reads the numbers of an image: with Pillow, or with tifffile and imagecodecs where Pillow is wrong.

Pillow 11 to 12.3 opens some files without an error and returns other pixels than the file contains. For these
files, this module uses the extra `scientific` (tifffile and imagecodecs). Without the extra, such a file is a
broken image, and the message names its format and the extra. `tests/data/test_pixels.py` lists the formats.
"""

import io
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import pyarrow as pa

from hf_ssl.data.headers import avif_depth, jpeg2000_header, jpegxl_depth
from hf_ssl.data.pixels import BrokenImage, Decoded, Samples, array_image
from hf_ssl.data.scientific import (
    BLACK_IS_ZERO,
    GRAY_ADVICE,
    ORIENTATION,
    RGB,
    WHITE_IS_ZERO,
    read_avif,
    read_heif,
    read_jpeg2000,
    read_jpegxl,
    read_png,
    read_tiff,
    turned,
)

EncodedBytes: TypeAlias = bytes | pa.Buffer
ImageData: TypeAlias = EncodedBytes | PIL.Image.Image | np.ndarray

EXTRA = "hf_ssl[scientific]"
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
_BIG_ENDIAN = b"MM"
_CONVERT = "convert it to TIFF or PNG"

# Tags of TIFF files, and some of their values.
_BITS, _PHOTOMETRIC, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 258, 262, 284, 338, 339
_UNSIGNED, _SIGNED = 1, 2


class _Fault(NamedTuple):
    """Why Pillow does not return the pixels of a file.

    Attributes:
        file: the format of the file, for messages.
        read: reads the file with the extra `scientific`; None: hf_ssl does not read such files.
        advice: what to do if hf_ssl does not read the file.
    """

    file: str
    read: Callable[[memoryview], Samples] | None = None
    advice: str = "keep the first three channels"


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
            return _with_extra(_Fault("a TIFF file of a kind that Pillow cannot read", read_tiff), view)
        raise
    return _read_opened(image, view, exact)


def can_read_all() -> bool:
    """Return whether the extra `scientific` is installed."""
    return all(find_spec(name) is not None for name in ("tifffile", "imagecodecs"))


def is_deep(image: PIL.Image.Image, data: EncodedBytes) -> bool:
    """Return whether the pixels of an opened file do not have 8 bits per channel, from its header alone."""
    return image.mode.startswith(("I", "F")) or _fault(image, memoryview(data).cast("B"), True) is not None


def _own_file(image: PIL.Image.Image, exact: bool) -> bytes | None:
    """Return the bytes of an image that is open but not loaded, if Pillow may return other pixels."""
    file: Any = getattr(image, "fp", None)
    if file is None or not getattr(image, "tile", None) or image.tell():
        return None
    if (
        image.format != "JPEG2000"
        and not (image.format == "PNG" and exact)
        and not _fault(image, None, exact)
    ):
        return None
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    image.load()  # closes the file
    return content


def _read_opened(image: PIL.Image.Image, view: memoryview | None, exact: bool) -> Decoded:
    """Return an image that Pillow opened.

    Args:
        image: the image.
        view: its bytes; None: an image in memory.
        exact: see `read_image`.
    """
    orientation = orientation_of(image)
    fault = _fault(image, view, exact)
    if fault is not None:
        return turned(_with_extra(fault, view), orientation)
    if image.format == "PNG" and view is not None:
        _check_png(view)
    original = _original(image, view, exact)
    image.load()  # a lazy image reads its file now
    if original is not None:
        return turned(original(np.asarray(image)), orientation)
    return image if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


def orientation_of(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation that remains after Pillow loads the image.

    Pillow rotates TIFF files itself. libjxl rotates JPEG XL files by the orientation in their own header, and
    the EXIF data have no effect, but pillow-jxl-plugin (1.3) returns their orientation. The plug-in does not
    rotate JPEG XL files that contain a JPEG file (`jpeg`).
    """
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the pixels are readable although the EXIF data are damaged
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TRANSPOSES else 1


def _with_extra(fault: _Fault, view: memoryview | None) -> Samples:
    if fault.read is None:
        raise BrokenImage(f"expected pixels of known meaning, got {fault.file}; {fault.advice}")
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


def _fault(image: PIL.Image.Image, view: memoryview | None, exact: bool) -> _Fault | None:
    find = _FAULTS.get(image.format or "")
    return None if find is None else find(image, view, exact)


def _tiff_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    tags = image.tag_v2
    bits, signs = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    photometric = tags.get(_PHOTOMETRIC, WHITE_IS_ZERO)
    deep, colors = max(bits) > 8, len(bits) > 1
    if photometric == RGB and len(bits) > 3 and not tags.get(_EXTRA_SAMPLES):
        # Pillow (11 to 12.3) would use the fourth channel as transparency.
        return _Fault(f"a TIFF file of {len(bits)} channels without the tag ExtraSamples")
    if photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and len(bits) > 2:
        return _Fault(f"a gray TIFF file of {len(bits)} channels", advice=GRAY_ADVICE)
    is_raw, by_planes = image.info.get("compression") == "raw", tags.get(_PLANAR) == 2
    found = None
    if deep and colors and by_planes and is_raw:
        found = "a TIFF file of 16-bit colors stored plane by plane"
    elif by_planes and image.mode == "LA":
        found = "a TIFF file of gray and opacity stored plane by plane"
    elif image.mode in ("I", "F") and tags.prefix == _BIG_ENDIAN and not is_raw:
        # libtiff returns the numbers in the order of the machine, and Pillow exchanges their bytes again.
        found = "a compressed big-endian TIFF file of signed or floating-point numbers"
    elif deep and photometric == WHITE_IS_ZERO:
        found = "a TIFF file of more than 8 bits in which white is 0"  # Pillow would return a negative
    elif _SIGNED in signs and bits[0] == 8:
        found = "a TIFF file of signed 8-bit numbers"  # Pillow would return -1 as 255
    elif exact and deep and colors:
        found = "a TIFF file of 16-bit colors"
    return None if found is None else _Fault(found, read_tiff)


def _png_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if not exact or view is None or view[24] != 16 or view[25] == 0:  # bits per channel; 0: gray
        return None
    return _Fault("a PNG file of 16-bit colors", read_png)


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


def _ppm_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    deep = exact and image.mode == "RGB" and image.tile and image.tile[0].codec_name == "ppm"
    if not deep or image.tile[0].args[1] <= 255:
        return None
    return _Fault("a PPM file of 16-bit colors, which has its own range", advice=_CONVERT)


def _sgi_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if not exact or view is None or view[3] != 2:  # bytes per channel
        return None
    return _Fault("an SGI file of 16 bits per channel", advice=_CONVERT)


def _fits_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    """Return a fault for all FITS files except those of plain 8-bit numbers.

    Pillow (11 to 12.3) reads the big-endian numbers of FITS files in the order of the machine, and does not
    use their scale. Source: FITS standard 4.0, section 4.4.2.
    """
    end = image.tile[0].offset if view is not None and image.tile else 0
    cards = [bytes(view[at : at + 80]) for at in range(0, end, 80)] if view is not None else []
    scale = {card[:8].rstrip(): card[10:].split(b"/")[0] for card in cards}
    if image.mode == "L" and float(scale.get(b"BZERO", 0)) == 0 and float(scale.get(b"BSCALE", 1)) == 1:
        return None
    return _Fault("a FITS file of other numbers than plain 8-bit ones", advice=_CONVERT)


def _jpeg2000_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if view is None:
        return None
    header = jpeg2000_header(view)
    if (
        header.components in (2, 4)
        and not header.has_opacity
        and not (header.is_cmyk and header.components == 4)
    ):
        # Pillow (11 to 12.3) would use the last channel as transparency.
        return _Fault(f"a JPEG 2000 file of {header.components} channels without a channel definition")
    bits = max(header.bits)
    if header.signed:
        return _Fault("a JPEG 2000 file of signed numbers", read_jpeg2000)
    if bits > 16 or (header.components > 1 and header.bits != {8}) or (bits > 8 and image.mode == "L"):
        # Pillow (11 to 12.3) would return 0 for the highest numbers of more than 8 bits, and the upper 8 bits
        # of 9-bit gray.
        return _Fault(f"a JPEG 2000 file of {bits}-bit numbers", read_jpeg2000)
    return None


def _jpegxl_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if not exact or image.mode in ("L", "I;16", "F") or _jpegxl_bits(image, view) <= 8:
        return None
    return _Fault("a JPEG XL file of more than 8 bits per color", read_jpegxl)


def _jpegxl_bits(image: Any, view: memoryview | None) -> int:
    content = view if view is not None else getattr(image, "fc", None)  # pillow-jxl-plugin keeps the file
    return 8 if content is None else jpegxl_depth(memoryview(content)).bits


def _avif_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if not exact or view is None or avif_depth(view).bits <= 8:
        return None
    return _Fault("an AVIF file of more than 8 bits", read_avif)


def _heif_fault(image: Any, view: memoryview | None, exact: bool) -> _Fault | None:
    if not exact or image.mode == "I;16" or image.info.get("bit_depth", 8) <= 8:
        return None
    return _Fault("an HEIC file of more than 8 bits per color", read_heif)


_FAULTS: dict[str, Callable[[Any, memoryview | None, bool], _Fault | None]] = {
    "TIFF": _tiff_fault,
    "PNG": _png_fault,
    "PPM": _ppm_fault,
    "SGI": _sgi_fault,
    "FITS": _fits_fault,
    "JPEG2000": _jpeg2000_fault,
    "JXL": _jpegxl_fault,
    "AVIF": _avif_fault,
    "HEIF": _heif_fault,
}
"""Formats whose pixels Pillow returns with an error or without their lower bits, and how to find out."""


def _original(image: Any, view: memoryview | None, exact: bool) -> Callable[[np.ndarray], Samples] | None:
    """Return the function from Pillow's pixels to the numbers of the file; None for 8 bits per channel."""
    if image.format == "JPEG2000" and view is not None and image.mode in ("L", "I;16"):
        (bits,) = jpeg2000_header(view).bits
        shift = (16 if image.mode == "I;16" else 8) - bits  # of Pillow, so that 4,095 becomes 65,520
        return None if bits == 8 else lambda values: Samples((values >> shift).astype(np.uint16), bits)
    if not image.mode.startswith(("I", "F")):
        return None
    if image.format == "JXL" and image.mode == "I;16":
        # pillow-jxl-plugin scales the values, so that the largest number of these bits becomes 65,535.
        bits = min(16, _jpegxl_bits(image, view))
        white = 2**bits - 1
        return lambda values: Samples(np.rint(values * (white / 65535)).astype(np.uint16), bits)
    if image.format == "HEIF" and image.mode == "I;16":
        bits = image.info.get("bit_depth", 16)
        return lambda values: Samples(values >> (16 - bits), bits)  # pillow-heif shifts the values
    if image.format == "PPM" and image.mode == "I":
        # Pillow scales the values, so that the maximum in the header becomes 65,535.
        tile = image.tile[0] if exact and image.tile else None
        maximum = tile.args[1] if tile is not None and tile.codec_name == "ppm" else 65535
        return lambda values: Samples(np.rint(values * (maximum / 65535)).astype(np.uint16))
    if image.format == "TIFF":
        bits, sign = image.tag_v2.get(_BITS, (1,))[0], image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
        if bits == 32 and sign == _UNSIGNED:
            return lambda values: Samples(values.view(np.uint32))
        return lambda values: Samples(values, bits if 8 < bits < 16 else None)
    return Samples
