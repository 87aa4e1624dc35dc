# SPDX-License-Identifier: Apache-2.0
"""Turns the data sets that people pass to a Trainer into a `Source`: of `datasets`, of torch, and lists."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import PIL.Image
import torch.utils.data
from datasets import Array2D, Dataset, Image, IterableDataset, Value
from datasets.iterable_dataset import (
    CyclingMultiSourcesExamplesIterable,
    SkipExamplesIterable,
    TakeExamplesIterable,
)
from torch import Tensor

from hf_ssl.data.class_numbers import number_classes
from hf_ssl.data.columns import (
    LABEL_NAMES,
    declares_gray,
    find_image_columns,
    find_optional_label_column,
    label_values,
    without_decoding,
)
from hf_ssl.data.config import DataConfig
from hf_ssl.data.declared_classes import named_classes
from hf_ssl.data.decode import BrokenImage, stored_image
from hf_ssl.data.further_columns import AnyStored, RowImages, stored_further_image
from hf_ssl.data.location import fingerprint
from hf_ssl.data.sources import Source, open_source
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_COUNTING_STEPS = (CyclingMultiSourcesExamplesIterable, SkipExamplesIterable, TakeExamplesIterable)
_KINDS = (
    "a datasets.Dataset or IterableDataset, a torch data set of images or of (image, label), a list of image "
    "files or images, or the path of a folder"
)


def as_source(
    data: Any,
    config: DataConfig,
    name: str = "train_dataset",
    *,
    labels: bool = False,
    only_image: bool = False,
) -> Source:
    """Return the images of a data set. Encoded images are read without decoding them first.

    Args:
        data: a `datasets.Dataset` or `IterableDataset`, also mapped, filtered, interleaved or sharded; a
            map-style torch data set or a list; the path of a folder; or a `Source`, which is returned. The
            items of a torch data set or a list are images, begin with one, or are dicts that contain one.
            `hf_ssl.data.decode.stored_image` lists the accepted images.
        config: `image_column` and `label_column`, if they are not the only ones of their type,
            `further_image_columns`, and `max_images`. `path`, `name` and `split` have no effect, except for a
            folder.
        name: the argument that held `data`, for messages.
        labels: whether labels are needed. A folder must then contain them. If False, `label_column` has no
            effect.
        only_image: see `hf_ssl.data.open_source`.

    Raises:
        UserError: `data` is something else, contains no images, or has no unique column of images.
    """
    if isinstance(data, Source):
        return data
    if not labels:
        config = replace(config, label_column=None)  # the column may exist only in `eval_dataset`
    if isinstance(data, np.ndarray) and data.ndim == 3 and data.shape[2] in (3, 4):
        raise UserError(f"{name}: expected several images, got an array {data.shape}; use [image] for one")
    if isinstance(data, str | os.PathLike):
        return open_source(replace(config, path=os.fspath(data)), labels=labels, only_image=only_image)
    if isinstance(data, Mapping):
        keys = list(map(repr, data)) or ["no keys"]
        hint = f"use {name}[{keys[0]}]" if data else "load the images first"
        raise UserError(f"{name}: expected one data set, got a dict with {', '.join(keys)}; {hint}")
    if isinstance(data, Dataset):
        source = _of_dataset(data, config, name, only_image)
    elif isinstance(data, IterableDataset):
        source = _of_stream(data, config, name, only_image)
    elif (
        isinstance(data, Sequence) and len(data) and all(isinstance(item, str | os.PathLike) for item in data)
    ):
        files = [os.fspath(item) for item in data]
        table = Dataset.from_dict({"image": files}).cast_column("image", Image(decode=False))
        revision = fingerprint(list(map(os.path.abspath, files)))
        source = Source(table, "image", None, False, len(files), revision, name)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        items, label = Items(data), config.label_column
        try:
            first = items[0] if len(items) else None
        except Exception as error:  # `__len__` fails, for example for an array without dimensions
            raise UserError(f"{name}: expected a data set with a length, got {error}") from error
        if isinstance(first, Mapping) and not first.keys() >= {"bytes", "path"}:
            items.choose_columns(first, config, name, only_image)
            label = label or next((key for key in LABEL_NAMES if key in first), None)
        source = _of_items(items, name, label)
    elif isinstance(data, torch.utils.data.IterableDataset):
        raise UserError(
            f"{name}: expected {_KINDS}, got a torch IterableDataset, which cannot resume; use "
            "datasets.IterableDataset.from_generator"
        )
    else:
        lack = " without __len__" if hasattr(data, "__getitem__") else ""
        raise UserError(f"{name}: expected {_KINDS}, got {type(data).__name__}{lack}")
    if source.num_rows == 0:
        raise UserError(f"{name}: expected images, got an empty data set")
    if config.further_image_columns and not only_image and not source.further_columns:
        raise UserError(
            f"data.further_image_columns: expected the columns {', '.join(config.further_image_columns)} in "
            f"{name}, got images without columns; use a datasets.Dataset, or items that are dicts"
        )
    if source.streaming and config.max_images is not None:
        raise UserError(f"data.max_images: expected None for a stream, got {config.max_images}; use take")
    return source.with_value_range(config.value_range).limited(config.max_images)


class Items:
    """The images of a data set in Python: `items[row]` is an image, begins with one, or is a BrokenImage.

    Args:
        data: has `__len__` and `__getitem__`.
        column: the key of the image in each item; None if the item itself is or begins with the image.
        further: {key: kind} of further images in each item.
    """

    def __init__(
        self, data: Any, column: str | None = None, further: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.data, self.column, self.further = data, column, dict(further)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        try:
            item = self.data[row]
            return item if self.column is None else item[self.column]
        except Exception as error:  # the user's code can raise any error, for example for a damaged file
            return BrokenImage(f"{type(error).__name__}: {error}")

    def choose_columns(self, example: Any, config: DataConfig, name: str, only_image: bool) -> None:
        """Set the keys of the images, see `find_image_keys`."""
        self.column, self.further = find_image_keys(example, config, name, only_image=only_image)

    def stored(self, row: int) -> AnyStored:
        """Return the image of a row, and its further images. Reading them raises BrokenImage."""
        if not self.further:
            return stored_image(self[row])
        try:
            item = self.data[row]
            images = {
                key: (kind, stored_further_image(item[key], kind)) for key, kind in self.further.items()
            }
            return RowImages(stored_image(item[self.column]), images)
        except Exception as error:  # as in `__getitem__`
            return stored_image(BrokenImage(f"{type(error).__name__}: {error}"))

    def select(self, rows: np.ndarray) -> "Items":
        """Return some rows, in the given order."""
        return Items(torch.utils.data.Subset(self.data, rows.tolist()), self.column, self.further)

    def labels(self, column: str | None, where: str) -> tuple[np.ndarray, list[str]]:
        """Return the labels (N,) int64, -1 for items without one, and the names of the classes.

        The labels are a column, the `targets` of torchvision, or the second parts of items (image, label).
        Class numbers have the names that the data set declares (`hf_ssl.data.declared_classes`).

        Args:
            column: the key of the label in each item, if the items are dicts.
            where: name of the data set, for messages.

        Raises:
            UserError: the items have no label, or a label is neither a whole number nor text.
        """
        if isinstance(self.data, Dataset) and column is not None:
            return label_values(self.data.with_format(None), column, where)
        transformed = getattr(self.data, "target_transform", None) is not None
        labels = None if transformed else getattr(self.data, "targets", None)
        if not isinstance(labels, Sequence | np.ndarray | Tensor) or len(labels) != len(self):
            key = 1 if self.column is None else column
            labels = [_part(self.data, row, key) for row in range(len(self))]
            if isinstance(self[0], BrokenImage) and set(labels) == {None}:
                raise UserError(
                    f"{where}: expected items that can be read, got {self[0]}; correct the data set"
                )
            if any(label is _MISSING for label in labels):
                form = "(image, label)" if key == 1 else f"with the key {column or 'label'}"
                raise UserError(
                    f"{where}: expected items {form}, got items without a label; add it, or use "
                    "data=DataConfig(label_column=NAME) for items with another key"
                )
        labels = list(labels)
        numbers, names = number_classes(labels, where)
        is_number = names and not any(isinstance(label, str) for label in labels)
        if not is_number or not all(name.isdecimal() for name in names):
            return numbers, names
        given = np.array([int(name) for name in names], np.int64)
        values = np.where(numbers < 0, -1, given[numbers])
        return named_classes(self.data, values, column) or (numbers, names)


_MISSING = object()


def _part(data: Any, row: int, key: Any) -> Any:
    """Return a part of an item: None if it is a broken image, `_MISSING` if the item has no such part."""
    item = Items(data)[row]
    if isinstance(item, BrokenImage):
        return None
    is_pair = isinstance(item, tuple | list) and len(item) >= 2
    return item[key] if (is_pair if key == 1 else key in item) else _MISSING


def find_image_keys(
    example: Mapping[str, Any], config: DataConfig, name: str, *, only_image: bool
) -> tuple[str, dict[str, str]]:
    """Return the key of the image in an example whose columns are not declared, and the further ones.

    Args:
        example: a row.
        config, only_image: see `hf_ssl.data.columns.find_image_columns`.
        name: name of the data set, for messages.

    The rules and the errors are those of `find_image_columns`. An example that is not a dict also raises an
    error.
    """
    if not isinstance(example, Mapping):
        got = example if isinstance(example, BrokenImage) else type(example).__name__
        raise UserError(f"{name}: expected examples that are dicts such as {{'image': ...}}, got {got}")
    return find_image_columns(item_features(example), config, name, only_image=only_image)


def item_features(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of the columns of an example whose columns are not declared."""
    return {key: _feature(value) for key, value in example.items()}


