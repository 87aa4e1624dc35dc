# SPDX-License-Identifier: Apache-2.0
"""Encoded bytes to uint8 pixels.

Pillow decodes an image, and this module converts it like the image processor of the exported encoder
(`BitImageProcessor` with `do_convert_rgb=True`, transformers 5.21 and later): it lays transparency over
white, then converts to RGB. For plain JPEG and WebP files, this module uses torchvision instead of Pillow,
which takes less than half the time if they are small. The pixels are the same if both libraries use
libjpeg-turbo and libwebp, as their wheels do. (PNG files always use Pillow, because torchvision 0.29 gains
little and crashes the process on a damaged file.)

Supported are results of one channel (grey, ITU-R 601 luma) and of three. 16-bit grey is scaled so that 65535
becomes 255 (`BitImageProcessor` would cut it off at 255). Floating-point images and files of more than four
channels are refused.
"""

import io
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from torch import Tensor

from hf_ssl.data.headers import plain_shape

try:
    from torchvision.io import decode_image as torchvision_decode
except ImportError:  # torchvision says since 0.29 that its decoders will go; then Pillow reads everything
    torchvision_decode = None

EncodedBytes: TypeAlias = bytes | pa.Buffer

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


_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class BrokenImage(Exception):
    """An image that cannot be read; its text is the reason."""


class Encoded(NamedTuple):
    """An image as a data set holds it: its bytes, or the file where they are; or neither."""

    data: EncodedBytes | None
    path: str | None

    def read(self) -> EncodedBytes:
        """The bytes. Raises BrokenImage where there are none."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise BrokenImage("there is no image in this row")
        if "://" not in self.path:
            return self._read_local(self.path)
        try:
            from datasets.utils.file_utils import xopen  # inside archives and on the Hub

            with xopen(self.path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise BrokenImage("the file does not exist") from None

    @staticmethod
    def _read_local(path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            raise BrokenImage("the file does not exist") from None
        except OSError as error:
            raise BrokenImage(f"the file cannot be read: {error.strerror}") from error


def size_in_header(image: Encoded) -> tuple[int, int]:
    """Return the height and width of the decoded image, from its header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    try:
        on_disk = image.data is None and image.path is not None and "://" not in image.path
        with PIL.Image.open(image.path if on_disk else io.BytesIO(image.read())) as opened:  # type: ignore[arg-type]
            width, height = opened.size
            # For EXIF data after the pixels, Pillow would decode the whole PNG file.
            known = opened.format != "PNG" or "exif" in opened.info
            turned = known and opened.getexif().get(_ORIENTATION) in _TURNED
    except BrokenImage:
        raise
    except FileNotFoundError:
        raise BrokenImage("the file does not exist") from None
    except Exception as error:  # as in _decode_with_pillow
        raise BrokenImage(_reason(error)) from error
    return (width, height) if turned else (height, width)


def decode(data: EncodedBytes, channels: int) -> Tensor:
    """Decodes one image.

    Args:
        data: the encoded bytes.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (channels, H, W) uint8, rotated as its EXIF data demand; any strides.

    Raises:
        BrokenImage: truncated, empty, a decompression bomb, or no image.
    """
    if torchvision_decode is not None:
        pixels = _decode_plain(data)
        if pixels is not None:
            return _with_channels(pixels, channels)
    return _decode_with_pillow(data, channels)


def _decode_plain(data: EncodedBytes) -> Tensor | None:
    """(1 or 3, H, W), or None: Pillow decides, and says what is wrong."""
    shape = plain_shape(memoryview(data).cast("B"))
    if shape is None or shape.height * shape.width > 2 * (PIL.Image.MAX_IMAGE_PIXELS or 2**62):
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


def _decode_with_pillow(data: EncodedBytes, channels: int) -> Tensor:
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
            values = _values(_upright(image), channels)
    except BrokenImage:
        raise
    except (
        Exception
    ) as error:  # what Pillow's readers raise on damaged files is anything from OSError to KeyError
        raise BrokenImage(_reason(error) if len(memoryview(data)) else "zero bytes") from error
    pixels = torch.from_numpy(values)
    return pixels[None].expand(channels, -1, -1) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image that Pillow can read"
    return f"{type(error).__name__}: {error}"


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data do not make the pixels unreadable
        return image
    transpose = _TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if transpose is None else image.transpose(transpose)


def _values(image: PIL.Image.Image, channels: int) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    if image.mode.startswith("I"):
        return _from_16_bit(np.asarray(image))
    if image.mode == "F":
        raise BrokenImage(
            "its pixels are floating-point numbers, which have no range: convert them to 8 or 16 bits"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image).convert("RGB")
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # so that CMYK, palette, ... give the luma of the colours that they show
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BrokenImage(
            f"expected at most 16 bits a pixel, got values from {values.min()} to {values.max()}: convert it "
            "to 8 bits"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
