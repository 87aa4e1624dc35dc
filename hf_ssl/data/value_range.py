# SPDX-License-Identifier: Apache-2.0
"""Finds the values of images that do not have 8 bits per channel, and reports images that become dark.

`data.value_range` states which values become black and white (`hf_ssl.data.pixels`). With "auto", they are
the lowest and the highest value of some images.
"""

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from datasets import Dataset, IterableDataset

from hf_ssl.data.columns import encoded_images
from hf_ssl.data.decode import StoredImage, stored_image
from hf_ssl.data.further_columns import AnyStored, RowImages
from hf_ssl.data.pixels import BrokenImage, Decoded, Samples, ValueRange, has_opacity, keeps_values, white_of
from hf_ssl.data.readers import ImageData, is_deep, read_image
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

AUTO = "auto"
_PROBED_IMAGES = 64
_DARK = 0.25  # of the value of white; images without a brighter value give a warning
_reported: set[str] = set()


def probed_images(dataset: Any, column: str, folder: str) -> list[AnyStored]:
    """Return some images of a data set: evenly spaced ones, or the first ones of a stream.

    Args:
        dataset, column, folder: see `hf_ssl.data.sources.Source`.
    """
    if isinstance(dataset, IterableDataset):
        known = dataset.features is not None
        stream = dataset.select_columns([column]).with_format("arrow") if known else dataset.with_format(None)
        first: Any = next(iter(stream.iter(batch_size=_PROBED_IMAGES)), None)
        if first is None:
            return []
        return list(
            encoded_images(first, column, folder=folder) if known else map(stored_image, first[column])
        )
    rows = np.unique(np.linspace(0, max(0, len(dataset) - 1), min(len(dataset), _PROBED_IMAGES)).astype(int))
    if isinstance(dataset, Dataset):
        table = dataset.select_columns([column]).with_format("arrow")[rows]
        return list(encoded_images(table, column, folder=folder))
    return [dataset.stored(int(row)) for row in rows]


def chosen_range(
    requested: Sequence[float] | str | None, images: Callable[[], Sequence[AnyStored]], where: str
) -> ValueRange | None:
    """Return the values that become black and white; None: the limits of the type of numbers.

    Args:
        requested: `data.value_range`.
        images: returns the images that "auto" inspects.
        where: name of the data set, for messages.

    Raises:
        UserError: the value is "auto", and all inspected images have the same value.
    """
    if requested is None:
        return None
    if not isinstance(requested, str):
        low, high = requested
        return float(low), float(high)
    found = range_of(deep_samples(images()))
    if found is not None and found[0] == found[1]:
        raise UserError(
            f"data.value_range: expected several values in the images of {where} for auto, got only "
            f"{found[0]:g}; set data.value_range=[LOW, HIGH]"
        )
    if found is not None:
        logger.info("data.value_range: auto is [%.10g, %.10g] for %s", *found, where)
    return found


class FoundValues(NamedTuple):
    """The lowest and the highest value of some images, and the values that become black and white."""

    found: ValueRange
    limits: ValueRange


def report_values(
    images: Sequence[AnyStored], value_range: ValueRange | None, where: str
) -> FoundValues | None:
    """Return the values of images that do not have 8 bits per channel; None if there are none.

    Images that use a small part of the range of their type, such as those of a camera of 12 bits in files of
    16 bits, would be almost black. The function logs a warning for them, once for each data set.

    Args:
        images: the images to inspect.
        value_range: the values of black and white; None: the limits of the type of numbers.
        where: name of the data set.
    """
    samples = deep_samples(images)
    found = range_of(samples)
    if found is None:
        return None
    if value_range is not None:
        return FoundValues(found, value_range)
    white = white_of(samples[0])
    share = max(float(one.values.max()) / white_of(one) for one in samples)
    if share < _DARK and where not in _reported:
        _reported.add(where)
        logger.warning(
            "data.value_range: the images of %s are dark, because the inspected values are %.10g to %.10g "
            "and white is %.10g; set data.value_range=[%.10g, %.10g], another range, or auto",
            where, *found, white, *found,
        )  # fmt: skip
    return FoundValues(found, (0.0, float(white)))


def range_of(samples: Sequence[Samples]) -> ValueRange | None:
    """Return the lowest and the highest value of images; None without images."""
    if not samples:
        return None
    return min(float(one.values.min()) for one in samples), max(float(one.values.max()) for one in samples)


def deep_samples(images: Sequence[AnyStored]) -> list[Samples]:
    """Return the finite numbers of those images that do not have 8 bits per channel and can be read.

    The function omits the opacity of an image.
    """
    found = [_samples(image.image if isinstance(image, RowImages) else image) for image in images]
    return [samples for samples in found if samples is not None and samples.values.size]


def _samples(image: StoredImage) -> Samples | None:
    try:
        data = image.read()
        if not isinstance(data, PIL.Image.Image | np.ndarray):
            # tifffile reads kinds of TIFF files that Pillow cannot open.
            with suppress(PIL.UnidentifiedImageError), PIL.Image.open(io.BytesIO(data)) as opened:
                if not is_deep(opened, data):
                    return None
        decoded = _numbers(data)
    except Exception:  # a broken image, which the loader reports
        return None
    if not isinstance(decoded, Samples) or decoded.values.dtype.kind not in "iuf" or keeps_values(decoded):
        return None
    values = decoded.values[..., :-1] if has_opacity(decoded.values) else decoded.values
    return decoded._replace(values=values[np.isfinite(values)])


def _numbers(data: ImageData) -> Decoded:
    """Return the numbers of an image that does not have 8 bits per channel."""
    try:
        return read_image(data, exact=True)
    except BrokenImage:  # without the extra, Pillow reads the upper 8 of 16 bits
        decoded = read_image(data)
        if isinstance(decoded, Samples):
            return decoded
        return Samples(np.asarray(decoded.convert("RGB")).astype(np.uint16) * 257)