def _feature(value: Any) -> Any:
    """Return the type of a column with this value. Values that may be file names are strings."""
    shape: tuple[int, ...] = value.shape if isinstance(value, Tensor | np.ndarray) else ()
    if len(shape) == 2:
        return Array2D(shape, "uint8")
    is_array = len(shape) == 3 and min(shape[0], shape[2]) <= 4
    is_stored = isinstance(value, dict) and value.keys() >= {"bytes", "path"}
    if is_array or is_stored or isinstance(value, PIL.Image.Image):
        return Image()
    is_number = isinstance(value, int | float | Tensor | np.ndarray | np.number)
    return Value("binary" if isinstance(value, bytes) else "float64" if is_number else "string")


def _of_dataset(data: Dataset, config: DataConfig, name: str, only_image: bool) -> Source:
    where = _described(data, name)
    label = find_optional_label_column(data.features, config.label_column, where)
    if data.format["type"] == "custom":  # `with_transform`: the function makes the images
        items = Items(data)
        if len(items):
            items.choose_columns(items[0], config, name, only_image)
        return _of_items(items, where, label)
    column, further = find_image_columns(data.features, config, where, only_image=only_image)
    is_gray = declares_gray(data.features[column])
    data = without_decoding(data, column, *further)
    return Source(
        data,
        column,
        label,
        False,
        len(data),
        data._fingerprint,
        where,
        further_columns=further,
        is_gray=is_gray,
    )


