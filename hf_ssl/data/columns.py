# SPDX-License-Identifier: Apache-2.0
"""Finds the columns of images and labels in a data set, and reads their values."""

import os
from collections.abc import Callable, Iterable, Mapping
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Image, IterableDataset, List, Value

from hf_ssl.data.boxes import object_columns
from hf_ssl.data.class_numbers import class_numbers, number_classes
from hf_ssl.data.config import DataConfig
from hf_ssl.data.decode import EncodedImage, StoredImage, stored_image
from hf_ssl.errors import UserError

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "F")
"""Modes of Pillow without color."""
_LISTED_CHARACTERS = 120


class _Role(NamedTuple):
    """What a column is for.

    Attributes:
        key: the key of a recipe that names the column.
        kind: the type of columns that are found without the key.
        dtypes: further types of a column that the key names.
        found_dtypes: those of `dtypes` that suffice to find a column with an unusual name, without the key.
        content: the types in words, for messages.
        example: value of the key in a message if no column has the type `kind`.
        names: usual names. A column with such a name is found if several columns have the type `kind`, or if
            none has it and the type of this column is in `dtypes`.
    """

    key: str
    kind: type
    dtypes: list[str]
    found_dtypes: list[str]
    content: str
    example: str
    names: tuple[str, ...]


IMAGE_NAMES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "cls")  # the last one is that of WebDataset
MASK_NAMES = (
    "mask", "masks", "label_mask", "annotation", "annotations", "segmentation", "segmentation_mask",
    "semantic_mask", "label", "labels",
)  # fmt: skip
"""Usual names of a column of masks. A column of classes can have the last two names, but another type."""
_STRUCT = "struct of bytes"
_BYTES = ("binary", "large_binary", "binary_view")
_IMAGE_DTYPES = [*_BYTES, _STRUCT, "Array2D", "Array3D"]
_IMAGES = _Role(
    "data.image_column",
    Image,
    [*_IMAGE_DTYPES, "string", "large_string", "string_view"],
    _IMAGE_DTYPES,
    "images (Image, encoded bytes, arrays or file names)",
    "NAME",
    IMAGE_NAMES,
)
_LABELS = _Role(
    "data.label_column",
    ClassLabel,
    (
        "int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 bool "
        "string large_string string_view"
    ).split(),
    [],
    "classes (ClassLabel, whole numbers, strings or lists of ClassLabel)",
    "NAME, or one folder per class, all at the same depth",
    LABEL_NAMES,
)


def find_image_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """Return the requested column of images, or the only possible one.

    The candidates are the first of these groups that is not empty:

    1. The columns of the type Image. If there is only one, and its name is not in `IMAGE_NAMES`, columns of
       bytes or arrays with a name in `IMAGE_NAMES` are also candidates.
    2. The columns of bytes, arrays or strings with a name in `IMAGE_NAMES`.
    3. All columns of bytes or arrays.

    The function returns a single candidate. Of several candidates, it returns the only one with a name in
    `IMAGE_NAMES`, or else the only one whose name is not in `MASK_NAMES`.

    Args:
        features: the columns with their types.
        requested: the value of `data.image_column`.
        where: name of the data set, for messages.

    Raises:
        UserError: no column or several columns are possible, or the requested column has another type.
    """
    return _find_column(features, requested, where, _IMAGES)


def find_image_columns(
    features: Mapping[str, Any], config: DataConfig, where: str, *, only_image: bool
) -> tuple[str, dict[str, str]]:
    """Return the column of images, and the further columns {name: kind} in the order of their names.

    The further columns are not candidates for the column of images.

    Args:
        features: the columns with their types.
        config: has `image_column` and `further_image_columns`.
        where: name of the data set, for messages.
        only_image: whether no further column is wanted. The columns may then be missing.

    Raises:
        UserError: see `find_image_column`; or a further column is missing or has another type.
    """
    wanted = dict(sorted(config.further_image_columns.items()))
    for column in {} if only_image else wanted:
        role = _IMAGES._replace(key=f"data.further_image_columns.{column}")
        _find_column(features, column, where, role)
    others = {
        name: feature
        for name, feature in features.items()
        if name not in wanted and name != config.mask_column
    }
    column = find_image_column(others, config.image_column, where)
    return column, {} if only_image else wanted


