# SPDX-License-Identifier: Apache-2.0
"""Rows of map-style data to pixels, from their encoded bytes or from a store of decoded images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ssl.data.batch import SMALL
from hf_ssl.data.broken import UnreadableData
from hf_ssl.data.columns import encoded_images
from hf_ssl.data.decode import BrokenImage, Encoded, decode, size_in_header
from hf_ssl.data.sources import Source

_PROBED = 64


def decode_or_reason(image: Encoded, channels: int) -> Tensor | BrokenImage:
    """(C, H, W) uint8, or why there is none."""
    try:
        return decode(image.read(), channels)
    except BrokenImage as error:
        return error


def message(place: str, image: Encoded, reason: object) -> str:
    """What is said about a broken image: where it is, and what is the matter."""
    return f"{place}{f' ({image.path})' if image.path else ''}: {reason}"


class EncodedRows:
    """The images of map-style data, read in batches and decoded each time."""

    def __init__(self, source: Source, channels: int) -> None:
        if not isinstance(source.dataset, Dataset):
            raise TypeError(f"expected map-style data, got the stream {source.description}")
        self.table = source.dataset.select_columns([source.image_column]).with_format("arrow")
        self.channels = channels
        self.description = source.description
        self._numbers = source.numbers

    def __len__(self) -> int:
        return len(self.table)

    def place(self, row: int) -> str:
        """Where a row is, for messages."""
        return f"{self.description} row {row if self._numbers is None else self._numbers[row]}"

    def encoded(self, rows: Sequence[int] | np.ndarray) -> list[Encoded]:
        return encoded_images(self.table[rows])

    def read(self, rows: np.ndarray) -> tuple[list[Tensor], dict[int, str]]:
        """Decodes rows.

        Returns:
            (C, H, W) uint8 tensors, empty ones (C, 0, 0) where the image is broken; and position in `rows` ->
            message.
        """
        images: list[Tensor] = []
        broken: dict[int, str] = {}
        for position, image in enumerate(self.encoded(rows)):
            pixels = decode_or_reason(image, self.channels)
            if isinstance(pixels, BrokenImage):
                broken[position] = message(self.place(int(rows[position])), image, pixels)
                pixels = torch.empty(self.channels, 0, 0, dtype=torch.uint8)
            images.append(pixels)
        return images, broken


@dataclass(frozen=True)
class Probe:
    """What a look at some images shows.

    Attributes:
        size: (H, W) if all that could be read have it, else None.
    """

    size: tuple[int, int] | None

    @property
    def small(self) -> bool:
        return self.size is not None and max(self.size) <= SMALL


def probe(source: Source, channels: int) -> Probe:
    """Looks at 64 images of map-style data, spread evenly. Raises UserError if none of them can be read."""
    key = ("probe", channels)
    if key not in source.stores:
        rows = EncodedRows(source, channels)
        chosen = np.unique(np.linspace(0, len(rows) - 1, _PROBED).astype(np.int64))
        places = [rows.place(row) for row in chosen.tolist()]
        source.stores[key] = probe_images(rows.encoded(chosen), places, channels, source.description)
    return source.stores[key]


def probe_images(images: list[Encoded], places: list[str], channels: int, description: str) -> Probe:
    """Return the same as `probe`, for given images.

    This function reads the sizes from the headers and decodes one image of each size. It stops as soon as
    two decoded sizes differ.
    """
    sizes: dict[tuple[int, int], tuple[int, int]] = {}  # in the header -> decoded
    broken: list[str] = []
    for place, image in zip(places, images, strict=True):
        try:
            expected = size_in_header(image)
        except BrokenImage as error:
            broken.append(message(place, image, error))
            continue
        if expected in sizes:
            continue
        pixels = decode_or_reason(image, channels)
        if isinstance(pixels, BrokenImage):
            broken.append(message(place, image, pixels))
            continue
        sizes[expected] = (pixels.shape[1], pixels.shape[2])
        if len(set(sizes.values())) > 1:
            return Probe(None)
    if not sizes:
        raise UnreadableData(f"none of the tested images in {description} can be read; one is {broken[0]}")
    return Probe(next(iter(sizes.values())))
