# SPDX-License-Identifier: Apache-2.0
"""Both splits of an evaluation have one table of classes, and no image is in both."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from messages import mentions

from hf_ssl.building import open_labeled_splits
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_pixels
from hf_ssl.recording import evaluation_facts

NAMES = ("ant", "bee", "cat", "dog")
KNN = EvaluationConfig(protocols=["knn"], settings={"knn": {"neighbors": [1]}}, raw_pixel_size=8)
KINDS: dict[str, tuple[Any, list[Any]]] = {
    "ClassLabel": (ClassLabel(names=list(NAMES)), [0, 1, 2, 3]),
    "texts": (Value("string"), list(NAMES)),
    "whole numbers": (Value("int64"), [0, 2, 10, 30]),
    "numbers as texts": (Value("string"), ["0", "2", "10", "30"]),
    "decimal numbers": (Value("float32"), [0.0, 2.0, 10.0, 30.0]),
}


def drawn(label: int, number: int) -> bytes:
    """Return an image whose pixels show its class."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2 * label : 2 * label + 2] = 200
    pixels[number // 8 % 8, number % 8] += 50
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(
    folder: Path, split: str, labels: Sequence[int], feature: Any, values: Sequence[Any], first: int = 0
) -> None:
    """Write a split with one image for each number of a class. `values` are the labels of the classes."""
    columns = {
        "image": [{"bytes": drawn(label, row), "path": None} for row, label in enumerate(labels, first)],
        "label": [values[label] for label in labels],
    }
    table = Dataset.from_dict(columns, features=Features(image=Image(), label=feature))
    table.to_parquet(folder / f"{split}.parquet")


def config(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder))


def accuracy(folder: Path, settings: EvaluationConfig = KNN) -> float:
    found = evaluate_pixels(settings, *open_labeled_splits(config(folder), settings))
    return found["protocols"][0]["value"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_only_the_training_images_have_changes_no_number(kind: str, tmp_path: Path) -> None:
    """Labels that are numbered split by split would give 0.000."""
    write(tmp_path, "train", [0, 1, 2, 3] * 3, *KINDS[kind])
    write(tmp_path, "test", [1, 2, 3] * 2, *KINDS[kind], first=32)
    assert accuracy(tmp_path) == 1


def test_truth_values_are_classes(tmp_path: Path) -> None:
    write(tmp_path, "train", [0, 1] * 4, Value("bool"), [False, True])
    write(tmp_path, "test", [1] * 4, Value("bool"), [False, True], first=32)
    assert accuracy(tmp_path) == 1


@pytest.mark.parametrize("kind", ["ClassLabel", "texts"])
def test_classes_in_another_order_are_matched_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", "train", [0, 1, 2, 3] * 3, *KINDS["ClassLabel"])
    names = ["dog", "cat", "bee", "ant", "emu"]
    feature, values = (ClassLabel(names=names), [3, 2, 1, 0]) if kind == "ClassLabel" else KINDS["texts"]
    # Two folders, because the files of one folder have the same columns.
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "test", [1, 2, 3] * 2, feature, values, first=32)
    train, _ = open_labeled_splits(config(tmp_path / "one"), replace(KNN, test_fraction=0.5))
    other, test = open_labeled_splits(
        config(tmp_path / "other"), replace(KNN, train_split="test", test_fraction=0.5)
    )
    other.classified_by(train)
    test.classified_by(train)
    assert evaluate_pixels(KNN, train, test)["protocols"][0]["value"] == 1
    assert test.class_names == train.class_names == list(NAMES)


def test_splits_with_other_names_stop(tmp_path: Path) -> None:
    write(tmp_path, "train", [0, 1, 2] * 3, Value("string"), NAMES)
    write(tmp_path, "test", [0, 3, 3], Value("string"), NAMES, first=32)
    with pytest.raises(UserError, match=mentions("labels", "dog", 2, 3, "ant, bee, cat")):
        open_labeled_splits(config(tmp_path), KNN)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_training_split_can_be_the_test_images(kind: str, tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2, 3], [20, 10, 10, 2])  # sorted by class
    write(tmp_path, "train", labels.tolist(), *KINDS[kind])
    settings = replace(KNN, test_fraction=0.2)
    train, test = open_labeled_splits(config(tmp_path), settings)
    assert len(train) == 34
    counts = Counter(test.class_names[label] for label in test.labels.tolist())
    names = NAMES if kind in ("ClassLabel", "texts") else [str(int(float(label))) for label in KINDS[kind][1]]
    assert counts == {names[0]: 4, names[1]: 2, names[2]: 2}
    assert test.shared_with(train) == 0 and train.class_names == test.class_names
    again = open_labeled_splits(config(tmp_path), replace(settings, seed=7, max_train_images=10))
    assert again[1].fingerprint == test.fingerprint != train.fingerprint  # for the stored features
    assert len(again[0]) == 10 and again[0].shared_with(test) == 0
    facts = evaluation_facts(config(tmp_path), settings, train, test)
    assert (facts["train_split"], facts["test_split"]) == ("80 % of train", "20 % of train")
    found = evaluate_pixels(settings, train, test)["protocols"][0]
    assert found["value"] == 1 and "8 images of split 20 % of train" in found["text"]