def find_mask_column(features: Mapping[str, Any], requested: str | None, image: str, where: str) -> str:
    """Return the column of masks: the requested column, or the only one with a name in `MASK_NAMES`.

    Args:
        features: the columns with their types.
        requested: the value of `data.mask_column`.
        image: the column of images.
        where: name of the data set, for messages.

    Raises:
        UserError: no column or several columns are possible, or the requested column has another type.
    """
    others = {name: feature for name, feature in features.items() if name != image}
    if requested is not None:
        return _find_column(others, requested, where, _IMAGES._replace(key="data.mask_column"))
    found = [
        name
        for name in MASK_NAMES
        if isinstance(others.get(name), Image) or _type_name(others.get(name)) in _IMAGE_DTYPES
    ]
    if len(found) == 1:
        return found[0]
    raise UserError(
        f"data.mask_column: expected one column of masks in {where}, with a name such as mask, got "
        f"{', '.join(found) or 'none'} in {_listing(others)}; use data.mask_column=NAME"
    )


def find_label_column(features: Mapping[str, Any], requested: str | None, where: str) -> str:
    """Return the requested column, the only column of the type ClassLabel, or one of `LABEL_NAMES`.

    A single column of the type ClassLabel with a name that is not in `LABEL_NAMES` is an error if another
    column of labels has a name in `LABEL_NAMES`.

    The rules, the arguments and the errors are those of `find_image_column`. If there is no such column, the
    result is the only column that contains boxes (`hf_ssl.data.boxes`).
    """
    boxes = object_columns(features)
    if requested is not None and requested in boxes:
        return requested
    has_labels = any(isinstance(each, ClassLabel) for each in features.values())
    if requested is None and len(boxes) == 1 and not has_labels and not features.keys() & set(LABEL_NAMES):
        return boxes[0]
    return _find_column(features, requested, where, _LABELS)


def find_optional_label_column(features: Mapping[str, Any], requested: str | None, where: str) -> str | None:
    """Return the column of `find_label_column`; None if no column is requested and no unique one exists.

    A column of boxes is returned only if it is requested.
    """
    try:
        found = find_label_column(features, requested, where)
        return None if requested is None and found in object_columns(features) else found
    except UserError:
        if requested is not None:
            raise
        return None


def _find_column(features: Mapping[str, Any], requested: str | None, where: str, role: _Role) -> str:
    if requested is None:
        found = [name for name, feature in features.items() if isinstance(feature, role.kind)]
        if len(found) == 1 and found[0] not in role.names:  # a column with a usual name may be meant
            usual = role.found_dtypes or role.dtypes
            found += [name for name in role.names if _type_name(features.get(name)) in usual]
            if role is _LABELS and len(found) > 1:
                raise UserError(
                    f"{role.key}: expected one column of classes in {where}, got {found[0]} (ClassLabel) and "
                    f"{found[1]} ({_type_name(features[found[1]])}); use {role.key}={found[1]} or {found[0]}"
                )
        found = found or [name for name in role.names if _has_type(features.get(name), role)]
        found = found or [name for name, kind in features.items() if _type_name(kind) in role.found_dtypes]
        images = [name for name in found if role is not _IMAGES or name not in MASK_NAMES]
        for candidates in (found, [name for name in found if name in role.names], images):
            if len(candidates) == 1:
                return candidates[0]
        nested = [name for name, feature in features.items() if role is _IMAGES and _is_nested_list(feature)]
        if nested and not found:
            raise UserError(
                f"{role.key}: expected {role.content} in {where}, got lists of numbers in {nested[0]!r}; "
                f"{_cast_of_lists(nested[0])}"
            )
        in_python = f", in Python data=DataConfig({role.key.removeprefix('data.')}=NAME)"
        lists = [name for name, feature in features.items() if _is_label_list(feature)]
        if role is _LABELS and not found and lists:
            raise UserError(
                f"{role.key}: expected one class for each image in {where}, got none in "
                f"{_listing(features)}; to use lists of classes, set {role.key}={lists[0]}{in_python}"
            )
        raise UserError(
            f"{role.key}: expected one column of the type {role.kind.__name__} in {where}, got {len(found)} "
            f"in {_listing(features)}; use {role.key}={found[0] if found else role.example}{in_python}"
        )
    feature = features.get(requested)
    if isinstance(feature, role.kind) or _has_type(feature, role):
        return requested
    if role is _LABELS and _is_label_list(feature):
        return requested  # images with several labels
    problem = "is missing" if feature is None else f"has the type {_type_name(feature)}"
    usable = {
        name: feature
        for name, feature in features.items()
        if isinstance(feature, role.kind)
        or _has_type(feature, role)
        or (role is _LABELS and _is_label_list(feature))
    }
    advice = f"use one of {_listing(usable)}" if usable else f"the columns are {_listing(features)}"
    if role is _LABELS and isinstance(feature, List):
        advice = f"for several labels of an image, cast {requested!r} to List(ClassLabel(names=[...]))"
    if role is _IMAGES and _is_nested_list(feature):
        advice = _cast_of_lists(requested)
    raise UserError(
        f"{role.key}: expected a column of {role.content} in {where}, got {requested!r}, which {problem}; "
        f"{advice}"
    )


