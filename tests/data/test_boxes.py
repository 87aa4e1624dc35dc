# SPDX-License-Identifier: Apache-2.0
"""Columns of boxes: both layouts and formats, classes by name, and one sentence for each mistake."""

import logging
import re

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from messages import mentions

from hf_ssl.building import has_label_lists
from hf_ssl.data import DataConfig, LabeledImages, as_source, label_data
from hf_ssl.data.boxes import ImageObjects, Objects, object_columns, read_objects
from hf_ssl.data.class_numbers import matching_numbers
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig

NAMES = ["cell", "platelet"]
NUMBERS = List(Value("float32"), length=4)
LISTS = {"id": List(Value("int64")), "bbox": List(NUMBERS), "category": List(ClassLabel(names=NAMES))}
STRUCTS = List({"bbox": NUMBERS, "label": Value("string"), "iscrowd": Value("bool")})
BOXES = [[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 8.0, 8.0]], [], [[4.0, 4.0, 2.0, 2.0]]]


def images(count: int) -> list[PIL.Image.Image]:
    random = np.random.default_rng(0)
    return [PIL.Image.fromarray(random.integers(0, 255, (8, 10, 3), np.uint8)) for _ in range(count)]


def data_set(objects: list, feature=LISTS, names: list[str] | None = None) -> Dataset:
    if names is not None:
        feature = feature | {"category": List(ClassLabel(names=names))}
    columns = {"image": images(len(objects)), "objects": objects}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "objects": feature}))


def lists(boxes=BOXES, classes=((1, 0), (), (1,))) -> list:
    return [
        {"id": list(range(len(row))), "bbox": row, "category": list(numbers)}
        for row, numbers in zip(boxes, classes, strict=True)
    ]


def read(dataset: Dataset, **settings) -> LabeledImages:
    return label_data(dataset, DataConfig(**settings), "train")


def objects_of(dataset: Dataset, **settings) -> Objects:
    found = read(dataset, **settings).objects
    assert found is not None
    return found


def test_a_struct_of_lists_is_read_without_naming_the_column() -> None:
    found = read(data_set(lists()))
    assert found.has_boxes and found.has_several_labels and found.class_names == NAMES
    assert found.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    first, second, third = found.objects.images
    assert first.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 8, 8]] and first.classes.tolist() == [1, 0]
    assert second.boxes.shape == (0, 4) and third.boxes.tolist() == [[4, 4, 6, 6]]
    assert not first.crowd.any()


def test_a_list_of_structs_has_the_same_objects() -> None:
    rows = [
        [
            {"bbox": box, "label": NAMES[number], "iscrowd": number == 0}
            for box, number in zip(*row, strict=True)
        ]
        for row in zip(BOXES, ((1, 0), (), (1,)), strict=True)
    ]
    expected, found = objects_of(data_set(lists())), objects_of(data_set(rows, STRUCTS))
    assert found.class_names == NAMES, "texts are numbered in sorted order"
    for one, other in zip(expected.images, found.images, strict=True):
        assert np.array_equal(one.boxes, other.boxes) and np.array_equal(one.classes, other.classes)
    assert found.images[0].crowd.tolist() == [False, True]


def test_boxes_with_two_corners() -> None:
    corners = [[[x, y, x + w, y + h] for x, y, w, h in row] for row in BOXES]
    expected = objects_of(data_set(lists()))
    found = objects_of(data_set(lists(corners)), box_format="xyxy")
    assert all(
        np.array_equal(one.boxes, other.boxes)
        for one, other in zip(expected.images, found.images, strict=True)
    )


def test_objects_without_a_class_and_numbers_that_are_no_class_label() -> None:
    faces = {"bbox": List(NUMBERS)}
    (image,) = objects_of(data_set([{"bbox": BOXES[0]}], faces)).images
    assert image.classes.tolist() == [0, 0]
    numbers = {"bbox": List(NUMBERS), "category_id": List(Value("int64"))}
    found = objects_of(data_set([{"bbox": BOXES[0], "category_id": [90, 3]}], numbers))
    assert found.class_names == ["3", "90"] and found.images[0].classes.tolist() == [1, 0]


