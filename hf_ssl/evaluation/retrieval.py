# SPDX-License-Identifier: Apache-2.0
"""A gallery of images that can be asked for the nearest neighbours of a photo.

A saved gallery is two files and nothing pickled: `index.faiss` (faiss's own format: unit vectors, compared
by inner product, which is the cosine) and `gallery.parquet` (thumbnail and label of each image). faiss comes
with the extra `demo`; without it there is no gallery, and a sentence says so.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.evaluation.features import extract_features
from hf_ssl.modeling.pooling import Pooling

INDEX, IMAGES = "index.faiss", "gallery.parquet"
THUMBNAIL_SIDE = 192
LOSSLESS_SIDE = 96  # images up to this are kept as they are
_JPEG_QUALITY = 88


class Neighbour(NamedTuple):
    """Number in the gallery, cosine similarity in [-1, 1], and the label where there is one."""

    number: int
    similarity: float
    label: str | None


class Gallery:
    """Images with their features.

    Args:
        index: a faiss index of unit vectors, one an image.
        thumbnails: encoded pictures, PNG or JPEG.
        labels: one an image; None: there are none.
    """

    def __init__(self, index: Any, thumbnails: Sequence[bytes], labels: Sequence[str] | None) -> None:
        if not index.ntotal == len(thumbnails) == len(labels or thumbnails):
            raise UserError(
                f"expected as many thumbnails and labels as vectors, got {len(thumbnails)}, "
                f"{'none' if labels is None else len(labels)} and {index.ntotal}."
            )
        self.index = index
        self.thumbnails = list(thumbnails)
        self.labels = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.thumbnails)

    def nearest(self, features_ND: Tensor, k: int) -> list[list[Neighbour]]:
        """The k nearest images of each row of features, nearest first; all images where there are fewer.

        Raises:
            UserError: k below 1, features of another size or that are not finite.
        """
        if k < 1:
            raise UserError(f"expected 1 neighbour or more, got {k}.")
        vectors = _unit_rows(features_ND)
        if vectors.shape[1] != self.index.d:
            raise UserError(
                f"expected features of {self.index.d} numbers, as the gallery has, got {vectors.shape[1]}."
            )
        similarities, numbers = self.index.search(vectors, min(k, len(self)))
        return [
            [
                Neighbour(int(number), float(value), None if self.labels is None else self.labels[number])
                for number, value in zip(row, values, strict=True)
            ]
            for row, values in zip(numbers, similarities, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write `index.faiss` and `gallery.parquet`."""
        _faiss().write_index(self.index, str(folder / INDEX))
        labels = pa.nulls(len(self), pa.string()) if self.labels is None else pa.array(self.labels)
        table = pa.table({"thumbnail": pa.array(self.thumbnails, pa.binary()), "label": labels})
        pq.write_table(table, folder / IMAGES, compression="none")  # the pictures are compressed already

    @classmethod
    def load(cls, folder: Path) -> "Gallery":
        """What `save` wrote. Raises UserError if it is not there or cannot be read."""
        faiss = _faiss()
        try:
            table = pq.read_table(folder / IMAGES)
            index = faiss.read_index(str(folder / INDEX))
        except (OSError, RuntimeError, pa.ArrowInvalid) as error:
            raise UserError(f"cannot read the gallery in {folder}: {str(error).splitlines()[0]}") from error
        labels = table.column("label")
        return cls(
            index,
            table.column("thumbnail").to_pylist(),
            None if labels.null_count else labels.to_pylist(),
        )


def build_gallery(
    features_ND: Tensor, thumbnails: Sequence[bytes], labels: Sequence[str] | None = None
) -> Gallery:
    """A gallery from features, as `embed_gallery` makes them; rows are made unit vectors.

    Raises:
        UserError: faiss is not installed; numbers that do not fit; features that are not finite.
    """
    index = _faiss().IndexFlatIP(features_ND.shape[1])
    index.add(_unit_rows(features_ND))
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
    """Features (N, D) and thumbnails of images, in one pass over them.

    Args:
        model, processor, image_batches, pooling, total, description: as for `extract_features`.
        thumbnail_side: longest edge in pixels.

    Raises:
        UserError: as `extract_features`; faiss is not installed, told before the work.
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
    """A small picture of a uint8 (1 or 3, H, W) image: PNG of its very pixels up to 96 of them a side, else a
    JPEG whose longest edge is `side` or less."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    if max(picture.size) <= min(LOSSLESS_SIDE, side):
        picture.save(file, "PNG", optimize=True)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        picture.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


@dataclass(frozen=True)
class Retriever:
    """An encoder with its processor and a gallery that it embedded."""

    model: nn.Module
    processor: Any
    gallery: Gallery
    pooling: Pooling = "auto"

    def neighbours(self, photo: Tensor, k: int = 10) -> list[Neighbour]:
        """The k images of the gallery that are most alike to a uint8 (C, H, W) photo, nearest first."""
        features = extract_features(self.model, self.processor, [[photo]], pooling=self.pooling)
        (found,) = self.gallery.nearest(features, k)
        return found


def _unit_rows(features_ND: Tensor) -> np.ndarray:
    if not bool(features_ND.isfinite().all()):
        raise UserError("the encoder's features are not finite: it cannot compare images.")
    return F.normalize(features_ND.float(), dim=1).contiguous().numpy()


def _faiss() -> Any:
    try:
        import faiss  # an extra
    except ImportError as error:
        raise UserError(
            'a gallery needs faiss, which is not installed: pip install "hf_ssl[demo]"'
        ) from error
    return faiss