def _is_label_list(feature: Any) -> bool:
    """Return whether a column has lists of classes, for images with several labels."""
    return isinstance(feature, List) and isinstance(feature.feature, ClassLabel)


def _is_nested_list(feature: Any) -> bool:
    """Return whether a column has lists of lists, such as pixels that were saved without an array type."""
    return isinstance(feature, List) and isinstance(feature.feature, List)


def _cast_of_lists(column: str) -> str:
    return f"cast {column!r} to datasets.Array3D((H, W, 3), 'uint8') or Array2D((H, W), 'uint8')"


def _has_type(feature: Any, role: _Role) -> bool:
    return _type_name(feature) in role.dtypes


def without_decoding(data: AnyDataset, *columns: str) -> AnyDataset:
    """Return the data set with encoded instead of decoded images in columns of known type."""
    features = cast(Mapping[str, Any], data.features)
    for column in columns:
        if isinstance(features[column], Image):
            data = data.cast_column(column, Image(decode=False))
    return data


def declares_gray(feature: Any) -> bool:
    """Return whether a column of images declares that they are gray, such as `Image(mode="L")`.

    `without_decoding` drops this mode, so its caller must apply it. Other modes need no conversion, because
    hf_ssl reads all images as RGB.
    """
    return isinstance(feature, Image) and feature.mode in GRAY_MODES


def named_files(dataset: Dataset, columns: Iterable[str]) -> list[str]:
    """Return the paths of the images that are not stored in their columns, in the order of the rows."""
    files: list[str] = []
    for column in columns:
        kind = dataset.features[column]
        if isinstance(kind, Image) or (_is_struct(kind) and "path" in kind):
            chunks = dataset.data.column(column).chunks
            if sum(chunk.field("bytes").null_count for chunk in chunks):
                paths = dataset.select_columns([column]).flatten().with_format(None)
                files += [path for path in paths[f"{column}.path"][:] if path]
        elif isinstance(kind, Value) and kind.dtype in ("string", "large_string", "string_view"):
            files += [path for path in dataset.select_columns([column]).with_format(None)[column][:] if path]
    return files


