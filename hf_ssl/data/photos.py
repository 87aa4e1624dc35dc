# SPDX-License-Identifier: Apache-2.0
"""Decodes a picture from an untrusted source, such as an upload to a Space."""

import io
import warnings
from pathlib import Path

import PIL.Image
from torch import Tensor

from hf_ssl.data.decode import decode
from hf_ssl.data.formats import READABLE, usual_ending
from hf_ssl.data.pixels import BrokenImage, ValueRange
from hf_ssl.errors import UserError

# Limits of pictures from untrusted sources.
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # the largest common phone cameras take 8160 x 6120 pixels
MAX_RATIO = 20  # processors enlarge the short edge: 1 x 60,000 pixels would need gigabytes
# Pillow and pillow-heif open AVIF and HEIC files without decoding them. JPEG XL is missing here:
# pillow-jxl-plugin (1.3) decodes a file when it opens it, so the number of pixels cannot be checked before.
_OF_PLUGINS = {"AVIF": ".avif", "HEIF": ".heic"}
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
    *(name for name, ending in _OF_PLUGINS.items() if ending in READABLE),
)
_KINDS = "a JPEG, PNG, WebP, GIF, BMP or TIFF picture"
_OTHER_KINDS = {
    ".avif": "an AVIF picture",
    ".heic": "a HEIC picture",
    ".jxl": "a JPEG XL picture",
    ".jp2": "a JPEG 2000 picture",
}


def read_photo(
    source: bytes | Path,
    *,
    channels: int = 3,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> Tensor:
    """Return the decoded pixels of one untrusted picture, or of the first frame of an animation.

    The size of the file is checked before it is read. The format and the size of the picture are checked
    before it is decoded.

    Args:
        source: the encoded bytes, or a file.
        channels: 3, or 1 for an encoder of gray images.
        max_bytes, max_pixels: largest accepted sizes of the file and of the picture.
        value_range: see `decode`.

    Returns:
        uint8 (channels, H, W), rotated according to the EXIF tag, with transparent pixels blended over white.

    Raises:
        UserError: the picture is too large, too narrow or damaged, or the file is not a picture. The message
            is a sentence for the visitors of a page and names no file.
    """
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size == 0:
        raise UserError(f"This file is empty. Please choose {_KINDS}.")
    if size > max_bytes:
        raise UserError(
            f"This file has {size / 1e6:,.0f} MB. Please choose a picture of at most "
            f"{max_bytes / 1e6:,.0f} MB."
        )
    data = source.read_bytes() if isinstance(source, Path) else source
    width, height = _size(data, max_pixels)
    if width * height > max_pixels:
        raise UserError(
            f"This picture has {width:,} x {height:,} pixels. Please choose one of at most "
            f"{max_pixels / 1e6:,.0f} million pixels."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UserError(
            f"This picture has {width:,} x {height:,} pixels. Please choose one that is at most {MAX_RATIO} "
            "times as long as wide."
        )
    try:
        return decode(data, channels, value_range)
    except BrokenImage as error:
        _, supported, got = str(error).partition(", got ")
        if supported:  # the advice after the semicolon is for the owner of a data set
            found = got.partition(";")[0]
            raise UserError(
                f"This picture cannot be read ({found}). Please save it as a PNG or JPEG picture of 8 bits."
            ) from error
        raise UserError("This picture is damaged or incomplete. Please choose another file.") from error


def _size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return width and height, read from the header only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large pictures; the caller raises an error
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as header:
                return header.size
    except PIL.Image.DecompressionBombError as error:
        raise UserError(
            f"This picture has too many pixels. Please choose one of at most {max_pixels / 1e6:,.0f} million "
            "pixels."
        ) from error
    except Exception as error:  # the readers of Pillow raise many types for damaged headers
        kind = _OTHER_KINDS.get(usual_ending(data) or "")
        found = "not a picture that can be read" if kind is None else f"{kind}, which cannot be read here"
        raise UserError(f"This file is {found}. Please choose {_KINDS}.") from error
