# SPDX-License-Identifier: Apache-2.0
"""Opens the labeled images of a split, of a part of a split, or of a data set in Python."""

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from hf_ssl.data.adapters import as_source
from hf_ssl.data.config import DataConfig
from hf_ssl.data.contents import same_contents
from hf_ssl.data.decoded import decoded_rows
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.labeled import LabeledImages
from hf_ssl.data.labels import LabeledRows, only_classes, read_labels
from hf_ssl.data.sources import Source, open_source
from hf_ssl.data.subsets import balanced_rows, divided_rows, proportional_rows
from hf_ssl.data.targets import CLASS_KINDS
from hf_ssl.errors import UserError
from hf_ssl.random import random_rows


def labeled_images(
    config: DataConfig,
    split: str,
    *,
    max_images: int | None = None,
    seed: int = 0,
    kinds: Collection[str] = CLASS_KINDS,
    balanced: bool = False,
) -> LabeledImages:
    """Open the labeled images of a split.

    Args:
        config: the data, with `cache`, `channels` and `label_column`. Its `max_images` has no effect.
        split: name of the split.
        max_images: largest number of images. They are chosen at random, with the class shares of the split.
        seed: seed of this choice.
        kinds: kinds of labels that the evaluation can use, see `read_labels`.
        balanced: whether to choose equal numbers of all classes, as far as possible.

    Raises:
        UserError: the errors of `open_source`; no column or several columns of classes; no row has a label.
    """
    source = _open(config, split, kinds)
    return label_source(source, config, max_images=max_images, seed=seed, kinds=kinds, balanced=balanced)


def _open(config: DataConfig, split: str, kinds: Collection[str]) -> Source:
    config = replace(config, max_images=None, streaming=False)
    return open_source(config, split, labels=only_classes(kinds), only_image=True)


def unlabeled_images(
    config: DataConfig, split: str, *, max_images: int | None = None, seed: int = 0
) -> LabeledImages:
    """Open images without reading labels. All images have the class 0, which has no name.

    The arguments and the errors are those of `labeled_images`, without the errors about labels.
    `max_images` images are chosen at random.
    """
    source = open_source(replace(config, max_images=None, streaming=False), split, only_image=True)
    source.require_rows()
    count = len(source.dataset)
    if max_images is not None and max_images < count:
        source = source.select(random_rows(count, max_images, seed))
        count = max_images
    rows = decoded_rows(source, config.channels, config.cache) or EncodedRows(source, config.channels)
    labels = np.zeros(count, dtype=np.int64)
    return LabeledImages(source, rows, labels, [], config.max_broken_fraction, config.channels)


def label_source(
    source: Source,
    config: DataConfig,
    *,
    max_images: int | None = None,
    seed: int = 0,
    kinds: Collection[str] = CLASS_KINDS,
    balanced: bool = False,
) -> LabeledImages:
    """Return the labeled images of a source of map-style data.

    Args:
        source: the images.
        config, max_images, seed, balanced: see `labeled_images`.
        kinds: see `read_labels`.

    Raises:
        UserError: the source is a stream or has no labels.
    """
    return _labeled_images(_limited(read_labels(source, config, kinds), max_images, seed, balanced), config)


def _limited(found: LabeledRows, count: int | None, seed: int, balanced: bool = False) -> LabeledRows:
    """Return `count` random rows; all rows for None."""
    labels = found.labels
    if count is None or count >= len(labels):
        return found
    choose = balanced_rows if balanced and labels.ndim == 1 else proportional_rows
    return found.select(choose(labels, count, seed))


def _labeled_images(found: LabeledRows, config: DataConfig) -> LabeledImages:
    source = found.source
    rows = decoded_rows(source, config.channels, config.cache) or EncodedRows(source, config.channels)
    share = config.max_broken_fraction
    return LabeledImages(
        source, rows, found.labels, found.class_names, share, config.channels, found.targets, found.objects
    )


def divided_images(
    config: DataConfig,
    split: str,
    fraction: float,
    names: tuple[str, str],
    *,
    limits: tuple[int | None, int | None] = (None, None),
    seed: int = 0,
    kinds: Collection[str] = CLASS_KINDS,
) -> tuple[LabeledImages, LabeledImages]:
    """Divide the labeled images of a split into a training part and a test part.

    Both parts have the class shares of the split. Images with the same content are in one part. The division
    depends on the images, the fraction and the seed, but not on the limits.

    Args:
        config, split, kinds: see `labeled_images`.
        fraction: share of the images in the test part.
        names: names of both parts, for messages.
        limits: largest number of images of each part, see `labeled_images`.
        seed: seed of the division and of the limited choices.

    Raises:
        UserError: the errors of `labeled_images`; a part has no images; or most files of a folder are in no
            split because of names such as "train".
    """
    source = _open(config, split, kinds)
    if source.count is not None and split in source.count.splits:
        source.count.require_most_files(split, "evaluation.train_split")
    found = read_labels(source, config, kinds)
    same = same_contents([found.source])
    groups = np.arange(len(found.labels)) if same is None else same[0]
    divided = divided_rows(found.labels, groups, fraction, seed)
    parts = []
    for rows, name, limit in zip(divided, names, limits, strict=True):
        if not len(rows):
            raise UserError(
                f"evaluation.test_fraction: expected images in both parts of {found.source.description}, got "
                f"none in the part {name}; use another fraction"
            )
        part = _labeled_images(_limited(found.select(rows), limit, seed), config)
        part.description = f"{config.path} ({name})"
        parts.append(part)
    return parts[0], parts[1]


def label_data(
    data: Any,
    config: DataConfig,
    name: str,
    max_images: int | None = None,
    kinds: Collection[str] = CLASS_KINDS,
) -> LabeledImages:
    """Return the labeled images of a data set, in the forms of `as_source`.

    Args:
        data: labeled images, or a `LabeledImages`, which is returned.
        config: see `as_source`. Its `max_images` and `streaming` have no effect.
        name: the argument that held `data`, for messages.
        max_images: see `labeled_images`.
        kinds: see `read_labels`.

    Raises:
        UserError: the errors of `as_source` and `label_source`.
    """
    if isinstance(data, LabeledImages):
        return data
    config = replace(config, max_images=None, streaming=False)
    labels = only_classes(kinds) or not isinstance(data, str | os.PathLike)
    source = as_source(data, config, name, labels=labels, only_image=True)
    return label_source(source, config, max_images=max_images, kinds=kinds)