def label_values(dataset: Dataset, column: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Return the labels of all rows, and the names of the classes.

    Args:
        dataset, column: the data set, and its column of labels.
        where: name of the data set, for messages.

    Returns:
        labels: (N,) int64, -1 for a row without a label. For lists of classes, (N, K): 1 for the classes of
            the row, and 0 for the others. A row without a list contains only -1.
        class_names: names of the classes; label i has the name at index i. Strings, and numbers that are not
            a ClassLabel, are numbered in sorted order.

    Raises:
        UserError: a label is neither a whole number nor text, or a class number does not exist.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    feature = dataset.features[column]
    if isinstance(feature, List):
        return _label_matrix(values.to_pylist(), feature.feature.names, where)
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
        return class_numbers(values.to_pylist(), len(names), where), names
    return number_classes(values.to_pylist(), where)


def _label_matrix(rows: list[Any], names: list[str], where: str) -> tuple[np.ndarray, list[str]]:
    """Return 1 for the classes of each row, 0 for the others, and -1 for all if there is no list (N, K)."""
    matrix = np.zeros((len(rows), len(names)), np.int64)
    for number, classes in enumerate(rows):
        if classes is None:
            matrix[number] = -1
            continue
        matrix[number, class_numbers(classes, len(names), where, missing=False)] = 1
    return matrix, list(names)


def encoded_images(
    table: pa.Table, column: str, stored: Callable[[Any], StoredImage] = stored_image, folder: str = ""
) -> list[StoredImage]:
    """Return the images of a column of a table, without copying bytes.

    Args:
        table: N rows.
        column: holds structs of `bytes` and `path`, encoded bytes, arrays (H, W) or (H, W, C), or file names.
        stored: returns the image of an array, and that of None for a missing one.
        folder: where relative file names start; "" for the working folder.
    """
    images: list[StoredImage] = []
    for chunk in table.column(column).chunks:
        if isinstance(chunk.type, pa.ExtensionType):  # Array2D, Array3D
            # With missing rows, `to_numpy` would return floating-point numbers for whole numbers.
            arrays = iter(chunk.drop_null().to_numpy(zero_copy_only=False))
            images += [stored(next(arrays) if valid else None) for valid in chunk.is_valid().to_pylist()]
            continue
        if pa.types.is_struct(chunk.type):
            names = [field.name for field in chunk.type]
            parts = dict(zip(names, chunk.flatten(), strict=True))
            contents = parts["bytes"]
            contents = contents.cast(pa.binary()) if pa.types.is_null(contents.type) else contents
            paths = parts["path"].to_pylist() if "path" in parts else [None] * len(chunk)
        elif any(is_text(chunk.type) for is_text in _IS_TEXT):
            contents, paths = pa.nulls(len(chunk), pa.binary()), chunk.to_pylist()
        else:
            contents, paths = chunk, [None] * len(chunk)
        images += [
            EncodedImage(scalar.as_buffer(), path if scalar.is_valid else resolved(path, folder))
            for scalar, path in zip(contents, paths, strict=True)
        ]
    return images


_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def resolved(path: str | None, folder: str) -> str | None:
    """Return the path of a file that a table names. A relative name starts in `folder`."""
    return os.path.join(folder, path) if path and folder and "://" not in path else path


def first_relative_name(dataset: Any, columns: Iterable[str]) -> str | None:
    """Return the first relative file name in columns of images; None if a column contains no file names.

    Args:
        dataset: a `Dataset` or a stream with known columns, not decoded.
        columns: the columns.
    """
    row: dict[str, Any] = next(iter(dataset.select_columns(list(columns)).take(1)), {})
    for value in row.values():
        stored = value if isinstance(value, dict) else {"path": value if isinstance(value, str) else None}
        name = stored.get("path") if stored.get("bytes") is None else None
        if name and "://" not in name and not os.path.isabs(name):
            return name
    return None


def _is_struct(feature: Any) -> bool:
    """Return whether a column has the structs of encoded images that pandas and polars write."""
    kind = getattr(feature.get("bytes"), "dtype", None) if isinstance(feature, dict) else None
    return kind in _BYTES or (kind == "null" and "path" in feature)  # "null": all rows have only paths


def _listing(features: Mapping[str, Any]) -> str:
    """Return the names and types of the columns, for messages. A long list is cut."""
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    return shorten(columns, _LISTED_CHARACTERS, placeholder=" ...") or "no columns"


def _type_name(feature: Any) -> str:
    if isinstance(feature, List):
        return f"List of {_type_name(feature.feature)}"
    if _is_struct(feature):
        return _STRUCT
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
