# SPDX-License-Identifier: Apache-2.0
"""The image files that Pillow can read here, with its plug-ins, and why it cannot read others.

pillow-heif reads HEIC, and pillow-jxl-plugin reads JPEG XL (the extra `formats`). Pillow reads AVIF from
version 11.3 on. The import of this module registers the installed plug-ins.
"""

import io
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import PIL.features
import PIL.Image
import pyarrow as pa

from hf_ssl.data.headers import jpegxl_header

_ENDINGS = (
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .dib .tif .tiff .pbm .pgm .ppm .pnm "
    ".jp2 .j2k .jpc .jpf .jpx .j2c .ico .icns .cur .tga .icb .vda .vst .psd .pcx .dcx .dds .blp .fli .flc "
    ".ftc .ftu .gbr .im .msp .pcd .pxr .bw .rgb .rgba .sgi .ras .xbm .xpm .fit .fits"
).split()
"""The endings that `datasets` 5 treats as images, except those that Pillow cannot decode by itself: videos
(.mpg, .mpeg), PostScript (.ps, .eps), Windows metafiles (.wmf, .emf), weather data (.bufr, .grib) and IPTC
records (.iim). The list of `datasets` 5 does not contain .mpo."""
_HEIC = (".heic", ".heif", ".hif")
_AVIF = (".avif", ".avifs")
_JXL = (".jxl",)
_RAW = (
    ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .raw .3fr .iiq .x3f .rwl .kdc .mrw"
).split()
_VECTOR = (".svg", ".svgz", ".eps", ".ps", ".wmf", ".emf")
_EXTRA = "pip install 'hf_ssl[formats]'"
_NEEDS_HEIC = f"HEIC needs pillow-heif; {_EXTRA}"
_NEEDS_AVIF = "AVIF needs Pillow 11.3 or later; pip install -U pillow"
_NEEDS_JXL = f"JPEG XL needs pillow-jxl-plugin; {_EXTRA}"
_SIGNATURE_BYTES = 132  # DICOM files begin with 128 bytes of any content
_CONVERT = "convert it to PNG or TIFF"
_OTHER_KINDS = {
    b"v/1\x01": f"an OpenEXR file; {_CONVERT}",
    b"#?RADIANCE": f"a Radiance file; {_CONVERT}",
    b"II\xbc": f"a JPEG XR file; {_CONVERT}",
    b"FUJIFILM": f"raw data of a camera; {_CONVERT}",
    b"\x93NUMPY": f"an array of NumPy; {_CONVERT}",
    b"%PDF": f"a PDF file; {_CONVERT}",
    b"\x1a\x45\xdf\xa3": "a video; extract its frames",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x1f\x8b": "a gzip file; unpack it",
    b"version https://git-lfs": "a Git LFS pointer; download the file with git lfs pull",
    b"<": "text, such as SVG or HTML; convert it to PNG, or download the image itself",
    b"\xff\xd8\xff": f"a JPEG file of another kind, such as 12-bit or lossless JPEG; {_CONVERT}",
}
"""The first bytes of other files -> what they are, and what to do."""
_OF_ONE_PICTURE = ("ICO", "ICNS", "CUR", "MPO")
"""Formats whose further images show the same picture: in other sizes, as a preview, or for the other eye."""


def _register_plugins() -> set[str]:
    """Register the plug-ins of Pillow, and return the endings of the formats that it reads with them."""
    endings = {*_ENDINGS}
    if PIL.features.check("avif"):
        endings |= {*_AVIF}
    # An installed plug-in can fail, for example if a library of the system is missing.
    with suppress(ImportError, OSError):
        if find_spec("pillow_heif") is not None:
            import_module("pillow_heif").register_heif_opener()
            endings |= {*_HEIC}
    with suppress(ImportError, OSError):
        if find_spec("pillow_jxl") is not None:
            import_module("pillow_jxl")  # its import registers it
            endings |= {*_JXL}
    return endings


READABLE = frozenset(_register_plugins())
"""The endings of image files that can be read here, in lower case."""

