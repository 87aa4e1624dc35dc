# SPDX-License-Identifier: Apache-2.0
"""Gallery of images and search for the nearest neighbors of a photo.

A saved gallery consists of two files and contains no pickled objects. `index.faiss` has the format of faiss
and holds unit vectors; their inner product is the cosine. `gallery.parquet` holds the thumbnail and the label
of each image. The extra `demo` installs faiss. Without faiss, the functions for galleries raise `UserError`.
"""

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor, nn

from hf_ssl.data.decode import as_pillow
from hf_ssl.errors import UserError, first_line
from hf_ssl.evaluation.features import extract_features
from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.statistics import unit_rows
from hf_ssl.modeling.pooling import Pooling
from hf_ssl.resources import require

INDEX, IMAGES = "index.faiss", "gallery.parquet"
THUMBNAIL_SIDE = 192
LOSSLESS_SIDE = 96  # images with edges up to this many pixels are stored as PNG
_JPEG_QUALITY = 88


class Neighbor(NamedTuple):
    """Number of an image in the gallery, its cosine similarity in [-1, 1], and its label or None."""

    number: int
    similarity: float
    label: str | None


class Gallery:
    """Images with their features.

    Args:
        index: faiss index with one unit vector per image.
        thumbnails: encoded pictures, PNG or JPEG.
        labels: one label per image; None: no labels.
    """

    def __init__(self, index: Any, thumbnails: Sequence[bytes], labels: Sequence[str] | None) -> None:
        if not index.ntotal == len(thumbnails) == len(labels or thumbnails):
            raise UserError(
                f"gallery: expected as many thumbnails and labels as vectors, got {len(thumbnails)}, "
                f"{'none' if labels is None else len(labels)} and {index.ntotal}"
            )
        self.index = index
        self.thumbnails = list(thumbnails)
        self.labels = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.thumbnails)

    def nearest(self, features_ND: Tensor, k: int) -> list[list[Neighbor]]:
        """Return the k nearest images for each row of features (N, D), nearest first.

        If the gallery has fewer than k images, the function returns all of them.

        Raises:
            UserError: k is below 1, or the features have another size D or are not finite.
        """
        if k < 1:
            raise UserError(f"gallery.k: expected at least 1 neighbor, got {k}")
        vectors = _unit_rows(features_ND)
        if vectors.shape[1] != self.index.d:
            raise UserError(
                f"gallery: expected feature size {self.index.d}, got {vectors.shape[1]}; use the same encoder"
            )
        similarities, numbers = self.index.search(vectors, min(k, len(self)))
        return [
            [
                Neighbor(int(number), float(value), None if self.labels is None else self.labels[number])
                for number, value in zip(row, values, strict=True)
            ]
            for row, values in zip(numbers, similarities, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write `index.faiss` and `gallery.parquet`."""
        _faiss().write_index(self.index, str(folder / INDEX))
        labels = pa.nulls(len(self), pa.string()) if self.labels is None else pa.array(self.labels)
        table = pa.table({"thumbnail": pa.array(self.thumbnails, pa.binary()), "label": labels})
        pq.write_table(table, folder / IMAGES, compression="none")  # the pictures are already compressed

    @classmethod
    def load(cls, folder: Path) -> "Gallery":
        """Return the gallery that `save` wrote.

        Raises:
            UserError: a file does not exist or cannot be read.
        """
        faiss = _faiss()
        try:
            table = pq.read_table(folder / IMAGES)
            index = faiss.read_index(str(folder / INDEX))
        except (OSError, RuntimeError, pa.ArrowInvalid) as error:
            raise UserError(f"{folder}: expected a gallery, got {first_line(error)}") from error
        column = table.column("label")
        labels = None if column.null_count else column.to_pylist()
        return cls(index, table.column("thumbnail").to_pylist(), labels)


def build_gallery(
    features_ND: Tensor, thumbnails: Sequence[bytes], labels: Sequence[str] | None = None
) -> Gallery:
    """Return a gallery of features, thumbnails and labels.

    Args:
        features_ND: features (N, D) from `embed_gallery`. The function normalizes each row.
        thumbnails: N encoded pictures.
        labels: N labels; None: no labels.

    Raises:
        UserError: faiss is not installed, the numbers of rows differ, or the features are not finite.
    """
    vectors = _unit_rows(features_ND)
    index = _faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return Gallery(index, thumbnails, labels)


def embed_gallery(
    model: nn.Module,
    processor: Any,
    image_batches: Iterable[list[Tensor]],
    *,
    pooling: Pooling = "auto",
    thumbnail_side: int = THUMBNAIL_SIDE,
    total: int | None = None,
    description: str | None = None,
) -> tuple[Tensor, list[bytes]]:
    """Return features (N, D) and thumbnails of images from one pass.

    Args:
        model, processor, image_batches, pooling, total, description: see `extract_features`.
        thumbnail_side: longest edge of the thumbnails in pixels.

    Raises:
        UserError: faiss is not installed (checked first), or `extract_features` raises.
    """
    _faiss()
    thumbnails: list[bytes] = []

    def passed_on() -> Iterator[list[Tensor]]:
        for images in image_batches:
            thumbnails.extend(thumbnail(image, thumbnail_side) for image in images)
            yield images

    features = extract_features(
        model, processor, passed_on(), pooling=pooling, total=total, description=description
    )
    return features, thumbnails


def thumbnail(image: Tensor, side: int = THUMBNAIL_SIDE) -> bytes:
    """Return an encoded small picture of a uint8 image (1 or 3, H, W).

    If both edges have at most 96 pixels (and at most `side`), it is a PNG of the unchanged pixels. Otherwise
    it is a JPEG whose longest edge has at most `side` pixels.
    """
    picture = as_pillow(image)
    file = io.BytesIO()
    if max(picture.size) <= min(LOSSLESS_SIDE, side):
        picture.save(file, "PNG", optimize=True)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


@dataclass(frozen=True)
class Retriever:
    """An encoder, its processor and a gallery of features from this encoder."""

    model: nn.Module
    processor: Any
    gallery: Gallery
    pooling: Pooling = "auto"

    def neighbors(self, photo: Tensor, k: int = 10) -> list[Neighbor]:
        """Return the k nearest images of the gallery for a uint8 photo (C, H, W), nearest first."""
        features = extract_features(self.model, self.processor, [[photo]], pooling=self.pooling)
        (found,) = self.gallery.nearest(features, k)
        return found

    def neighbours(self, photo: Tensor, k: int = 10) -> list[Neighbor]:
        """Return the same as `neighbors`, which replaces this deprecated name."""
        warnings.warn("Retriever.neighbours is deprecated; use neighbors", FutureWarning, stacklevel=2)
        return self.neighbors(photo, k)


def _unit_rows(features_ND: Tensor) -> np.ndarray:
    return unit_rows(check_features(features_ND, "gallery").float()).contiguous().numpy()


def _faiss() -> Any:
    require("gallery", "demo", {"faiss": "faiss"})
    import faiss

    return faiss
