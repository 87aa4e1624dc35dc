# SPDX-License-Identifier: Apache-2.0
"""Further columns of images (`data.further_image_columns`): depth, surface normals, class numbers of pixels.

The pixels of a row are those of the image, followed by those of each further column in the order of their
names. Each image of a row must have the same size. The kind of a column determines its channels and pixels:

- "gray", one channel: images of 8 bits keep their values, and colors become gray. Depth has no fixed range in
  images of 16 or 32 bits or with floating-point numbers. The lowest value of such an image becomes 0 and the
  highest 255. Pixels that are not finite numbers become 0.
- "rgb", three channels: images are decoded like those of `data.image_column`.
- "normals", three channels: as "rgb", but an image without colors is an error. Red is the horizontal part of
  the surface normals, 0 for -1 and 255 for 1. A horizontal flip mirrors the scene, so it reverses red. A
  rotation would also change green, whose sign differs between data sets, so it is an error.
- "classes", three channels: each class number from 0 to 255 becomes its color in the color map of PASCAL VOC.
  The colors of an image's own palette have no effect. Crops interpolate pixels. They would turn class numbers
  1 and 3 into 2 at the border of two segments. Colors mix there as in a photo.

A row is a broken image if one of its columns cannot be read, has another size, or has pixels of another kind.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hf_ssl.data import decode as images
from hf_ssl.data.columns import encoded_images
from hf_ssl.data.config import COLUMN_KINDS
from hf_ssl.data.decode import BrokenImage, ImageData, ImageObject, StoredImage
from hf_ssl.data.pixels import Decoded, Samples, ValueRange, keeps_values, to_array


class RowData(NamedTuple):
    """The images of a row before decoding: of the image column, and {column: (kind, image)} of the others."""

    image: ImageData
    further: dict[str, tuple[str, ImageData]]


class RowImages(NamedTuple):
    """The images of a row as the data set stores them: of the image column, and {column: (kind, image)}."""

    image: StoredImage
    further: dict[str, tuple[str, StoredImage]]

    @property
    def path(self) -> str | None:
        """The path of the image of the image column, see `hf_ssl.data.decode.EncodedImage`."""
        return self.image.path

    def read(self) -> RowData:
        """Return the images as encoded bytes or objects.

        Raises:
            BrokenImage: an image is missing, or its file cannot be read.
        """
        further: dict[str, tuple[str, ImageData]] = {}
        for column, (kind, image) in self.further.items():
            try:
                further[column] = kind, image.read()
            except BrokenImage as error:
                raise _in_column(column, error) from error
        return RowData(self.image.read(), further)


AnyStored: TypeAlias = StoredImage | RowImages


def further_channels(columns: Mapping[str, str]) -> int:
    """Return the number of channels of further columns {name: kind}."""
    return sum(COLUMN_KINDS[kind] for kind in columns.values())


def mirrored_channels(columns: Mapping[str, str], first: int) -> tuple[int, ...]:
    """Return the channels whose values a horizontal flip reverses.

    Args:
        columns: {name: kind} in the order of their channels.
        first: number of channels of the image.
    """
    found = []
    for kind in columns.values():
        if kind == "normals":
            found.append(first)
        first += COLUMN_KINDS[kind]
    return tuple(found)


def table_rows(table: pa.Table, column: str, columns: Mapping[str, str], folder: str = "") -> list[AnyStored]:
    """Return the images of all rows of a table.

    Args:
        table: N rows.
        column: the image column.
        columns: {name: kind} of the further columns.
        folder: see `Source.folder`.
    """
    further = {
        name: encoded_images(table, name, partial(stored_further_image, kind=kind), folder)
        for name, kind in columns.items()
    }
    return joined_rows(encoded_images(table, column, folder=folder), columns, further)


def joined_rows(
    given: Sequence[StoredImage], columns: Mapping[str, str], further: Mapping[str, Sequence[StoredImage]]
) -> list[AnyStored]:
    """Return the images of N rows.

    Args:
        given: N images of the image column.
        columns: {name: kind} of the further columns; empty if there are none.
        further: {name: N images}.
    """
    if not columns:
        return list(given)
    return [
        RowImages(image, {name: (kind, further[name][row]) for name, kind in columns.items()})
        for row, image in enumerate(given)
    ]


def stored_further_image(item: Any, kind: str) -> StoredImage:
    """Return the image of a further column of a data set in Python, see `hf_ssl.data.decode.stored_image`.

    A gray array can contain numbers of any range.
    """
    if isinstance(item, Tensor):
        item = images.tensor_array(item)
    if isinstance(item, np.ndarray):
        flat = item[..., 0] if item.shape[2:] == (1,) else item
        if kind == "gray" and flat.ndim == 2 and flat.dtype.kind in "iuf" and flat.dtype != np.uint8:
            return ImageObject(_own_range(flat))
        if kind == "classes" and flat.dtype.kind == "f":
            return ImageObject(BrokenImage(f"expected whole numbers as classes, got numbers of {flat.dtype}"))
        if kind == "classes" and flat.dtype == bool:
            return ImageObject(flat.astype(np.uint8))
    return images.stored_image(item)


def memory_size(image: AnyStored) -> int:
    """Return the bytes of memory that a row needs before it is decoded, at least 1."""
    if not isinstance(image, RowImages):
        return images.memory_size(image)
    return images.memory_size(image.image) + sum(images.memory_size(one) for _, one in image.further.values())


def size_in_header(image: AnyStored) -> tuple[int, int]:
    """Return the height and width of the image of the image column, from its header alone.

    Raises:
        BrokenImage: the header cannot be read.
    """
    return images.size_in_header(image.image if isinstance(image, RowImages) else image)


def decode(
    data: ImageData | RowData, channels: int, value_range: ValueRange | None = None, *, is_gray: bool = False
) -> Tensor:
    """Return the pixels of one row.

    Args:
        data: the images of the row, or of the image column alone.
        channels: channels of the image: 1 for gray, 3 for RGB.
        value_range: see `hf_ssl.data.decode.decode`. It does not change the further columns.
        is_gray: whether to convert the image to gray, with `channels` equal channels. It does not change the
            further columns.

    Returns:
        (C, H, W) uint8: the channels of the image, then those of the further columns. The strides may be of
        any kind.

    Raises:
        BrokenImage: an image cannot be decoded, does not match its kind, or has another size.
    """
    if not isinstance(data, RowData):
        return images.decode(data, 1 if is_gray else channels, value_range).expand(channels, -1, -1)
    parts = [decode(data.image, channels, value_range, is_gray=is_gray)]
    for column, (kind, further) in data.further.items():
        try:
            pixels = _decode_kind(further, kind)
        except BrokenImage as error:
            raise _in_column(column, error) from error
        if pixels.shape[1:] != parts[0].shape[1:]:
            (height, width), (other_height, other_width) = parts[0].shape[1:], pixels.shape[1:]
            raise _in_column(
                column,
                f"expected the size of the image, {height}x{width} pixels, got {other_height}x{other_width}",
            )
        parts.append(pixels)
    # Channels last in memory, because such images are cropped fastest.
    return torch.cat([part.permute(1, 2, 0) for part in parts], dim=2).permute(2, 0, 1)


def _in_column(column: str, reason: object) -> BrokenImage:
    return BrokenImage(f"column {column}: {reason}")


def _decode_kind(data: ImageData, kind: str) -> Tensor:
    """Return the pixels (C, H, W) uint8 of an image of a further column."""
    if kind == "rgb":
        return images.decode(data, 3)
    return images.read_pixels(data, _CONVERTERS[kind])


def _gray(image: Decoded) -> np.ndarray:
    """Return the pixels (H, W) of an image of the kind "gray"."""
    if isinstance(image, Samples) and _is_gray(image) and not keeps_values(image):
        return _own_range(_first_channel(image))
    return to_array(image, 1)


def _first_channel(image: Samples) -> np.ndarray:
    """Return the numbers (H, W) of a gray image, without its opacity."""
    return image.values if image.values.ndim == 2 else image.values[..., 0]


def _own_range(values: np.ndarray) -> np.ndarray:
    """Return numbers (H, W) as uint8: 0 for the lowest, 255 for the highest, 0 for NaN and infinity."""
    values = values.astype(np.float64)
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    scaled = (np.where(known, values, low) - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(scaled).astype(np.uint8)


def _normals(image: Decoded) -> np.ndarray:
    """Return the pixels (H, W, 3) of an image of the kind "normals"."""
    if _is_gray(image):
        raise BrokenImage(f"expected three channels, the surface normals, got {_described(image)}")
    return to_array(image, 3)


def _is_gray(image: Decoded) -> bool:
    if isinstance(image, Samples):
        return image.values.ndim == 2 or image.values.shape[2] < 3
    return image.mode in ("1", "L", "LA", "La")


def _described(image: Decoded) -> str:
    if isinstance(image, Samples):
        return f"an image of {image.values.dtype} numbers of the shape {image.values.shape}"
    return f"an image of mode {image.mode}"


def _classes(image: Decoded) -> np.ndarray:
    """Return the pixels (H, W, 3) of an image of the kind "classes"."""
    return class_colors()[class_numbers(image)]


def class_numbers(image: Decoded) -> np.ndarray:
    """Return the class numbers (H, W) uint8 of the pixels. For a palette image, these are the indices.

    Raises:
        BrokenImage: the image has several channels, numbers above 255, or no whole numbers.
    """
    if isinstance(image, Samples):
        numbers = _first_channel(image) if _is_gray(image) else image.values
        is_class = numbers.ndim == 2 and numbers.dtype.kind in "iub"
    else:
        numbers, is_class = np.asarray(image), image.mode in ("1", "L", "P")
    if not is_class:
        raise BrokenImage(f"expected one channel, the class numbers, got {_described(image)}")
    if numbers.size and (numbers.min() < 0 or numbers.max() > 255):
        raise BrokenImage(
            f"expected class numbers from 0 to 255, got numbers from {numbers.min()} to {numbers.max()}"
        )
    return numbers.astype(np.uint8)


@cache
def class_colors() -> np.ndarray:
    """Return the color map (256, 3) of PASCAL VOC.

    The lowest three bits of a class number are the highest bits of red, green and blue. The next three bits
    are the next lower bits of the colors, and so on. Source: `VOClabelcolormap` of the VOC development kit.
    """
    numbers = np.arange(256)[:, None]
    colors = np.zeros((256, 3), np.int64)
    for place in range(3):
        colors |= (numbers >> (3 * place + np.arange(3)) & 1) << (7 - place)
    return colors.astype(np.uint8)


_CONVERTERS = {"gray": _gray, "normals": _normals, "classes": _classes}
