# SPDX-License-Identifier: Apache-2.0
"""Inspects some images of the data before they are read: their sizes, pages and values (layer 1)."""

import logging
from collections.abc import Sequence

import numpy as np

from hf_ssl.data.batch import UnreadableData
from hf_ssl.data.decode import BrokenImage, ImageObject
from hf_ssl.data.formats import has_further_pages
from hf_ssl.data.further_columns import AnyStored, RowImages, decode, size_in_header
from hf_ssl.data.images import EncodedRows, broken_message
from hf_ssl.data.pixels import ValueRange
from hf_ssl.data.sources import Source
from hf_ssl.data.value_range import report_values

logger = logging.getLogger(__name__)

_INSPECTED_IMAGES = 64
FOUND_VALUES = "found_values"
"""Key of `Source.cache`: the `FoundValues` of the inspected images, None for images of 8 bits."""


def common_size(source: Source, channels: int) -> tuple[int, int] | None:
    """Return the common height and width of 64 evenly spaced images, or None if their sizes differ.

    The result is kept for the next call.

    Args:
        source: map-style data.
        channels: number of channels of the image column.

    Raises:
        UserError: none of these images can be read.
    """
    key = ("size", channels)
    if key not in source.cache:
        rows = EncodedRows(source, channels)
        chosen = np.unique(np.linspace(0, len(rows) - 1, _INSPECTED_IMAGES).astype(np.int64))
        places = [rows.describe(row) for row in chosen.tolist()]
        images, values = rows.stored(chosen), source.value_range
        source.cache[key] = inspect_images(images, places, channels, source.description, values)
        source.cache[FOUND_VALUES] = report_values(images, values, source.description)
    return source.cache[key]


def inspect_images(
    images: Sequence[AnyStored],
    places: list[str],
    channels: int,
    description: str,
    value_range: ValueRange | None = None,
) -> tuple[int, int] | None:
    """Return the common height and width of the readable images, or None if their sizes differ.

    The function reads the sizes from the headers and decodes one image of each size. It stops as soon as two
    decoded sizes differ.

    Args:
        images: N encoded images.
        places: N names of their rows, for messages.
        channels: number of channels of the image column.
        description: name of the data set, for messages.
        value_range: see `hf_ssl.data.decode.decode`.

    Raises:
        UserError: none of the images can be read.
    """
    pages = sum(map(_has_further_pages, images))
    if pages:
        logger.warning(
            "%d of %d inspected images in %s have further pages or frames; only the first one is read",
            pages, len(images), description,
        )  # fmt: skip
    sizes: dict[tuple[int, int], tuple[int, int]] = {}  # size in the header -> decoded size
    broken: list[str] = []
    for place, image in zip(places, images, strict=True):
        try:
            expected = size_in_header(image)
            if expected not in sizes:
                _, height, width = decode(image.read(), channels, value_range).shape
                sizes[expected] = (height, width)
        except BrokenImage as error:
            broken.append(broken_message(place, image, error))
        if len(set(sizes.values())) > 1:
            return None
    if not sizes:
        raise UnreadableData(
            f"data.path: expected images in {description}, got none that can be read among "
            f"{len(images)} inspected ones, e.g. {broken[0]}; check the images"
        )
    return next(iter(sizes.values()))


def _has_further_pages(image: AnyStored) -> bool:
    image = image.image if isinstance(image, RowImages) else image
    if isinstance(image, ImageObject):
        return False
    try:
        return has_further_pages(image.read())
    except BrokenImage:
        return False