def test_a_part_of_few_files_with_the_name_of_a_split_stops(tmp_path: Path) -> None:
    for label in (0, 1):
        (tmp_path / NAMES[label]).mkdir()
        for number in range(8):
            name = f"toy train {number}" if number < 2 else f"{number}"
            (tmp_path / NAMES[label] / f"{name}.png").write_bytes(drawn(label, number))
    settings = replace(KNN, test_fraction=0.5)
    with pytest.raises(UserError, match=mentions("evaluation.train_split", 4, 12, "all")):
        open_labeled_splits(config(tmp_path), settings)
    for split, images in (("all", 16), ("train[:100%]", 4)):
        parts = open_labeled_splits(config(tmp_path), replace(settings, train_split=split))
        assert sum(map(len, parts)) == images


def test_copies_of_an_image_are_in_one_part(tmp_path: Path) -> None:
    labels = [0, 1] * 10
    folder = tmp_path / "photos"
    for row, label in enumerate(labels):
        for copy in ("", "copy of "):
            file = folder / NAMES[label] / f"{copy}{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(drawn(label, row))
    train, test = open_labeled_splits(config(folder), replace(KNN, test_fraction=0.3))
    assert (len(train), len(test)) == (28, 12) and test.shared_with(train) == 0
    assert {name.removeprefix("copy of ") for name in map(file_name, test.names)}.isdisjoint(
        name.removeprefix("copy of ") for name in map(file_name, train.names)
    )


def file_name(path: str) -> str:
    return Path(path).name


def test_lists_of_classes_can_be_divided(tmp_path: Path) -> None:
    values = [[0], [0, 1], [2], [1, 2]]
    write(tmp_path, "train", [0, 1, 2, 3] * 5, List(ClassLabel(names=list(NAMES))), values)
    settings = EvaluationConfig(protocols=["multi_label"], test_fraction=0.25, label_column="label")
    train, test = open_labeled_splits(config(tmp_path), settings)
    assert (train.labels.shape, test.labels.shape) == ((15, 4), (5, 4))


def test_a_missing_split_is_named_with_its_key_and_the_option(tmp_path: Path) -> None:
    write(tmp_path, "train", [0, 1] * 4, *KINDS["texts"])
    with pytest.raises(
        UserError, match=mentions("evaluation.test_split", "'test'", "evaluation.test_fraction=0.2")
    ):
        open_labeled_splits(config(tmp_path), KNN)
    with pytest.raises(
        UserError, match=mentions("evaluation.train_split", "'trian'", "evaluation.train_split=train")
    ):
        open_labeled_splits(config(tmp_path), replace(KNN, train_split="trian"))
    with pytest.raises(UserError, match=mentions("evaluation.test_fraction", 1.5)):
        replace(KNN, test_fraction=1.5).check()


@pytest.mark.parametrize("kind", ["ClassLabel", "texts"])
def test_slices_without_a_common_class_stop(kind: str, tmp_path: Path) -> None:
    write(tmp_path, "train", np.repeat([0, 1, 2, 3], 10).tolist(), *KINDS[kind])
    disjoint = replace(KNN, train_split="train[:75%]", test_split="train[75%:]")
    with pytest.raises(UserError, match=mentions("labels", 10, "evaluation.test_fraction=0.2")):
        open_labeled_splits(config(tmp_path), disjoint)


def test_shared_images_and_classes_without_training_images_are_counted(tmp_path: Path, capsys) -> None:
    write(tmp_path, "train", np.repeat([0, 1, 2, 3], 10).tolist(), *KINDS["ClassLabel"])
    settings = replace(KNN, train_split="train[:60%]", test_split="train[50%:]")
    splits = open_labeled_splits(config(tmp_path), settings)
    assert evaluate_pixels(settings, *splits)["protocols"][0]["value"] == 0.5
    evaluate_pixels(settings, *splits)
    reported = capsys.readouterr().err
    assert reported.count("4 images of 20 in") == reported.count("10 images of 20 in") == 1
    facts = evaluation_facts(config(tmp_path), settings, *splits)
    assert (facts["shared"], facts["unknown_classes"]) == (4, 10)


def test_a_limited_choice_has_the_shares_of_the_classes(tmp_path: Path) -> None:
    labels = np.repeat([0, 1], [40, 4]).tolist()
    write(tmp_path, "train", labels, *KINDS["texts"])
    write(tmp_path, "test", labels, *KINDS["texts"], first=64)
    parts = open_labeled_splits(config(tmp_path), replace(KNN, max_train_images=22, max_test_images=11))
    assert [np.bincount(part.labels).tolist() for part in parts] == [[20, 2], [10, 1]]