def test_a_row_without_objects_is_left_out_and_one_with_an_empty_list_is_not() -> None:
    rows = [*lists(), None]
    assert len(read(data_set(rows))) == 3
    assert len(label_data(data_set(rows), DataConfig(), "train", 2)) == 2


def test_the_column_of_classes_has_precedence() -> None:
    dataset = data_set(lists()).add_column("label", [0, 1, 0])
    assert not read(dataset).has_boxes
    assert read(dataset, label_column="objects").has_boxes
    assert object_columns(dataset.features) == ["objects"]
    for kinds in (["boxes"], ["boxes", "masks"]):
        assert label_data(dataset, DataConfig(), "train", kinds=kinds).has_boxes, "no other labels are wanted"
    assert as_source(data_set(lists()), DataConfig()).label_column is None, "training needs no boxes"
    assert object_columns({"objects": List(ClassLabel(names=NAMES)), "size": {"width": Value("int64")}}) == []


@pytest.mark.parametrize("feature", [LISTS, STRUCTS])
def test_a_named_column_of_boxes_has_several_labels(feature, tmp_path) -> None:
    data_set([None, None], feature).to_parquet(tmp_path / "train.parquet")
    config = DataConfig(path=str(tmp_path), label_column="objects")
    assert has_label_lists(config, EvaluationConfig())


def test_classes_are_compared_by_name() -> None:
    train, test = read(data_set(lists())), read(data_set(lists(), names=NAMES[::-1]))
    expected = read(data_set(lists(classes=((0, 1), (), (0,)))))
    test.classified_by(train)
    assert test.class_names == NAMES and torch.equal(test.labels, expected.labels)
    assert test.objects.images[0].classes.tolist() == [0, 1]
    other = read(data_set(lists(), names=["cell", "parasite"]))
    with pytest.raises(UserError, match=mentions("parasite")):
        other.classified_by(train)


def test_boxes_end_at_the_border_of_the_image() -> None:
    over = ImageObjects(np.array([[-2, 1, 5, 9]], np.float32), np.zeros(1, int), np.zeros(1, bool))
    inner = over._replace(boxes=np.array([[1, 1, 2, 2]], np.float32))
    found = Objects([over, inner, inner], ["a"], "xywh", "here").inside(np.array([[8, 10]] * 3))
    assert [each.boxes.tolist() for each in found] == [[[0, 1, 5, 8]], [[1, 1, 2, 2]], [[1, 1, 2, 2]]]


def test_a_box_outside_of_its_image_is_left_out_with_a_warning(caplog) -> None:
    boxes = np.array([[1, 1, 2, 2], [12, 1, 15, 4], [10, 1, 15, 4], [2, 2, 9, 7]], np.float32)
    image = ImageObjects(boxes, np.arange(4), np.array([False, False, True, True]))
    (found,) = Objects([image], list("abcd"), "xyxy", "here").inside(np.array([[8, 10]]))
    assert found.boxes.tolist() == boxes[[0, 3]].tolist()
    assert found.classes.tolist() == [0, 3] and found.crowd.tolist() == [False, True]
    assert re.search(r"2 of 4 boxes of here .*12\.0, 1\.0, 15\.0, 4\.0.* image 0 of 10 x 8", caplog.text)


