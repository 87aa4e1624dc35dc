# SPDX-License-Identifier: Apache-2.0
"""A picture from a stranger: looked at before it is decoded, and refused in a sentence that anybody
understands."""

import io
import warnings
from pathlib import Path

import PIL.Image
from torch import Tensor

from hf_ssl.data.decode import BrokenImage, decode
from hf_ssl.errors import UserError

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000  # what the largest common phone cameras make: 8160 x 6120
MAX_RATIO = 20  # encoders enlarge the short side: a line of 1 x 60,000 pixels would become gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_KINDS = "a JPEG, PNG, WebP, GIF, BMP or TIFF picture"


def read_photo(
    source: bytes | Path, *, channels: int = 3, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode one picture of unknown origin; the first frame of an animation.

    The size of the file is looked at before it is read, its kind and the size of the picture before it is
    decoded.

    Args:
        source: the encoded bytes, or a file.
        channels: 3, or 1 for an encoder of grey images.
        max_bytes, max_pixels: what is larger is refused.

    Returns:
        (channels, H, W) uint8, upright as its EXIF data demand; transparency laid over white.

    Raises:
        UserError: too large, too narrow, damaged, or no picture; its sentence can be shown to anybody, and
            names no file.
    """
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size == 0:
        raise UserError(f"This file is empty. Please choose {_KINDS}.")
    if size > max_bytes:
        raise UserError(
            f"This file has {size / 2**20:,.0f} MB. Please choose a picture of at most "
            f"{max_bytes / 2**20:,.0f} MB."
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
        return decode(data, channels)
    except BrokenImage as error:
        if "bits" in str(error):  # a picture in order, of a kind that nobody could show either
            raise UserError(f"This picture cannot be shown: {error}.") from error
        raise UserError("This picture is damaged or incomplete. Please choose another file.") from error


def _size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Width and height from the header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own word about large pictures: ours follows
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as header:
                return header.size
    except PIL.Image.DecompressionBombError as error:
        raise UserError(
            f"This picture has too many pixels. Please choose one of at most {max_pixels / 1e6:,.0f} million "
            "pixels."
        ) from error
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise UserError(f"This file is not a picture that can be read. Please choose {_KINDS}.") from error
