# SPDX-License-Identifier: Apache-2.0
"""The linear classifier with few labels: which images are labeled, and what identifies them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from messages import mentions, missing
from sklearn.linear_model import LogisticRegression

from hf_ssl.data import DataConfig, label_data
from hf_ssl.data.subsets import rank_in_class
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_features, few_label_knn, knn_accuracy
from hf_ssl.evaluation.image_lists import LISTS, draw_rows, find_rows, read_list, rows_hash
from hf_ssl.evaluation.protocols.few_label_linear import STRENGTH, Config

NAME = "few_label_linear"


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 4
    features = torch.eye(4, 16)[labels] + 0.7 * torch.randn(800, 16, generator=generator)
    return features[:400], labels[:400], features[400:], labels[400:]


def run(data, seed: int = 0, **settings):
    given = {"protocols": [NAME], "settings": {NAME: {"draws": 2} | settings}, "seed": seed}
    return evaluate_features(given, *data)


def test_a_draw_is_balanced_and_fixed_by_the_seed() -> None:
    labels = torch.arange(60) % 3
    draws = [draw_rows(labels, 12, seed, draw) for seed, draw in ((0, 0), (0, 1), (1, 0))]
    for rows in draws:
        assert labels[rows].bincount().tolist() == [4, 4, 4]
        assert rows.tolist() == sorted(set(rows.tolist()))
    assert len({tuple(rows.tolist()) for rows in draws}) == 3
    assert torch.equal(draws[0], draw_rows(labels, 12, 0, 0))
    sizes = torch.tensor([0] * 30 + [2] * 3)
    assert sizes[draw_rows(sizes, 8, 0, 0)].bincount().tolist() == [5, 0, 3], "a small class gives all images"
    assert draw_rows(labels, 60, 0).tolist() == list(range(60))


def test_these_rows_never_change() -> None:
    """Results of other versions are comparable only if the seed gives the same rows."""
    labels = torch.arange(40) % 2
    assert draw_rows(labels, 6, 0, 0).tolist() == [0, 8, 9, 19, 26, 31]
    assert rows_hash([draw_rows(labels, 6, 0, 0)], labels) == "14f44962a4d3401a"


def test_the_rank_in_a_class_is_the_number_of_earlier_images() -> None:
    labels = np.array([2, 0, 2, 2, 0, 5])
    assert rank_in_class(labels).tolist() == [0, 0, 1, 2, 1, 0]


def test_every_number_of_labels_and_its_words(data) -> None:
    result = run(data, fractions=[0.001, 0.05, 0.5], labels_per_class=[1, 5, 101])
    numbers = {each["key"].removeprefix(f"{NAME}_"): each for each in result["protocols"]}
    assert list(numbers) == ["5_percent", "50_percent", "1", "5"]
    assert [each["details"]["images"] for each in numbers.values()] == [20, 200, 4, 20]
    assert numbers["1"]["value"] < numbers["5"]["value"] < numbers["50_percent"]["value"]
    assert [len(each["selection"].get("C", [])) for each in numbers.values()] == [2, 2, 0, 2]
    for each in numbers.values():
        assert each["details"]["rows_hash"] in each["text"] and "2 draws (seed 0)" in each["text"]
        assert each["metrics"]["top_5"] == 1.0, "there are four classes"
        assert each["standard_error"] == pytest.approx(each["details"]["std"] / 2**0.5)
    percent, many = result["skipped"]
    assert not missing(percent, f"{NAME}.fractions", 0.001, "400 images", "4 classes")
    assert not missing(many, f"{NAME}.labels_per_class", 101, 100)
    with pytest.raises(UserError, match=mentions("fractions", 0.001, "labels_per_class", 101)):
        run(data, fractions=[0.001], labels_per_class=[101])


def test_the_labeled_images_are_part_of_the_id(data) -> None:
    (one,), (other,) = (run(data, seed, labels_per_class=[5], fractions=[])["protocols"] for seed in (0, 1))
    assert one["id"] != other["id"] and one["details"]["rows_hash"] != other["details"]["rows_hash"]
    moved = (data[0], data[1].roll(1), *data[2:])
    (third,) = run(moved, labels_per_class=[5], fractions=[])["protocols"]
    assert third["id"] != one["id"], "other labels"
    (one_draw,) = run(data, labels_per_class=[5], fractions=[], draws=1)["protocols"]
    assert "std" not in one_draw["details"] and one_draw["standard_error"] > 0


def test_the_classifier_is_that_of_scikit_learn(data) -> None:
    train, labels, test, test_labels = data
    (result,) = run(data, labels_per_class=[1], fractions=[], draws=1)["protocols"]
    rows = draw_rows(labels, int(labels.max()) + 1, 0, 0)
    unit, unit_test = (torch.nn.functional.normalize(each, dim=1).double().numpy() for each in (train, test))
    model = LogisticRegression(C=STRENGTH, max_iter=5000, tol=1e-8).fit(unit[rows], labels[rows].numpy())
    assert result["value"] == pytest.approx(model.score(unit_test, test_labels.numpy()), abs=0.005)
    assert result["selection"] == {} and result["selected_on"] is None and "C was fixed" in result["text"]


def write_list(path: Path, names: list[str]) -> Path:
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return path


def test_a_list_names_the_labeled_images(data, tmp_path: Path) -> None:
    names = [f"folder/n0000000{row % 4}_{row}_n0000000{row % 4}.JPEG" for row in range(400)]
    chosen = [17, 2, 3, 100, 101, 102, 5, 8]
    path = write_list(tmp_path / "few.txt", [f"n0000000{row % 4}_{row}.JPEG" for row in chosen])
    listed, digest = read_list(str(path))
    rows = find_rows(listed, SimpleNamespace(names=names), str(path))
    assert rows.tolist() == sorted(chosen)
    with pytest.raises(UserError, match=mentions("few.txt", "n00000001_17.JPEG", 8, 7)):
        find_rows(listed, SimpleNamespace(names=names[:17] + names[18:]), str(path))
    with pytest.raises(UserError, match=mentions("n00000001_17.JPEG", 2)):
        find_rows(listed, SimpleNamespace(names=[*names, names[17]]), str(path))
    with pytest.raises(UserError, match=mentions("few.txt")):
        run(data, lists=[str(path)], labels_per_class=[], fractions=[])
    assert len(digest) == 64 and digest not in LISTS


def test_names_of_images_are_read_without_the_images() -> None:
    values = {"image": [{"bytes": b"no image", "path": f"a/{row}.png"} for row in range(6)]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    values["image"][5]["path"] = None
    dataset = Dataset.from_dict(values | {"label": [0, 1] * 3}, features=features)
    settings = DataConfig(path="unused", cache="none", max_broken_fraction=1.0)
    opened = label_data(dataset.select([4, 1, 3]), settings, "train")
    opened.omit_broken({1: "broken"})
    assert opened.names == ["a/4.png", "a/3.png"]
    nameless = label_data(dataset, settings, "train")
    nameless.omit_broken({})
    assert nameless.names == []
    array = np.zeros((8, 8, 3), np.uint8)
    items = [(PIL.Image.fromarray(array), number % 2) for number in range(4)]
    assert label_data(items, settings, "train").names == []


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"fractions": [1.5]}, ["fractions", 1.5]),
        ({"labels_per_class": [0]}, ["labels_per_class", 0]),
        ({"labels_per_class": [], "fractions": []}, ["labels_per_class"]),
        ({"strengths": []}, ["strengths"]),
        ({"lists": ["missing.txt"]}, ["lists", "missing.txt"]),
    ],
)
def test_wrong_settings_fail_before_anything_is_measured(settings, parts) -> None:
    with pytest.raises(UserError, match=mentions(f"there.{parts[0]}", *parts[1:])):
        Config(**settings).check("there")


def test_an_empty_list_is_an_error(tmp_path: Path) -> None:
    path = write_list(tmp_path / "empty.txt", [])
    with pytest.raises(UserError, match=mentions("lists", "empty")):
        Config(lists=[str(path)]).check("there")


def test_all_protocols_with_few_labels_share_their_images(data) -> None:
    train, labels, test, test_labels = data
    draws = [draw_rows(labels, 8, 3, draw) for draw in range(2)]
    expected = [
        knn_accuracy(train[rows], labels[rows], test, test_labels, neighbors=[1], temperatures=[0.1])[1, 0.1]
        for rows in draws
    ]
    found = few_label_knn(*data, labels_per_class=2, draws=2, seed=3)
    assert found.mean == pytest.approx(sum(expected) / 2)
    assert found.std == pytest.approx(abs(expected[0] - expected[1]) / 2**0.5)
    (linear,) = run(data, 3, fractions=[], labels_per_class=[2], draws=2)["protocols"]
    assert linear["details"]["rows_hash"] == rows_hash(draws, labels)


@pytest.mark.parametrize("name", ["few_label_knn", NAME])
def test_the_standard_error_of_one_draw_is_that_over_test_images(name: str, data) -> None:
    settings = {"labels_per_class": [2], "draws": 1} | ({"fractions": []} if name == NAME else {})
    (result,) = evaluate_features({"protocols": [name], "settings": {name: settings}}, *data)["protocols"]
    value = result["value"]
    assert result["standard_error"] == pytest.approx((value * (1 - value) / 400) ** 0.5)
    assert "std" not in result["details"] and "deviation" not in result["text"]
