# SPDX-License-Identifier: Apache-2.0
"""Which column holds the images, which the labels, and what is in them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, Value

from hf_ssl.data.decode import Encoded
from hf_ssl.errors import UserError

_IMAGE_DTYPES = ("binary", "large_binary", "string", "large_string")  # encoded bytes, or names of files


def find_image_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """The requested column, else the only one of the type Image.

    Raises:
        UserError: there is none, or more than one; `where` names the data set.
    """
    if requested is not None:
        feature = _requested(features, requested, "data.image_column", where)
        if not isinstance(feature, Image) and not (
            isinstance(feature, Value) and feature.dtype in _IMAGE_DTYPES
        ):
            raise UserError(
                f"expected data.image_column to hold images, encoded bytes or file names, got {requested!r} "
                f"of type "
                f"{_type_name(feature)} in {where}"
            )
        return requested
    found = [name for name, feature in features.items() if isinstance(feature, Image)]
    return _only(found, features, "images", "data.image_column", where)


def find_label_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """The requested column, else the only ClassLabel. Raises UserError as `find_image_column` does."""
    if requested is not None:
        feature = _requested(features, requested, "data.label_column", where)
        kinds = ("int", "uint", "string", "large_string", "bool")
        if not isinstance(feature, ClassLabel) and not (
            isinstance(feature, Value) and feature.dtype.startswith(kinds)
        ):
            raise UserError(
                f"expected data.label_column to hold classes (ClassLabel, integers or strings), got "
                f"{requested!r} of type {_type_name(feature)} in {where}"
            )
        return requested
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not found:
        raise UserError(
            f"{where} has no labels: they come from a column of classes (data.label_column=NAME chooses it), "
            "or from sub-folders if all images lie at the same depth; the columns are "
            f"{listing(features)}"
        )
    return _only(found, features, "classes", "data.label_column", where)


def label_values(dataset: Dataset, column: str) -> tuple[np.ndarray, list[str]]:
    """Labels of all rows.

    Returns:
        (N,) int64, -1 where there is no label; and the names of the classes. Integers that are no ClassLabel
        and strings are numbered in sorted order.
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


def encoded_images(table: pa.Table) -> list[Encoded]:
    """The images of a one-column table (Image that is not decoded, bytes, or file names); copies no bytes."""
    images: list[Encoded] = []
    for chunk in table.column(0).chunks:
        if pa.types.is_struct(chunk.type):
            names = [field.name for field in chunk.type]
            parts = dict(zip(names, chunk.flatten(), strict=True))
            contents, paths = parts["bytes"], parts["path"].to_pylist()
        elif pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
            contents, paths = pa.nulls(len(chunk), pa.binary()), chunk.to_pylist()
        else:
            contents, paths = chunk, [None] * len(chunk)
        images += [Encoded(scalar.as_buffer(), path) for scalar, path in zip(contents, paths, strict=True)]
    return images


def listing(features: Mapping[str, Any]) -> str:
    """The columns with their types, for messages."""
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items()) or "none"


def _requested(features: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    if name not in features:
        raise UserError(f"{where} has no column {name!r} for {key}; its columns are {listing(features)}")
    return features[name]


def _only(found: list[str], features: Mapping[str, Any], what: str, key: str, where: str) -> str:
    if len(found) == 1:
        return found[0]
    count = f"{len(found)} columns" if found else "no column"
    example = found[0] if found else "NAME"
    raise UserError(
        f"expected one column of {what} in {where}, found {count}: choose one with {key}={example}; the "
        f"columns are "
        f"{listing(features)}"
    )


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
