# SPDX-License-Identifier: Apache-2.0
"""Finds the files for which Pillow returns wrong pixels, or pixels without their lower bits.

The functions read only headers. `hf_ssl.data.readers` calls `find_fault` and reads such files without Pillow.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from hf_ssl.data.headers import JpegxlHeader, avif_header, jpeg2000_header, jpegxl_header
from hf_ssl.data.pixels import Samples
from hf_ssl.data.scientific import (
    BLACK_IS_ZERO,
    GRAY_ADVICE,
    RGB,
    WHITE_IS_ZERO,
    read_avif,
    read_heif,
    read_jpeg2000,
    read_jpegxl,
    read_png,
    read_tiff,
)

_BIG_ENDIAN = b"MM"
_CONVERT = "convert it to TIFF or PNG"

# Tags of TIFF files, and some of their values.
BITS, SAMPLE_FORMAT = 258, 339
_SUBFILE, _PHOTOMETRIC, _PLANAR, _SUB_IMAGES, _EXTRA_SAMPLES = 254, 262, 284, 330, 338
_PREVIEW, _PREMULTIPLIED = 1, 1
UNSIGNED, _SIGNED = 1, 2


class Fault(NamedTuple):
    """The reason why Pillow does not return the right pixels of a file, and a function that does.

    Attributes:
        file: the format of the file, for messages.
        read: returns the right pixels, with the extra `scientific` or pillow-heif; None: hf_ssl does not read
            such files.
        advice: what the user can do if hf_ssl does not read the file.
    """

    file: str
    read: Callable[[memoryview], Samples] | None = None
    advice: str = "keep the first three channels"


def find_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    """Return why Pillow does not return the right pixels of an image; None if Pillow returns them.

    Args:
        image: an image that Pillow opened.
        view: the bytes of its file; None if they are not known.
        exact: whether all bits of colors of more than 8 bits are needed.
    """
    find = _FAULTS.get(image.format or "")
    return None if find is None else find(image, view, exact)


def _tiff_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    tags = image.tag_v2
    bits, signs = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
    photometric = tags.get(_PHOTOMETRIC, WHITE_IS_ZERO)
    deep, colors = max(bits) > 8, len(bits) > 1
    if tags.get(_SUBFILE, 0) & _PREVIEW and (_SUB_IMAGES in tags or tags.next):
        return Fault(
            "a TIFF file that begins with a preview, such as a raw file of a camera", advice=_CONVERT
        )
    if photometric == RGB and len(bits) > 3 and not tags.get(_EXTRA_SAMPLES):
        # Pillow (11 to 13.0) would use the fourth channel as transparency.
        return Fault(f"a TIFF file of {len(bits)} channels without the tag ExtraSamples")
    if photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and len(bits) > 2:
        return Fault(f"a gray TIFF file of {len(bits)} channels", advice=GRAY_ADVICE)
    is_raw, by_planes = image.info.get("compression") == "raw", tags.get(_PLANAR) == 2
    found = None
    if deep and colors and by_planes and is_raw:
        found = "a TIFF file of 16-bit colors stored plane by plane"
    elif by_planes and image.mode == "LA":
        found = "a TIFF file of gray and opacity stored plane by plane"
    elif image.mode in ("I", "F") and tags.prefix == _BIG_ENDIAN and not is_raw:
        # libtiff returns the numbers in the byte order of the machine, and Pillow swaps their bytes again.
        found = "a compressed big-endian TIFF file of signed or floating-point numbers"
    elif deep and photometric == WHITE_IS_ZERO:
        found = "a TIFF file of more than 8 bits in which white is 0"  # Pillow would invert it
    elif by_planes and is_raw and _PREMULTIPLIED in tags.get(_EXTRA_SAMPLES, ()):
        found = "a TIFF file of colors that are multiplied by the opacity, stored plane by plane"
    elif _SIGNED in signs and bits[0] == 8:
        found = "a TIFF file of signed 8-bit numbers"  # Pillow would return -1 as 255
    elif exact and deep and colors:
        found = "a TIFF file of 16-bit colors"
    return None if found is None else Fault(found, read_tiff)


def _png_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    key = image.info.get("transparency")
    if isinstance(key, tuple) and (max(key) > 255 if view is None else view[24] == 16):
        # Pillow (11 to 13.0) compares the transparent color of 16 bits with the upper 8 bits of the pixels.
        return Fault("a PNG file of 16-bit colors, one of which is transparent", read_png)
    if not exact or view is None or view[24] != 16 or view[25] == 0:  # bits per channel; 0: gray
        return None
    return Fault("a PNG file of 16-bit colors", read_png)


def _ppm_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if not exact or image.mode != "RGB" or ppm_white(image) <= 255:
        return None
    return Fault("a PPM file of 16-bit colors with data.value_range", advice=_CONVERT)


def ppm_white(image: Any) -> int:
    """Return the value of white in a PGM or PPM file that is not loaded yet; 65,535 if it is not known."""
    tile = image.tile[0] if image.tile else None
    return tile.args[1] if tile is not None and tile.codec_name in ("ppm", "ppm_plain") else 65535


def _sgi_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if not exact or view is None or view[3] != 2:  # bytes per channel
        return None
    return Fault("an SGI file of 16 bits per channel with data.value_range", advice=_CONVERT)


def _fits_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    """Return a fault for all FITS files except those of 8-bit numbers without a scale.

    Pillow (11 to 13.0) reads the big-endian numbers of FITS files in the byte order of the machine, and does
    not apply their scale (BZERO, BSCALE). Source: FITS standard 4.0, section 4.4.2.
    """
    end = image.tile[0].offset if view is not None and image.tile else 0
    cards = [bytes(view[at : at + 80]) for at in range(0, end, 80)] if view is not None else []
    scale = {card[:8].rstrip(): card[10:].split(b"/")[0] for card in cards}
    if image.mode == "L" and float(scale.get(b"BZERO", 0)) == 0 and float(scale.get(b"BSCALE", 1)) == 1:
        return None
    return Fault("a FITS file of scaled numbers or of more than 8 bits", advice=_CONVERT)


def _jpeg2000_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if view is None:
        return None
    header = jpeg2000_header(view)
    is_cmyk = header.is_cmyk and header.components == 4
    if header.channels in (2, 4) and not header.has_opacity and not is_cmyk:
        # Pillow (11 to 13.0) would use the last channel as transparency.
        count = header.channels
        return Fault(f"a JPEG 2000 file of {count} channels without a channel definition of opacity")
    bits = max(header.bits)
    if is_cmyk and header.bits != {8}:
        return Fault(f"a JPEG 2000 file of {bits}-bit CMYK colors", advice="convert it to RGB")
    if header.is_reordered:  # Pillow (11 to 13.0) would use blue as red
        return Fault("a JPEG 2000 file whose channels have another order", read_jpeg2000)
    if header.signed:
        return Fault("a JPEG 2000 file of signed numbers", read_jpeg2000)
    if bits > 16 or (header.components > 1 and header.bits != {8}) or (bits > 8 and image.mode == "L"):
        # Pillow (11 to 13.0) would return 0 for the highest numbers of more than 8 bits, and the upper 8 bits
        # of 9-bit gray.
        return Fault(f"a JPEG 2000 file of {bits}-bit numbers", read_jpeg2000)
    return None


def _jpegxl_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if getattr(image, "jpeg", False):
        return None
    header = read_jpegxl_header(image, view)
    if header.has_black:  # pillow-jxl-plugin (1.3) would use cyan, magenta and yellow as RGB
        return Fault("a JPEG XL file of CMYK colors", advice="convert it to RGB")
    found = None
    if header.is_animated:
        found = "an animated JPEG XL file"  # pillow-jxl-plugin (1.3) would return the last frame
    elif header.is_premultiplied:
        found = "a JPEG XL file of colors that are multiplied by the opacity"
    elif image.mode == "LA" and header.bits > 8:  # the plug-in would return the bytes in another order
        found = "a JPEG XL file of gray with opacity of more than 8 bits"
    elif image.mode in ("RGB", "RGBA") and header.is_float:  # the plug-in would clip the values
        found = "a JPEG XL file of floating-point colors"
    elif exact and image.mode not in ("L", "I;16", "F") and header.bits > 8:
        found = "a JPEG XL file of more than 8 bits per color"
    return None if found is None else Fault(found, read_jpegxl)


def read_jpegxl_header(image: Any, view: memoryview | None) -> JpegxlHeader:
    """Return the header of an image that pillow-jxl-plugin opened."""
    content = view if view is not None else getattr(image, "fc", None)  # the bytes of the file
    return JpegxlHeader() if content is None else jpegxl_header(memoryview(content))


def _avif_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if not exact or view is None or avif_header(view).bits <= 8:
        return None
    if getattr(image, "is_animated", False):
        # imagecodecs (2026.3.6) would decode all frames, or corrupt memory with the argument index=0.
        return Fault("an animated AVIF file of more than 8 bits", advice="keep one frame")
    return Fault("an AVIF file of more than 8 bits", read_avif)


def _heif_fault(image: Any, view: memoryview | None, exact: bool) -> Fault | None:
    if not exact or image.mode == "I;16" or image.info.get("bit_depth", 8) <= 8:
        return None
    return Fault("an HEIC file of more than 8 bits per color", read_heif)


_FAULTS: dict[str, Callable[[Any, memoryview | None, bool], Fault | None]] = {
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
"""Format of Pillow -> the function that returns the fault of a file, or None."""
