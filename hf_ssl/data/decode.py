# SPDX-License-Identifier: Apache-2.0
"""Decodes images to uint8 pixels.

Pillow decodes an image, and this module converts it like the image processor of the exported encoder
(`BitImageProcessor` with `do_convert_rgb=True`, transformers 5.21 and later). It blends transparent pixels
with a white background, then converts to RGB. For plain JPEG and WebP files, this module uses torchvision
instead of Pillow. If the files are small, torchvision takes less than half the time of Pillow. The pixels are
the same if both libraries use libjpeg-turbo and libwebp, as their wheels do. (PNG files always use Pillow,
because torchvision 0.29 gains little and crashes the process on a damaged file.)

The result has one channel (gray, ITU-R 601 luma) or three. `hf_ssl.data.pixels` explains how other numbers
than those of 8 bits become pixels (`BitImageProcessor` would clip them at 255). `hf_ssl.data.readers` reads
the files that Pillow opens with other pixels. Files with more than four channels raise BrokenImage.
"""

import io
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from hf_ssl.data.formats import reason_of
from hf_ssl.data.pixels import BrokenImage, Decoded, Samples, ValueRange, array_image, to_array
from hf_ssl.data.plain_headers import plain_shape
from hf_ssl.data.readers import SWAPS_SIDES, EncodedBytes, ImageData, orientation_of, read_image

try:
    from torchvision.io import decode_image as torchvision_decode
except ImportError:  # torchvision 0.29 deprecates its decoders; later versions may lack them
    torchvision_decode = None


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
        return ImageObject(item)
    if isinstance(item, Tensor):
        item = tensor_array(item)
    shape: tuple[int, ...] = getattr(item, "shape", ())
    if isinstance(item, np.ndarray) and (len(shape) == 2 or (len(shape) == 3 and 1 <= shape[2] <= 4)):
        return ImageObject(item)
    raise BrokenImage(
        "expected an image of Pillow, an array (H, W, C), a tensor (C, H, W), bytes or a path, got "
        f"{type(given).__name__}{f' of the shape {tuple(given.shape)}' if len(shape) else ''}"
    )


def tensor_array(image: Tensor) -> np.ndarray:
    """Return the array (H, W) or (H, W, C) of a tensor (H, W) or (C, H, W)."""
    image = image.detach().cpu()
    # NumPy has no type for bfloat16.
    values = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return np.moveaxis(values, 0, 2) if values.ndim == 3 else values


def memory_size(image: StoredImage) -> int:
    """Return the bytes of memory that an image needs before it is decoded, at least 1."""
    if isinstance(image, EncodedImage):
        return max(1, len(memoryview(image.data)) if image.data is not None else len(image.path or ""))
    if isinstance(image.value, PIL.Image.Image):
        return max(1, image.value.width * image.value.height * len(image.value.getbands()))
    return image.value.nbytes if isinstance(image.value, np.ndarray) else 1


def size_in_header(image: StoredImage) -> tuple[int, int]:
    """Return the height and width of the decoded image, from its header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    if isinstance(image, ImageObject):
        return _decoded_size(image.read())
    on_disk = image.data is None and image.path is not None and "://" not in image.path
    try:
        with PIL.Image.open(image.path if on_disk else io.BytesIO(image.read())) as opened:  # type: ignore[arg-type]
            width, height = opened.size
            if _size_is_unknown(opened, image):
                return _decoded_size(image.read())
            # A PNG file without EXIF data is not rotated. Pillow would decode the pixels to search for them.
            swapped = opened.format != "PNG" or "exif" in opened.info
            swapped = swapped and orientation_of(opened) in SWAPS_SIDES
    except BrokenImage:
        raise
    except PIL.UnidentifiedImageError:  # tifffile may read the file
        return _decoded_size(image.read())
    except Exception as error:  # as in read_pixels
        raise BrokenImage(reason_of(error, image.path if on_disk else image.data)) from error
    return (width, height) if swapped else (height, width)


def _size_is_unknown(opened: PIL.Image.Image, image: EncodedImage) -> bool:
    """Return whether the size depends on data that Pillow does not read when it opens a file.

    These data are the clean aperture of an AVIF file, and the orientation of a PNG file if it is in EXIF data
    after the pixels or in XMP data.
    """
    names = {"AVIF": (b"clap",), "PNG": (b"eXIf", b"tiff:Orientation", b"Raw profile type")}
    if opened.format not in names or (opened.format == "PNG" and "exif" in opened.info):
        return False
    content = bytes(image.read())
    return any(name in content for name in names[opened.format])


def _decoded_size(data: ImageData) -> tuple[int, int]:
    """Return the height and width of an image without converting its values."""
    try:
        decoded = read_image(data)
    except BrokenImage:
        raise
    except Exception as error:  # as in read_pixels
        raise BrokenImage(reason_of(error, data)) from error
    if isinstance(decoded, Samples):
        return decoded.values.shape[0], decoded.values.shape[1]
    return decoded.height, decoded.width


def decode(data: ImageData, channels: int, value_range: ValueRange | None = None) -> Tensor:
    """Return the pixels of one image.

    Args:
        data: the encoded bytes, an image of Pillow, or an array (H, W) or (H, W, C) of numbers.
        channels: 1 for gray, 3 for RGB.
        value_range: the values that become 0 and 255, see `hf_ssl.data.pixels`.

    Returns:
        (channels, H, W) uint8, rotated by the EXIF orientation. The strides may be of any kind.

    Raises:
        BrokenImage: the bytes are truncated, empty, a decompression bomb, or no image.
    """
    if torchvision_decode is not None and not isinstance(data, PIL.Image.Image | np.ndarray):
        pixels = _decode_with_torchvision(data)
        if pixels is not None:
            return _with_channels(pixels, channels)
    convert = partial(to_array, channels=channels, value_range=value_range)
    return read_pixels(data, convert, exact=value_range is not None).expand(channels, -1, -1)


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


def read_pixels(data: ImageData, convert: Callable[[Decoded], np.ndarray], *, exact: bool = False) -> Tensor:
    """Return the pixels (C, H, W) of an image, rotated by the EXIF orientation.

    Args:
        data: see `decode`.
        convert: returns the pixels (H, W) or (H, W, C) of a decoded image.
        exact: see `hf_ssl.data.readers.read_image`.

    Raises:
        BrokenImage: see `decode`.
    """
    try:
        pixels = torch.from_numpy(convert(read_image(data, exact=exact)))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    except BrokenImage:
        raise
    except Exception as error:  # for damaged files, Pillow raises anything from OSError to KeyError
        raise BrokenImage(reason_of(error, data)) from error


def as_pillow(pixels: Tensor) -> PIL.Image.Image:
    """Return the gray or RGB image of Pillow with the pixels (1 or 3, H, W) uint8."""
    return array_image(pixels.permute(1, 2, 0).numpy())