@pytest.mark.parametrize(
    ("boxes", "parts"),
    [
        ([[12.0, 1.0, 3.0, 3.0], [1.0, 9.0, 3.0, 3.0]], ["data.box_format", 2, 3, "xyxy"]),  # both outside
        ([[4.0, 4.0, 9.0, 7.0], [3.0, 2.0, 8.0, 8.0]], ["data.box_format", 2, 3, "xyxy"]),  # two corners
    ],
)
def test_boxes_outside_of_the_image_end_in_one_sentence(boxes, parts) -> None:
    rows = lists([[[1.0, 1.0, 2.0, 2.0]], boxes], ((0,), (0,) * len(boxes)))
    with pytest.raises(UserError, match=mentions(*parts)):
        objects_of(data_set(rows)).inside(np.array([[8, 10], [8, 10]]))


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"id": [0], "bbox": [[1.0, 1.0, -2.0, 3.0]], "category": [0]}, [0, "xyxy"]),
        ({"id": [0], "bbox": [[1.0, 1.0, float("nan"), 3.0]], "category": [0]}, ["finite"]),
        ({"id": [0], "bbox": [None], "category": [0]}, ["four"]),
        ({"id": [0, 1], "bbox": [[1.0, 1.0, 2.0, 3.0]], "category": [0, 1]}, [1, 2, "objects"]),
        ({"id": [0], "bbox": [[1.0, 1.0, 2.0, 3.0]], "category": None}, [1, 0, "bbox", "category"]),
        ({"id": [0], "bbox": [[1.0, 1.0, 2.0, 3.0]], "category": [None]}, ["None", "cell"]),
        ({"id": [0], "bbox": [[1.0, 1.0, 2.0, 3.0]], "category": [-1]}, [-1, "cell"]),
    ],
)
def test_wrong_objects_end_in_one_sentence(row, parts) -> None:
    with pytest.raises(UserError, match=mentions(*parts)) as error:
        read(data_set([row, *lists()]))
    assert len(str(error.value)) <= 300


def test_incomplete_structs_and_shares_of_the_image_end_in_one_sentence() -> None:
    feature = {"bbox": List(NUMBERS), "iscrowd": List(Value("bool"))}
    with pytest.raises(UserError, match=mentions("2 of bbox", "1 of iscrowd")):
        read(data_set([{"bbox": BOXES[0], "iscrowd": [True]}], feature))
    with pytest.raises(UserError, match=mentions("four")):
        read(data_set([[None]], STRUCTS))
    shares = [[[0.2, 0.1, 0.5, 0.5]], [], [[0.0, 0.0, 1.0, 1.0]]]
    for box_format in ("xywh", "xyxy"):
        with pytest.raises(UserError, match=mentions("pixels", "objects")):
            read(data_set(lists(shares, ((1,), (), (1,)))), box_format=box_format)
    corners = [[[0.5, 0.5, 0.9, 0.8]], [], [[0.3, 0.2, 1.0, 1.0]]]  # read as xywh, corners above 1
    rounded = [[[0.2, 0.1, 0.8001, 0.5]], [], [[0.0, 0.0, 1.0, 1.0]]]
    for boxes in (corners, rounded):
        with pytest.raises(UserError, match=mentions("pixels", "objects", "xywh")):
            read(data_set(lists(boxes, ((1,), (), (1,)))))


@pytest.mark.parametrize(("kind", "value"), [("string", "0"), ("int64", 2)])
def test_other_values_of_iscrowd_than_0_and_1_are_an_error(kind: str, value: object) -> None:
    """The text "0" is true in Python, so the box would be a crowd."""
    feature = {"bbox": List(NUMBERS), "iscrowd": List(Value(kind))}
    with pytest.raises(UserError, match=mentions("iscrowd", repr(value))):
        read(data_set([{"bbox": BOXES[0], "iscrowd": [value] * 2}], feature))


def test_a_class_number_without_a_name_and_a_negative_number() -> None:
    feature = {"bbox": List(NUMBERS), "category_id": List(Value("int64"))}
    with pytest.raises(UserError, match=mentions(-3)):
        read(data_set([{"bbox": BOXES[0], "category_id": [0, -3]}], feature))


def test_boxes_without_an_area_are_not_used(caplog) -> None:
    flat = lists([[[1.0, 1.0, 0.0, 3.0], [1.0, 1.0, 2.0, 2.0]]], ((0, 1),))
    with caplog.at_level(logging.WARNING):
        found = read_objects(data_set(flat), "objects", "xywh", "here")
    assert found.images[0].boxes.tolist() == [[1, 1, 3, 3]] and found.images[0].classes.tolist() == [1]
    assert "1 boxes of here" in caplog.text


def test_the_format_is_checked() -> None:
    with pytest.raises(UserError, match=mentions("data.box_format", "xywh", "yolo")):
        read(data_set(lists()), box_format="yolo")


def test_classes_are_numbered_by_name() -> None:
    found = matching_numbers(["dog", "cat", "owl"], ["cat", "ant", "dog"])
    assert (found.tolist(), found.dtype) == ([2, 0, -1], np.int64)
