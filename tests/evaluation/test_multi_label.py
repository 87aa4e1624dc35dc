# SPDX-License-Identifier: Apache-2.0
"""Images with several labels: the probe equals scikit-learn, columns of lists are read, and other protocols
report a mistake."""

import copy
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from messages import mentions
from pixel_encoder import Pixels, processor
from sklearn.linear_model import LogisticRegression
from transformers import ResNetConfig, ResNetModel

from hf_ssl.cards.suite_text import metric_value
from hf_ssl.data import DataConfig, LabeledImages
from hf_ssl.data.labeled_splits import label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_encoder, evaluate_features, mean_average_precision
from hf_ssl.evaluation.fine_tuning import binary_cross_entropy
from hf_ssl.evaluation.protocols.multi_label import fit
from hf_ssl.recipe import load_recipe
from hf_ssl.run import pretrain

NAMES = ["bird", "cat", "dog"]


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(360, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).long()
    features = labels.float() @ torch.eye(3, 8) + 0.5 * torch.randn(360, 8, generator=generator)
    return features[:240], labels[:240], features[240:], labels[240:]


def test_each_class_has_the_logistic_regression_of_scikit_learn(data) -> None:
    features, labels = data[:2]
    heads = fit(features, labels, 0.01, 500)
    for number in range(3):
        # Half the squared norm plus C times the sum of the losses: C = 1 / (N * penalty).
        expected = LogisticRegression(C=1 / (240 * 0.01), tol=1e-8, max_iter=1000).fit(
            features, labels[:, number]
        )
        assert heads[:-1, number].tolist() == pytest.approx(expected.coef_[0], abs=2e-3)
        assert heads[-1, number].item() == pytest.approx(expected.intercept_[0], abs=2e-3)


def test_ignored_images_do_not_count_for_their_class(data) -> None:
    features, labels = data[0], data[1].clone()
    labels[:100, 1] = -1
    heads, without = (
        fit(features, labels, 0.01, 500),
        fit(features[100:], labels[100:], 0.01 * 240 / 140, 500),
    )
    assert heads[:, 1].tolist() == pytest.approx(without[:, 1].tolist(), abs=2e-3)


def test_the_result_is_complete_and_nothing_is_selected_on_test_images(data) -> None:
    config = {"protocols": ["multi_label", "knn"]}
    result = evaluate_features(config, *data)
    (number,) = result["protocols"]
    prior = mean_average_precision(torch.zeros(120, 3), data[3])
    assert prior + 0.2 < number["value"] < 1 and number["value"] == pytest.approx(
        number["metrics"]["area"], abs=0.05
    )
    assert 0 < number["standard_error"] < 0.1
    assert result["classes"] == 3 and any("k-NN" in text for text in result["skipped"])
    assert evaluate_features(config, *data)["protocols"] == [number]
    (other,) = evaluate_features(config, *data[:3], data[3].flip(0))["protocols"]
    assert other["selection"] == number["selection"] and other["id"] == number["id"]
    assert other["value"] < number["value"] - 0.2, "wrong labels"


def test_the_text_names_the_classes_that_count(data) -> None:
    config = {
        "protocols": ["multi_label"],
        "settings": {"multi_label": {"penalties": [0.1], "iterations": 5}},
    }
    (number,) = evaluate_features(config, *data)["protocols"]
    assert "3 classes" in number["text"]
    labels = data[3].clone()
    labels[:, 2] = 0
    (number,) = evaluate_features(config, *data[:3], labels)["protocols"]
    assert "2 of 3 classes" in number["text"]


