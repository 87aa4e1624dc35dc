# SPDX-License-Identifier: Apache-2.0
"""Class labels have one rule in a column, in lists, in boxes and in a stream."""

import unicodedata

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets.table import InMemoryTable
from messages import mentions

from hf_ssl.data import DataConfig
from hf_ssl.data.boxes import read_objects
from hf_ssl.data.class_numbers import matching_numbers, number_classes
from hf_ssl.data.columns import label_values
from hf_ssl.data.sources import Source, open_source
from hf_ssl.data.stream import StreamShards
from hf_ssl.errors import UserError

CLASSES = ClassLabel(names=["a", "b"])
BOX = [0.0, 0.0, 8.0, 8.0]


def table(column: list, feature) -> Dataset:
    """Return a data set as a file can contain it; `Dataset.from_dict` rejects some of these numbers."""
    schema = Features({"c": feature}).arrow_schema
    return Dataset(InMemoryTable(pa.table({"c": column}, schema=schema)))


def in_column(numbers: list) -> list[int]:
    return label_values(table(numbers, CLASSES), "c", "here")[0].tolist()


def in_lists(numbers: list) -> list[list[int]]:
    return label_values(table([numbers], List(CLASSES)), "c", "here")[0].tolist()


def in_boxes(numbers: list, kind=CLASSES) -> list[int]:
    feature = {"bbox": List(List(Value("float32"))), "label": List(kind)}
    data = table([{"bbox": [BOX] * len(numbers), "label": numbers}], feature)
    return read_objects(data, "c", "xywh", "here").images[0].classes.tolist()


def in_stream(numbers: list) -> list[int]:
    images = open_source(DataConfig(path="digits"), "train").dataset.select(range(len(numbers)))
    data = images.remove_columns("label").add_column("label", numbers, feature=CLASSES)
    source = Source(data.to_iterable_dataset(), "image", "label", True, None, "", "here")
    return next(StreamShards(source, 1, "label").blocks(0)).labels


@pytest.mark.parametrize("read", [in_column, in_lists, in_boxes, in_stream])
def test_a_class_number_without_a_name_is_an_error(read) -> None:
    read([1, 0])
    with pytest.raises(UserError, match=mentions("here", 5)):
        read([1, 5, 0])


@pytest.mark.parametrize("read", [in_column, in_stream])
def test_every_missing_label_is_minus_one(read) -> None:
    assert read([-2, 1, None, -1]) == [-1, 1, -1, -1]


def test_whole_numbers_in_a_column_of_fractions_are_classes_of_boxes_too() -> None:
    assert in_boxes([7.0, 1.0, 7.0], Value("float32")) == [1, 0, 1]


def test_texts_with_accents_are_one_class_in_all_unicode_forms() -> None:
    """Tables from macOS and Linux can contain different Unicode forms of one name."""
    texts = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    assert texts[0] != texts[1]
    labels, names = number_classes([*texts, "bar"], "these images")
    assert labels.tolist() == [1, 1, 0] and names == ["bar", "caf\u00e9"]
    assert matching_numbers(texts, [texts[1]]).tolist() == [0, 0]


def test_spaces_at_the_ends_of_texts_have_no_effect_and_an_empty_text_is_a_missing_label() -> None:
    labels, names = number_classes(["cat", " cat", "", "dog ", "  ", "dog"], "here")
    assert (labels.tolist(), names) == ([0, 0, -1, 1, -1, 1], ["cat", "dog"])
    assert matching_numbers(["dog ", "cat"], [" cat", "dog"]).tolist() == [1, 0]