UNREADABLE = {
    ending: reason
    for endings, reason in (
        (_HEIC, _NEEDS_HEIC),
        (_AVIF, _NEEDS_AVIF),
        (_JXL, _NEEDS_JXL),
        (_RAW, "raw data of a camera; convert them to JPEG or TIFF"),
        (_VECTOR, "vector graphics; convert them to PNG"),
    )
    for ending in endings
    if ending not in READABLE
}
"""Ending of other image files -> why they cannot be read, and what to do."""


def looks_like_image(path: str) -> bool:
    """Return whether a file begins like an image, for files without an ending."""
    return usual_ending(path) is not None


def usual_ending(file: str | bytes) -> str | None:
    """Return the usual ending of an image file (its path or its bytes), from its first bytes."""
    return _kind(_start(file))


def _start(file: str | bytes | memoryview) -> bytes:
    """Return the first bytes of a file (its path or its bytes); b"" if it cannot be read."""
    if not isinstance(file, str):
        return bytes(file[:_SIGNATURE_BYTES])
    try:
        with open(file, "rb") as opened:
            return opened.read(_SIGNATURE_BYTES)
    except OSError:
        return b""


def _kind(start: bytes) -> str | None:
    """Return the usual ending of an image with these first bytes; None for other data."""
    if start[4:8] == b"ftyp":  # ISO/IEC 14496-12; the brands of HEIC and AVIF
        brand = start[8:12]
        if brand in (b"avif", b"avis"):
            return ".avif"
        return ".heic" if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1") else None
    if start[:4] == b"RIFF":
        return ".webp" if start[8:12] == b"WEBP" else None
    starts = {
        b"\xff\xd8\xff": ".jpg",
        b"\x89PNG\r\n\x1a\n": ".png",
        b"GIF8": ".gif",
        b"II*\0": ".tif",
        b"MM\0*": ".tif",
        b"\0\0\0\x0cJXL ": ".jxl",
        b"\xff\x0a": ".jxl",
        b"\0\0\0\x0cjP  ": ".jp2",
    }
    return next((ending for signature, ending in starts.items() if start.startswith(signature)), None)


def reason_of(error: Exception, file: Any = None) -> str:
    """Return why an image cannot be read, and what to do.

    Args:
        error: the error of Pillow or of the file system.
        file: the path or the encoded bytes. Other objects have no effect.
    """
    if isinstance(error, PIL.UnidentifiedImageError):
        file = memoryview(file).cast("B") if isinstance(file, bytes | memoryview | pa.Buffer) else file
        start = _start(file) if isinstance(file, str | memoryview) else b""
        return UNREADABLE.get(_kind(start) or "", f"not an image that Pillow can read{_other_kind(start)}")
    if isinstance(error, PIL.Image.DecompressionBombError):
        limit = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)
        return f"more than {limit:,} pixels, the limit of Pillow; make the image smaller or cut it into tiles"
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.strerror:
        return f"the file cannot be read: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def _other_kind(start: bytes) -> str:
    """Return the end of the message about a file that Pillow cannot read, from its first bytes."""
    if start[128:132] == b"DICM":
        return f", but a DICOM file; {_CONVERT}"
    if start[4:12] == b"ftypcrx ":
        return f", but raw data of a camera; {_CONVERT}"
    if start[4:8] == b"ftyp" and _kind(start) is None:
        return ", but a video or another file of the MPEG-4 family; extract its frames, or convert it to PNG"
    found = (text for signature, text in _OTHER_KINDS.items() if start.startswith(signature))
    return next((f", but {text}" for text in found), "; check the file, or convert it to PNG")


def has_further_pages(data: bytes | pa.Buffer) -> bool:
    """Return whether an image file has further pages or frames, of which only the first is read.

    The further images of `_OF_ONE_PICTURE` do not count.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            if image.format == "JXL":  # pillow-jxl-plugin (1.3) does not count the frames
                return jpegxl_header(memoryview(data).cast("B")).is_animated
            return image.format not in _OF_ONE_PICTURE and bool(getattr(image, "is_animated", False))
    except Exception:  # for damaged files, Pillow raises anything from OSError to KeyError
        return False