def test_the_bootstrap_is_the_error_over_samples_of_images(data) -> None:
    """Other test images of the same distribution differ by about the standard error."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(30, 120, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).long()
    features = labels.float() @ torch.eye(3, 8) + 0.5 * torch.randn(30, 120, 8, generator=generator)
    settings = {"multi_label": {"penalties": [0.01]}}
    results = [
        evaluate_features({"protocols": ["multi_label"], "settings": settings}, *data[:2], *each)[
            "protocols"
        ][0]
        for each in zip(features, labels, strict=True)
    ]
    spread = np.std([each["value"] for each in results])
    assert np.mean([each["standard_error"] for each in results]) == pytest.approx(spread, rel=0.5)


def test_protocols_for_one_label_end_in_one_sentence(data) -> None:
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "knn", "multi_label")):
        evaluate_features(None, *data)
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "multi_label", "knn")):
        one = [data[0], data[1].argmax(1), data[2], data[3].argmax(1)]
        evaluate_features({"protocols": ["multi_label"]}, *one)
    with pytest.raises(UserError, match=mentions("labels")):
        evaluate_features({"protocols": ["multi_label"]}, *data[:3], data[3].argmax(1))
    wrong = data[1].clone()
    wrong[0, 0] = 2
    with pytest.raises(UserError, match=mentions(-1)):
        evaluate_features({"protocols": ["multi_label"]}, data[0], wrong, *data[2:])


def pictures(count: int, names: list[str] = NAMES, seed: int = 0) -> Dataset:
    """Random images. The first channel is bright if the image shows a bird, and so on; row 0 has no list."""
    random = np.random.default_rng(seed)
    shown = random.random((count, 3)) < 0.4
    images = random.integers(0, 120, (count, 8, 8, 3)) + 100 * shown[:, None, None, :]
    lists = [[names.index(NAMES[k]) for k in np.flatnonzero(row)] for row in shown]
    columns = {
        "image": [PIL.Image.fromarray(each.astype(np.uint8)) for each in images],
        "objects": [None, *lists[1:]],
    }
    return Dataset.from_dict(
        columns, features=Features({"image": Image(), "objects": List(ClassLabel(names=names))})
    )


def read(dataset: Dataset, **options) -> LabeledImages:
    return label_data(dataset, DataConfig(label_column="objects"), "test", **options)


def test_a_column_of_lists_becomes_a_matrix() -> None:
    dataset = pictures(20)
    images = read(dataset)
    assert images.has_several_labels and images.class_names == NAMES
    assert images.labels.shape == (19, 3), "row 0 has no label"
    lists = [sorted(torch.nonzero(row)[:, 0].tolist()) for row in images.labels]
    assert lists == [sorted(each) for each in dataset["objects"][1:]]
    assert len(read(dataset, max_images=7)) == 7
    with pytest.raises(UserError, match=mentions("data.label_column")):
        label_data(dataset, DataConfig(), "test")
    with pytest.raises(UserError, match=mentions("data.label_column=objects")):
        label_data(dataset, DataConfig(), "test")
    texts = dataset.remove_columns("objects").add_column("objects", [["a"]] * 20)
    with pytest.raises(UserError, match=mentions("objects", "List of string", "List(ClassLabel")) as raised:
        read(texts)
    assert "use one of" not in str(raised.value), "no column of these data has labels"
    assert isinstance(texts.features["objects"].feature, Value)


def test_classes_are_compared_by_name() -> None:
    train, test = read(pictures(20)), read(pictures(20, NAMES[::-1], seed=1))
    expected = read(pictures(20, seed=1)).labels
    test.classified_by(train)
    assert torch.equal(test.labels, expected) and test.class_names == NAMES
    one = copy.copy(train)
    one._labels = one._labels.argmax(axis=1)
    for pair in ((one, train), (train, one)):
        with pytest.raises(UserError, match=mentions("lists in", "one class in")):
            pair[0].classified_by(pair[1])
    other = read(pictures(20, ["bird", "cat", "dog", "fox"]))
    with pytest.raises(UserError, match=mentions(3)):
        other.classified_by(train)


def test_an_encoder_is_evaluated_on_a_data_set_with_lists() -> None:
    config = {"protocols": ["multi_label", "quality"], "settings": {"quality": {"images": 10, "views": 3}}}
    data = DataConfig(label_column="objects")
    arguments = Pixels(), pictures(150), pictures(80, seed=1)
    result = evaluate_encoder(*arguments, config, processor(), data=data)
    (number,) = result["protocols"]
    assert number["value"] > 0.6 and result["images"] == {"train": 149, "test": 79}
    assert result["quality"]["lidar"] > 1
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "multi_label")):
        evaluate_encoder(*arguments, None, processor(), data=data)


def resnet() -> ResNetModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config).eval()


def fine_tuned(settings: dict, *pair: Dataset) -> dict:
    few = {"epochs": 4, "batch_size": 16, "smallest_crop": 0.8, "learning_rates": [0.05]}
    config = {"protocols": ["fine_tune"], "settings": {"fine_tune": few | settings}, "precision": "float32"}
    data = DataConfig(label_column="objects")
    (number,) = evaluate_encoder(resnet(), *pair, config, processor(), data=data)["protocols"]
    return number


def test_an_encoder_is_fine_tuned_on_images_with_several_labels() -> None:
    """The loss is a binary cross entropy of each class, and the metric is the mean average precision."""
    pair = pictures(150), pictures(80, seed=1)
    number = fine_tuned({"learning_rates": [1e-6, 0.05], "mixup": 0.2}, *pair)
    prior = float((read(pair[1]).labels == 1).double().mean())
    assert number["value"] > prior + 0.2
    assert number["metric"] == "mean_average_precision" and number["column"] == "fine-tuning, mAP"
    assert number["selection"] == {"learning_rate": 0.05} and number["details"]["images"] == 149
    assert 0 < number["standard_error"] < 0.15 and "3 classes" in number["text"]
    assert metric_value(number, "mean_average_precision") == number["value"]
    assert metric_value(number, "top_1") is None


def test_a_learning_rate_with_which_training_diverges_is_not_selected() -> None:
    number = fine_tuned({"learning_rates": [0.05, 1e30], "epochs": 2}, pictures(40), pictures(20, seed=1))
    assert number["selection"] == {"learning_rate": 0.05} and number["details"]["validation"]["1e+30"] == 0


def test_the_order_of_classes_changes_nothing_but_their_order() -> None:
    number, other = (
        fine_tuned({}, pictures(60, names), pictures(40, names, seed=1)) for names in (NAMES, NAMES[::-1])
    )
    assert other["value"] == pytest.approx(number["value"], abs=1e-3)
    assert other["details"]["rows_hash"] != number["details"]["rows_hash"]


def test_ignored_labels_add_nothing_to_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 2, (5, 3), generator=generator)
    expected = 0.0
    for row, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        for logit, label in zip(row, truth, strict=True):
            chance = 1 / (1 + math.exp(-logit))
            expected -= 0.0 if label < 0 else math.log(chance if label else 1 - chance) / 3
    assert (labels == -1).any()
    assert float(binary_cross_entropy(logits, labels)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"fractions": [0.1]}, ["fine_tune.fractions", 0.1, "[1.0]"]),
        ({"labels_per_class": [2]}, ["fine_tune.labels_per_class", 2, "[]"]),
        ({"label_smoothing": 0.1}, ["fine_tune.label_smoothing=0", 0.1]),
        ({"recipe": "mae", "epochs": 9}, ["fine_tune.label_smoothing=0", 0.1]),
        ({"learning_rates": [1e30, 1e31]}, ["fine_tune.learning_rates", "1e+30", "smaller"]),
    ],
)
def test_settings_of_one_label_end_in_one_sentence(settings: dict, parts: list) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        fine_tuned(settings, pictures(30), pictures(20, seed=1))


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """A folder with pictures that have several labels."""
    folder = tmp_path_factory.mktemp("shown")
    for number, split in enumerate(("train", "test")):
        pictures(40, seed=number).to_parquet(folder / split / "0.parquet")
    return folder


RUN = "training.max_steps=1 training.disable_tqdm=true training.monitor_steps=0 training.batch_size=8".split()


def test_a_run_on_images_with_several_labels_is_evaluated(shown: Path, tmp_path: Path, caplog) -> None:
    data = [f"data.path={shown}", "data.label_column=objects", "views.size=8", "views.enlarge=16"]
    output = f"training.output_dir={tmp_path / 'run'}"
    few = "evaluation.settings.multi_label={penalties: [0.1], iterations: 3}"
    facts = pretrain(load_recipe("smoke/simclr", [*data, *RUN, output, few]))
    assert [each["protocol"] for each in facts["results"]["trained"]["protocols"]] == ["multi_label"]
    assert "multi_label replaces knn" in caplog.text
    assert "multi_label" in str(facts["recipe"]["differences"]["evaluation.protocols"])
    chosen = [f"training.output_dir={tmp_path / 'other'}", "evaluation.protocols=[ridge]"]
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "multi_label", "ridge")):
        pretrain(load_recipe("smoke/simclr", [*data, *RUN, *chosen]))
    assert not (tmp_path / "other").exists(), "an error before the training"


def test_the_monitor_and_a_space_need_one_class_for_each_image() -> None:
    with pytest.raises(UserError, match=mentions("data.label_column", "k-NN")):
        read(pictures(10)).require_one_label("k-NN")
    one = copy.copy(read(pictures(10)))
    one._labels = one._labels.argmax(axis=1)
    one.require_one_label("k-NN")
