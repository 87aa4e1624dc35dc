# SPDX-License-Identifier: Apache-2.0
"""Turns the data sets that people pass to a Trainer into a `Source`: of `datasets`, of torch, and lists."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch.utils.data
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from torch import Tensor

from hf_ssl.data.columns import find_image_column, find_optional_label_column, without_decoding
from hf_ssl.data.config import DataConfig
from hf_ssl.data.location import fingerprint
from hf_ssl.data.sources import Source, open_source
from hf_ssl.errors import UserError

_NAMES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp")
_KINDS = (
    "a datasets.Dataset or IterableDataset, a torch data set of images or of (image, label), a list of image "
    "files or images, or the path of a folder"
)


def as_source(data: Any, config: DataConfig, name: str = "train_dataset", *, labels: bool = False) -> Source:
    """Return the images of a data set. Encoded images are read without decoding them first.

    Args:
        data: a `datasets.Dataset` or `IterableDataset`, also mapped, filtered, interleaved or sharded; a
            map-style torch data set whose items are images or begin with one; a list of paths or images; the
            path of a folder; or a `Source`, which is returned. `hf_ssl.data.decode.stored_image` lists the
            accepted images.
        config: `image_column` and `label_column`, if they are not the only ones of their type. `path`, `name`
            and `split` have no effect, except for a folder.
        name: the argument that held `data`, for messages.
        labels: whether a folder must contain labels. Other data have labels or not.

    Raises:
        UserError: `data` is something else, contains no images, or has no unique column of images.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        return open_source(replace(config, path=os.fspath(data)), labels=labels)
    if isinstance(data, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, data))
        raise UserError(
            f"{name}: expected one split, got the splits {splits}; use {name}[{next(iter(data))!r}]"
        )
    if isinstance(data, Dataset):
        source = _of_dataset(data, config, name)
    elif isinstance(data, IterableDataset):
        source = _of_stream(data, config, name)
    elif (
        isinstance(data, Sequence) and len(data) and all(isinstance(item, str | os.PathLike) for item in data)
    ):
        files = [os.fspath(item) for item in data]
        table = Dataset.from_dict({"image": files}).cast_column("image", Image(decode=False))
        source = Source(table, "image", None, False, len(files), fingerprint(files), name)
    elif not isinstance(data, Mapping) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        source = _of_items(Items(data), name)
    elif isinstance(data, torch.utils.data.IterableDataset):
        raise UserError(
            f"{name}: expected {_KINDS}, got a torch IterableDataset, which cannot resume; use "
            "datasets.IterableDataset.from_generator"
        )
    else:
        raise UserError(f"{name}: expected {_KINDS}, got {type(data).__name__}")
    if source.num_rows == 0:
        raise UserError(f"{name}: expected images, got an empty data set")
    return source


class Items:
    """The images of a data set in Python: `items[row]` is an image or begins with one.

    Args:
        data: has `__len__` and `__getitem__`.
        column: the key of the image in each item; None if the item itself is or begins with the image.
    """

    def __init__(self, data: Any, column: str | None = None) -> None:
        self.data, self.column = data, column

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        item = self.data[row]
        return item if self.column is None else item[self.column]

    def select(self, rows: np.ndarray) -> "Items":
        """Return some rows, in the given order."""
        return Items(torch.utils.data.Subset(self.data, rows.tolist()), self.column)

    def labels(self, column: str | None) -> list[Any]:
        """Return the label of each item: a column, the `targets` of torchvision, or the second part of items.

        Raises:
            UserError: the items have no label.
        """
        if self.column is not None and column is not None:
            return [self.data[row][column] for row in range(len(self))]
        targets = getattr(self.data, "targets", None)
        if targets is not None and len(targets) == len(self):
            return list(map(int, targets))
        items = [self.data[row] for row in range(len(self))]
        if not all(isinstance(item, tuple | list) and len(item) >= 2 for item in items):
            raise UserError("eval_dataset: expected items (image, label), got items without a label")
        return [int(item[1]) for item in items]


def find_image_key(example: Mapping[str, Any], requested: str | None, name: str) -> str:
    """Return the key of the image in an example whose columns are not declared.

    Raises:
        UserError: the requested key is missing, or no key or several keys hold an image.
    """
    if requested is not None:
        if requested not in example:
            raise UserError(
                f"data.image_column: expected a column of {name}, got {requested!r}; use one of "
                f"{', '.join(map(str, example))}"
            )
        return requested
    found = [key for key, value in example.items() if _is_image(value)]
    named = [key for key in _NAMES if key in (found or example)]
    if len(found) == 1 or named:
        return found[0] if len(found) == 1 else named[0]
    raise UserError(
        f"data.image_column: expected one column of images in {name}, got {len(found)} in "
        f"{', '.join(map(str, example))}; use data=DataConfig(image_column=NAME)"
    )


def _is_image(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim in (2, 3)
    return isinstance(value, PIL.Image.Image) or (
        isinstance(value, dict) and value.keys() >= {"bytes", "path"}
    )


def _of_dataset(data: Dataset, config: DataConfig, name: str) -> Source:
    where = _described(data, name)
    label = find_optional_label_column(data.features, config.label_column, where)
    if data.format["type"] == "custom":  # `with_transform`: the function makes the images
        items = Items(data, find_image_key(data[0] if len(data) else {}, config.image_column, name))
        return _of_items(items, where, label)
    column = find_image_column(data.features, config.image_column, where)
    data = without_decoding(data, column)
    return Source(data, column, label, False, len(data), data._fingerprint, where)


def _of_stream(data: IterableDataset, config: DataConfig, name: str) -> Source:
    where = _described(data, name)
    features = data.features
    if features is not None and any(isinstance(feature, Image) for feature in features.values()):
        column = find_image_column(features, config.image_column, where)
        data = without_decoding(data, column)
    else:  # `map` without features, or a generator: the columns are known from the first example only
        first = next(iter(data.with_format(None)), None)
        if first is None:
            raise UserError(f"{name}: expected images, got an empty data set")
        column = find_image_key(first, config.image_column, name)
    label = config.label_column
    if features is not None:
        label = find_optional_label_column(features, label, where)
    return Source(data, column, label, True, None, "stream", where, whole_shards=False)


def _of_items(items: Items, where: str, label: str | None = None) -> Source:
    kind = type(items.data).__name__
    return Source(items, items.column or "image", label, False, len(items), kind, f"{where} ({kind})")


def _described(data: Dataset | IterableDataset, name: str) -> str:
    """Return a name for messages: "imagefolder (train)"."""
    parts = [part for part in (data.info.dataset_name or data.info.builder_name, data.split) if part]
    return f"{parts[0]} ({parts[1]})" if len(parts) == 2 else name
