# SPDX-License-Identifier: Apache-2.0
"""Decodes images to uint8 pixels.

Pillow decodes an image, and this module converts it like the image processor of the exported encoder
(`BitImageProcessor` with `do_convert_rgb=True`, transformers 5.21 and later). It blends transparent pixels
with a white background, then converts to RGB. For plain JPEG and WebP files, this module uses torchvision
instead of Pillow. If the files are small, torchvision takes less than half the time of Pillow. The pixels are
the same if both libraries use libjpeg-turbo and libwebp, as their wheels do. (PNG files always use Pillow,
because torchvision 0.29 gains little and crashes the process on a damaged file.)

The result has one channel (gray, ITU-R 601 luma) or three. 16-bit gray is scaled so that 65535 becomes 255
(`BitImageProcessor` would clip it at 255). Files of floating-point numbers and files with more than four
channels raise BrokenImage.

A file whose pixels Pillow opens as 32-bit integers (mode "I") has 16 bits. In memory, integers other than
uint16 are 0 to 255 and floating-point numbers are 0 to 1. This holds for arrays, for tensors and for images
of Pillow that were not read from a file.

`read_photo` decodes a picture from an untrusted source, such as an upload to a Space.
"""

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from hf_ssl.data.formats import reason_of
from hf_ssl.errors import UserError

try:
    from torchvision.io import decode_image as torchvision_decode
except ImportError:  # torchvision 0.29 deprecates its decoders; later versions may lack them
    torchvision_decode = None

EncodedBytes: TypeAlias = bytes | pa.Buffer
ImageData: TypeAlias = EncodedBytes | PIL.Image.Image | np.ndarray

# Limits of pictures from untrusted sources.
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000  # the largest common phone cameras take 8160 x 6120 pixels
MAX_RATIO = 20  # processors enlarge the short edge: 1 x 60,000 pixels would need gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_KINDS = "a JPEG, PNG, WebP, GIF, BMP or TIFF picture"

_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class BrokenImage(Exception):
    """An image that cannot be decoded. The text of the exception is the reason."""


