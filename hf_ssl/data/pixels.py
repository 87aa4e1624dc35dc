# SPDX-License-Identifier: Apache-2.0
"""Turns decoded images of all depths into uint8 pixels. All entry points use `to_array`.

The black and the white of an image come from its type of numbers, and never from its own pixels, so that all
images of a data set have one scale:

- 8 bits or fewer: the values stay. `data.value_range` does not change them.
- unsigned integers of 9 to 16 bits: 0 is black, and the largest number of these bits is white. A TIFF or
  JPEG 2000 file states its bits. A PNG file and an array of uint16 have 16 bits.
- floating-point numbers: 0 is black, 1 is white. Other numbers are an error.
- all other integers (signed, or of 32 or 64 bits): 0 is black, 255 is white. Other numbers are an error.

`data.value_range` replaces these limits, except those of 8 bits. Values outside the range become black or
white. `data.value_range` has no effect on opacity, which is the last of two or four channels.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import PIL.Image

ValueRange: TypeAlias = tuple[float, float]
"""The values that become 0 and 255."""

_SET_RANGE = "set data.value_range=[LOW, HIGH] or auto"


class BrokenImage(Exception):
    """An image that cannot be decoded. The text of the exception is the reason."""


class Samples(NamedTuple):
    """The numbers of an image that does not have 8 bits per channel.

    Attributes:
        values: (H, W) or (H, W, C).
        bits: number of bits of an unsigned integer; None: those of its type.
        white: the value that becomes white without `data.value_range`; None: the limit of the type and bits.
    """

    values: np.ndarray
    bits: int | None = None
    white: int | None = None


Decoded: TypeAlias = PIL.Image.Image | Samples
"""An image of Pillow of 8 bits per channel, or the numbers of another image."""


def to_array(image: Decoded, channels: int, value_range: ValueRange | None = None) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, 3) as uint8. They have one channel if the image is not of 8 bits.

    Args:
        image: the image.
        channels: 1 for gray, 3 for RGB.
        value_range: see above; None: the limits of the type of numbers.

    Raises:
        BrokenImage: the image has more than four channels, or values outside the limits of their type.
    """
    if isinstance(image, Samples):
        scaled = to_uint8(image, value_range)
        if scaled.ndim == 2:
            return scaled
        image = array_image(scaled)
    if image.mode in ("La", "RGBa"):  # colors that are multiplied by the opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if "A" in (*image.getbands(), *palette) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image).convert("RGB")
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # gray is the luma of the colors, also for CMYK, Lab and palettes
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def array_image(values: np.ndarray) -> PIL.Image.Image:
    """Return an image of Pillow of uint8 pixels (H, W) or (H, W, C).

    Raises:
        BrokenImage: the array has more than four channels.
    """
    if values.ndim == 3 and values.shape[2] > 4:
        raise BrokenImage(f"expected 1 to 4 channels of pixels of 8 or 16 bits, got {values.shape[2]}")
    one = values[..., 0] if values.shape[2:] == (1,) else values
    return PIL.Image.fromarray(np.ascontiguousarray(one))


def to_uint8(samples: Samples, value_range: ValueRange | None) -> np.ndarray:
    """Return the values of an image, scaled to 0 to 255, see above.

    Raises:
        BrokenImage: values are outside the limits of their type, or are not numbers.
    """
    values, bits, _ = samples
    values = values[..., 0] if values.shape[2:] == (1,) else values
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind not in "iuf":
        raise BrokenImage(f"expected numbers as pixels, got {values.dtype}")
    if kind == "f" and not np.isfinite(values).all():
        raise BrokenImage("expected finite numbers as pixels, got NaN or infinity; replace them")
    if value_range is not None and has_opacity(values):
        return np.dstack(
            [to_uint8(samples._replace(values=values[..., :-1]), value_range), _opacity(samples)]
        )
    if kind == "u" and size <= 2:
        depth = bits or 8 * size
        limits = (0, white_of(samples)) if value_range is None or keeps_values(samples) else value_range
        return _scaled(np.arange(2**depth), limits)[np.minimum(values, 2**depth - 1)]
    if value_range is None:
        value_range = (0, white_of(samples))
        _check_inside(values, value_range)
    return _scaled(values, value_range)


def keeps_values(samples: Samples) -> bool:
    """Return whether `data.value_range` does not apply: the numbers are unsigned and have at most 8 bits."""
    return samples.values.dtype.kind == "u" and (samples.bits or 8 * samples.values.dtype.itemsize) <= 8


def has_opacity(values: np.ndarray) -> bool:
    """Return whether the last channel of an image (H, W) or (H, W, C) is its opacity."""
    return values.shape[2:] in ((2,), (4,))


def _opacity(samples: Samples) -> np.ndarray:
    opacity, white = samples.values[..., -1], white_of(samples)
    if opacity.size and not 0 <= opacity.min() <= opacity.max() <= white:
        raise BrokenImage(
            f"expected opacity from 0 to {white:g} in the last channel, got {opacity.min():.6g} to "
            f"{opacity.max():.6g}; remove this channel"
        )
    return to_uint8(samples._replace(values=opacity), None)


def white_of(samples: Samples) -> float:
    """Return the value that becomes white without `data.value_range`."""
    values, bits, white = samples
    if white is not None:
        return white
    if values.dtype.kind == "f":
        return 1
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return 2 ** (bits or 8 * values.dtype.itemsize) - 1
    return 255


def _scaled(values: np.ndarray, limits: ValueRange) -> np.ndarray:
    low, high = limits
    inside = np.clip(values.astype(np.float64), low, high)
    return np.rint((inside - low) * 255 / (high - low)).astype(np.uint8)


def _check_inside(values: np.ndarray, limits: ValueRange) -> None:
    if not values.size or (values.min() >= limits[0] and values.max() <= limits[1]):
        return
    found = f"{values.min():.6g} to {values.max():.6g}"
    if values.dtype.kind == "f":
        raise BrokenImage(
            f"expected floating-point pixels from 0 to 1, got {found}; return images without normalization, "
            f"or {_SET_RANGE}"
        )
    raise BrokenImage(
        f"expected pixels from 0 to 255 of {values.dtype} numbers, got {found}; {_SET_RANGE}, or convert "
        "pixels of 16 bits to uint16"
    )
