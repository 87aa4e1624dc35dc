# SPDX-License-Identifier: Apache-2.0
"""Finds the columns of images and labels in a data set, and reads their values."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value

from hf_ssl.data.decode import EncodedImage, StoredImage
from hf_ssl.errors import UserError

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

_IMAGE_DTYPES = frozenset({"binary", "large_binary", "string", "large_string"})  # bytes, or file names
_LABEL_DTYPES = frozenset(
    "int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool string large_string string_view".split()
)
_LISTED_CHARACTERS = 120


def find_image_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """Return the requested column, or the only column of the type Image.

    Args:
        features: the columns with their types.
        requested: the value of `data.image_column`.
        where: name of the data set, for messages.

    Raises:
        UserError: no column or several columns are possible, or the requested column has another type.
    """
    if requested is not None:
        content = "images (Image, encoded bytes or file names)"
        return _check_column(features, requested, where, Image, _IMAGE_DTYPES, "data.image_column", content)
    return _only_column(features, where, Image, "data.image_column", "NAME")


def find_label_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """Return the requested column, or the only column of the type ClassLabel.

    The arguments and errors are those of `find_image_column`.
    """
    key = "data.label_column"
    if requested is not None:
        content = "classes (ClassLabel, integers or strings)"
        return _check_column(features, requested, where, ClassLabel, _LABEL_DTYPES, key, content)
    return _only_column(
        features, where, ClassLabel, key, "NAME, or one folder per class, all at the same depth"
    )


def _only_column(features: Mapping[str, Any], where: str, kind: type, key: str, example: str) -> str:
    """Return the only column of a type.

    Raises:
        UserError: no column or several columns have the type. The message recommends the first one, or the
            example, as the value of `key`.
    """
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"{key}: expected one column of the type {kind.__name__} in {where}, got {len(found)} in "
        f"{_listing(features)}; use {key}={found[0] if found else example}"
    )


def without_decoding(data: AnyDataset, column: str) -> AnyDataset:
    """Return the data set with encoded instead of decoded images in a column of known type."""
    features = cast(Mapping[str, Any], data.features)
    return data.cast_column(column, Image(decode=False)) if isinstance(features[column], Image) else data


def _check_column(
    features: Mapping[str, Any],
    requested: str,
    where: str,
    kind: type,
    dtypes: frozenset[str],
    key: str,
    content: str,
) -> str:
    """Return the requested column.

    Raises:
        UserError: the column is missing, or has neither the type `kind` nor one of the `dtypes`.
    """
    feature = features.get(requested)
    if isinstance(feature, kind) or (isinstance(feature, Value) and feature.dtype in dtypes):
        return requested
    found = "is missing" if feature is None else f"has the type {_type_name(feature)}"
    raise UserError(
        f"{key}: expected a column of {content} in {where}, got {requested!r}, which {found}; "
        f"use one of {_listing(features)}"
    )


def label_values(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Return the labels of all rows, and the names of the classes.

    Returns:
        labels: (N,) int64, -1 for a row without a label.
        class_names: names of the classes; label i has the name at index i. Strings, and integers
            that are no ClassLabel, are numbered in sorted order.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        labels = values.fill_null(-1).to_numpy().astype(np.int64)
        return labels, list(feature.names or map(str, range(labels.max(initial=-1) + 1)))
    present = values.drop_null()
    classes, positions = np.unique(np.asarray(present.to_pylist()), return_inverse=True)
    labels = np.full(len(values), -1, np.int64)
    labels[~values.is_null().to_numpy()] = positions
    return labels, [str(value) for value in classes]


def encoded_images(table: pa.Table) -> list[StoredImage]:
    """Return the images of a table with one column, without copying bytes.

    Args:
        table: N rows; the column holds structs of `bytes` and `path`, encoded bytes, or file names.
    """
    images: list[StoredImage] = []
    for chunk in table.column(0).chunks:
        if pa.types.is_struct(chunk.type):
            names = [field.name for field in chunk.type]
            parts = dict(zip(names, chunk.flatten(), strict=True))
            contents, paths = parts["bytes"], parts["path"].to_pylist()
        elif pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
            contents, paths = pa.nulls(len(chunk), pa.binary()), chunk.to_pylist()
        else:
            contents, paths = chunk, [None] * len(chunk)
        images += [
            EncodedImage(scalar.as_buffer(), path) for scalar, path in zip(contents, paths, strict=True)
        ]
    return images


def _listing(features: Mapping[str, Any]) -> str:
    """Return the names and types of the columns, for messages. A long list is cut."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    return shorten(columns, _LISTED_CHARACTERS, placeholder=" ...") or "no columns"


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