def _of_stream(data: IterableDataset, config: DataConfig, name: str, only_image: bool) -> Source:
    where, features, label = _described(data, name), data.features, config.label_column
    is_gray = False
    if features is not None:
        column, further = find_image_columns(features, config, where, only_image=only_image)
        is_gray = declares_gray(features[column])
        label = find_optional_label_column(features, label, where)
        data = without_decoding(data, column, *further)
    else:  # `map` without features, or a generator: the columns are known from the first example only
        first = next(iter(data.with_format(None)), None)
        if first is None:
            raise UserError(f"{name}: expected images, got an empty data set")
        column, further = find_image_keys(first, config, name, only_image=only_image)
    one_shard = data.num_shards > 1 and _counts_rows(data._ex_iterable)
    if one_shard:
        logger.warning(
            "%s is read as one shard, because take, skip, interleave_datasets and with_indices would choose "
            "other rows in each of its %d shards; every worker reads all of its rows", name, data.num_shards,
        )  # fmt: skip
    return Source(
        data,
        column,
        label,
        True,
        config.num_images,
        "stream",
        where,
        whole_shards=False,
        one_shard=one_shard,
        further_columns=further,
        is_gray=is_gray,
    )


def _counts_rows(step: Any) -> bool:
    """Return whether a step of a stream, or an earlier one, chooses rows by their numbers in the stream.

    `datasets` (seen with 5.2) divides the number of `take` and `skip` among the shards. It starts the numbers
    of `with_indices` and the cycles of `interleave_datasets` again in each shard. So the shards together have
    other rows than the stream, such as those that `skip` leaves out for a test.
    """
    content = vars(step)
    sources = [content["ex_iterable"]] if "ex_iterable" in content else content.get("ex_iterables", [])
    counts = isinstance(step, _COUNTING_STEPS) or content.get("with_indices", False)
    return counts or any(map(_counts_rows, sources))


def _of_items(items: Items, where: str, label: str | None = None) -> Source:
    kind = type(items.data).__name__
    return Source(
        items,
        items.column or "image",
        label,
        False,
        len(items),
        kind,
        f"{where} ({kind})",
        further_columns=items.further,
    )


def _described(data: Dataset | IterableDataset, name: str) -> str:
    """Return a name for messages: "imagefolder (train)"."""
    parts = [part for part in (data.info.dataset_name or data.info.builder_name, data.split) if part]
    return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else name