class EncodedImage(NamedTuple):
    """An image in a data set: its encoded bytes or the path of its file; neither if the row has no image."""

    data: EncodedBytes | None
    path: str | None

    def read(self) -> EncodedBytes:
        """Return the encoded bytes.

        Raises:
            BrokenImage: the row has no image, or the file cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.path is None:
            raise BrokenImage("the row has no image")
        is_local = "://" not in self.path
        try:
            if is_local:
                return Path(self.path).read_bytes()
            # `datasets` reads files in archives and on the Hub. Its import is slow, and callers that decode
            # local photos do not need it.
            from datasets.utils.file_utils import xopen

            with xopen(self.path, "rb") as file:
                return file.read()
        except OSError as error:
            if not is_local and not isinstance(error, FileNotFoundError):
                raise
            raise BrokenImage(reason_of(error)) from error


class ImageObject(NamedTuple):
    """An image that a data set returns as an object of Pillow or as an array.

    Attributes:
        value: an image of Pillow; an array (H, W) or (H, W, C) with C of 1 to 4; or the reason why an item of
            the data set is not an image.
        path: None; see `EncodedImage`.
    """

    value: PIL.Image.Image | np.ndarray | BrokenImage
    path: None = None

    def read(self) -> PIL.Image.Image | np.ndarray:
        """Return the object, which `decode` accepts.

        Raises:
            BrokenImage: the item is not an image.
        """
        if isinstance(self.value, BrokenImage):
            raise self.value
        return self.value


StoredImage: TypeAlias = EncodedImage | ImageObject


def stored_image(item: Any) -> StoredImage:
    """Return the image of an item of a data set. `read` raises BrokenImage if the item is not an image.

    Args:
        item: an image of Pillow; an array (H, W) or (H, W, C); a tensor (H, W) or (C, H, W) of uint8, or of
            floating-point numbers from 0 to 1; encoded bytes; the path of a file; a dict of `bytes` and
            `path`; None for a missing image; or a tuple or list that begins with one of these, such as
            (image, label). A BrokenImage is returned as it is.
    """
    try:
        return _stored_image(item)
    except BrokenImage as error:
        return ImageObject(error)


def _stored_image(item: Any) -> StoredImage:
    if isinstance(item, tuple | list) and len(item):
        item = item[0]
    if isinstance(item, BrokenImage):
        raise item
    given = item
    if item is None or isinstance(item, bytes | bytearray | memoryview):
        return EncodedImage(item if item is None else bytes(item), None)
    if isinstance(item, str | os.PathLike):
        return EncodedImage(None, os.fspath(item))
    if isinstance(item, dict) and item.keys() >= {"bytes", "path"}:
        return EncodedImage(item["bytes"], item["path"])
    if isinstance(item, PIL.Image.Image):
        is_array = item.mode in ("I", "F") and item.format is None
        return ImageObject(_as_integers(np.asarray(item)) if is_array else item)
    if isinstance(item, Tensor):
        item = item.detach().cpu().numpy()
        item = np.moveaxis(item, 0, 2) if item.ndim == 3 else item
    shape: tuple[int, ...] = getattr(item, "shape", ())
    if isinstance(item, np.ndarray) and (len(shape) == 2 or (len(shape) == 3 and 1 <= shape[2] <= 4)):
        return ImageObject(_as_integers(item))
    raise BrokenImage(
        "expected an image of Pillow, an array (H, W, C), a tensor (C, H, W), bytes or a path, got "
        f"{type(given).__name__}{f' of the shape {tuple(given.shape)}' if len(shape) else ''}"
    )


def _as_integers(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        if not (values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
            raise BrokenImage(
                f"expected floating-point pixels from 0 to 1, got {values.min():.3g} to {values.max():.3g}; "
                "return images without normalization, because hf_ssl augments and normalizes them"
            )
        return np.rint(values * 255).astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    is_gray = values.ndim == 2 or values.shape[2] == 1
    if values.dtype == np.uint8 or (is_gray and values.dtype == np.uint16):  # 16-bit gray
        return values
    if values.dtype.kind not in "iu" or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise BrokenImage(
            f"expected whole numbers from 0 to 255 as pixels, got other values of {values.dtype}; convert "
            "pixels of 16 bits to uint16"
        )
    return values.astype(np.uint8)


def memory_size(image: StoredImage) -> int:
    """Return the bytes of memory that an image needs before it is decoded, at least 1."""
    if isinstance(image, EncodedImage):
        return max(1, len(memoryview(image.data)) if image.data is not None else len(image.path or ""))
    if isinstance(image.value, PIL.Image.Image):
        return max(1, image.value.width * image.value.height * len(image.value.getbands()))
    return image.value.nbytes if isinstance(image.value, np.ndarray) else 1


def image_hash(data: ImageData) -> int:
    """Return a hash below 2**64 of the bytes of an image, from which random numbers are computed."""
    if isinstance(data, PIL.Image.Image | np.ndarray):
        data = data.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def size_in_header(image: StoredImage) -> tuple[int, int]:
    """Return the height and width of the decoded image, from its header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    if isinstance(image, ImageObject):
        pixels = decode(image.read(), 1)
        return pixels.shape[1], pixels.shape[2]
    on_disk = image.data is None and image.path is not None and "://" not in image.path
    try:
        with PIL.Image.open(image.path if on_disk else io.BytesIO(image.read())) as opened:  # type: ignore[arg-type]
            width, height = opened.size
            # To read EXIF data that come after the pixels, Pillow would decode the whole PNG file.
            known = opened.format != "PNG" or "exif" in opened.info
            swapped = known and opened.getexif().get(_ORIENTATION) in _SWAPS_SIDES
    except BrokenImage:
        raise
    except Exception as error:  # as in read_with_pillow
        raise BrokenImage(reason_of(error, image.path if on_disk else image.data)) from error
    return (width, height) if swapped else (height, width)


def decode(data: ImageData, channels: int) -> Tensor:
    """Return the pixels of one image.

    Args:
        data: the encoded bytes, an image of Pillow, or an array (H, W) or (H, W, C) of integers.
        channels: 1 for gray, 3 for RGB.

    Returns:
        (channels, H, W) uint8, rotated by the EXIF orientation. The strides may be of any kind.

    Raises:
        BrokenImage: the bytes are truncated, empty, a decompression bomb, or no image.
    """
    if torchvision_decode is not None and not isinstance(data, PIL.Image.Image | np.ndarray):
        pixels = _decode_with_torchvision(data)
        if pixels is not None:
            return _with_channels(pixels, channels)
    return read_with_pillow(data, lambda image: to_array(image, channels)).expand(channels, -1, -1)


def _decode_with_torchvision(data: EncodedBytes) -> Tensor | None:
    """Return the pixels (1 or 3, H, W) of a plain file, or None if Pillow must decode or report the error."""
    shape = plain_shape(memoryview(data).cast("B"))
    if shape is None or shape[1] * shape[2] > 2 * (PIL.Image.MAX_IMAGE_PIXELS or 2**62):
        return None
    try:
        pixels = torchvision_decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None
    return pixels if pixels.shape == shape else None


def _with_channels(pixels: Tensor, channels: int) -> Tensor:
    if pixels.shape[0] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(3, -1, -1)
    red, green, blue = pixels.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[None]  # Pillow's "L"


def read_with_pillow(data: ImageData, convert: Callable[[PIL.Image.Image], np.ndarray]) -> Tensor:
    """Return the pixels (C, H, W) of an image, rotated by the EXIF orientation.

    Args:
        data: see `decode`.
        convert: returns the pixels (H, W) or (H, W, C) of an image of Pillow.

    Raises:
        BrokenImage: see `decode`.
    """
    try:
        image = _open_image(data)
        image.load()  # a lazy image reads its file now
        pixels = torch.from_numpy(convert(_apply_orientation(image)))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    except BrokenImage:
        raise
    except Exception as error:  # for damaged files, Pillow raises anything from OSError to KeyError
        raise BrokenImage(reason_of(error, data)) from error


def as_pillow(pixels: Tensor) -> PIL.Image.Image:
    """Return the gray or RGB image of Pillow with the pixels (1 or 3, H, W) uint8."""
    return _open_image(pixels.permute(1, 2, 0).numpy())


def _open_image(data: ImageData) -> PIL.Image.Image:
    if isinstance(data, PIL.Image.Image):
        return data
    if isinstance(data, np.ndarray):
        one = data[..., 0] if data.shape[2:] == (1,) else data
        return PIL.Image.fromarray(np.ascontiguousarray(one))
    if not len(memoryview(data)):
        raise BrokenImage("zero bytes")
    return PIL.Image.open(io.BytesIO(data))


def _apply_orientation(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # the pixels are readable although the EXIF data are damaged
        return image
    transpose = _TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if transpose is None else image.transpose(transpose)


def to_array(image: PIL.Image.Image, channels: int) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, 3) as uint8."""
    if image.mode.startswith("I"):
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise BrokenImage("expected pixels of 8 or 16 bits, got floating-point numbers; convert the image")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image).convert("RGB")
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # gray is the luma of the colors, also for CMYK and palettes
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BrokenImage(
            f"expected pixels of at most 16 bits, got values from {values.min()} to {values.max()}; convert "
            "the image to 8 bits"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


_Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width."""


def plain_shape(data: memoryview) -> _Shape | None:
    """Return the shape of a file that needs no conversion, from its header.

    Such a file is an 8-bit gray or RGB JPEG or WebP file without transparency and without EXIF or XMP data.
    The function returns None for all other files, also for damaged ones. Sources: ITU-T T.81 annex B (JPEG);
    RFC 9649 (WebP).
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _jpeg_shape(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_shape(data)
    except (struct.error, IndexError):
        return None  # the file ends in the middle of its header
    return None


def _jpeg_shape(data: memoryview) -> _Shape | None:
    shape = None
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes before a marker
            position += 1
            continue
        if marker == 0xDA:  # start of the scan; the shape and the orientation come before it
            return shape
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0xE1:  # EXIF or XMP data, which may contain the orientation
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            depth, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if marker not in (0xC0, 0xC1, 0xC2) or depth != 8 or channels not in (1, 3):
                return None  # lossless, arithmetic, 12-bit, or CMYK
            shape = (channels, height, width)
        position += 2 + length


def _webp_shape(data: memoryview) -> _Shape | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return 3, height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        if bits >> 28 & 1:  # the image uses transparency
            return None
        return 3, (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


def read_photo(
    source: bytes | Path, *, channels: int = 3, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Return the decoded pixels of one untrusted picture, or of the first frame of an animation.

    The size of the file is checked before it is read. The format and the size of the picture are checked
    before it is decoded.

    Args:
        source: the encoded bytes, or a file.
        channels: 3, or 1 for an encoder of gray images.
        max_bytes, max_pixels: largest accepted sizes of the file and of the picture.

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
        return decode(data, channels)
    except BrokenImage as error:
        if "bits" in str(error):  # a valid file whose pixel format is not supported
            raise UserError(f"This picture cannot be shown: {error}.") from error
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
        raise UserError(f"This file is not a picture that can be read. Please choose {_KINDS}.") from error
