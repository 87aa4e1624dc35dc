# SPDX-License-Identifier: Apache-2.0
"""What every protocol of the table keeps: its result, its id, and that nothing is selected on test images."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import get_type_hints

import numpy as np
import pytest
import torch
from example_facts import new_facts
from messages import mentions, missing
from tiers import in_tiers
from transformers import BitImageProcessor, ViTConfig, ViTModel

from hf_ssl.cards.card import render_card
from hf_ssl.cards.facts import check_facts
from hf_ssl.cards.text import terminal_text
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    PROTOCOLS,
    EvaluationConfig,
    ProtocolResult,
    class_metrics,
    evaluate_encoder,
    evaluate_features,
    few_label_knn,
    knn_accuracy,
    linear_probe,
)
from hf_ssl.evaluation.protocols import load_protocol
from hf_ssl.evaluation.protocols.linear import heads_accuracy
from hf_ssl.evaluation.results import with_current_layout
from hf_ssl.evaluation.scores import is_right
from hf_ssl.evaluation.statistics import standardized
from hf_ssl.modeling.backbones import set_identity_pooler
from hf_ssl.recipe import read_sections

# Small settings; a protocol without an entry runs with its defaults.
# The images of these tests have four pixels, so a crop or a flip would change their class.
WHOLE = {"smallest_crop": 1.0, "flip": 0.0}
QUICK = {
    "linear": {"epochs": 3},
    "few_label_knn": {"labels_per_class": [1, 5], "draws": 3},
    "logistic_regression": {"strengths": [1e-4, 0.01, 1.0]},
    "mlp": {"epochs": 5, "hidden_size": 16},
    "few_label_linear": {"fractions": [0.1], "labels_per_class": [1, 5], "draws": 3},
    "linear_augmented": {"epochs": 8, "learning_rates": [0.01, 1.0], "batch_size": 64, **WHOLE},
    "fine_tune": {
        "optimizer": "adamw", "epochs": 5, "learning_rates": [0.0001, 0.003], "batch_size": 32, **WHOLE,
    },
    "segmentation": {"epochs": 5, "learning_rates": [0.003, 0.03], "batch_size": 60},
}  # fmt: skip
# `quality` measures without labels, so it gives no accuracy. Others need several labels per image or boxes.
OF_CLASSES = [name for name, each in PROTOCOLS.items() if "one" in each.labels and name != "quality"]
OF_MASKS = [name for name, each in PROTOCOLS.items() if "masks" in each.labels and name != "quality"]


def without_fine_tuning(names: list[str]) -> list:
    """Return the protocols. Only the slow tests run `fine_tune`, which trains a network."""
    return in_tiers(zip(names), [(name,) for name in names if name != "fine_tune"])


WITH_ENCODER = [name for name, each in PROTOCOLS.items() if each.needs_encoder and "one" in each.labels]
OF_FEATURES = [name for name in OF_CLASSES if not PROTOCOLS[name].needs_encoder]


class Images:
    """Images of 2 x 2 pixels made of features (N, 12), for protocols that need an encoder.

    Their masks show where the first channel is bright.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = (128 + 25 * features).round().clamp(0, 255).to(torch.uint8).view(-1, 3, 2, 2)
        self.labels = labels
        self.targets = {"masks": (self.images[:, 0] > 128).to(torch.uint8)}

    def __len__(self) -> int:
        return len(self.images)

    def iter_batches(self, batch_size: int) -> Iterator[list[torch.Tensor]]:
        for first in range(0, len(self.images), batch_size):
            yield list(self.images[first : first + batch_size])


@cache
def encoder() -> tuple[ViTModel, BitImageProcessor]:
    """A vision transformer without training, which sees each pixel as a patch, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
        patch_size=4, initializer_range=0.2, pooler_act="linear",
    )  # fmt: skip
    model = ViTModel(config)
    set_identity_pooler(model)
    processor = BitImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, resample=2,
        image_mean=[0.5] * 3, image_std=[0.1] * 3,
    )  # fmt: skip
    return model, processor


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    """Three classes that a classifier can distinguish, but not without errors."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(360) % 3
    features = 1.5 * torch.eye(3, 12)[labels] + torch.randn(360, 12, generator=generator)
    return features[:240], labels[:240], features[240:], labels[240:]


def run(name: str, data: tuple, **settings) -> list[ProtocolResult]:
    config = {"protocols": [name], "settings": {name: QUICK.get(name, {}) | settings}}
    if not PROTOCOLS[name].needs_encoder:
        return evaluate_features(config, *data)["protocols"]
    model, processor = encoder()
    config |= {"precision": "float32", "batch_size": 50}
    return evaluate_encoder(model, Images(*data[:2]), Images(*data[2:]), config, processor)["protocols"]


@pytest.mark.parametrize("name", OF_CLASSES + OF_MASKS)
def test_a_result_is_complete_and_repeatable(name: str, data) -> None:
    results = run(name, data)
    assert results, name
    assert json.loads(json.dumps(results)) == results
    assert len({result["key"] for result in results}) == len(results)
    for result in results:
        assert {*result} | {"metric"} == {*get_type_hints(ProtocolResult)}
        assert result["protocol"] == name
        assert result["id"].startswith(f"{name}-{load_protocol(name).VERSION}-")
        assert 1 / 3 < result["value"] <= 1, "better than chance"
        assert 0 < result["standard_error"] < 0.1
        assert "120 images of split test" in result["text"]
        assert not result["text"].endswith("."), "cards and tables add the full stop"
        assert (result["selected_on"] is None) == (not result["selection"])
    assert run(name, data) == results


@pytest.mark.parametrize("name", without_fine_tuning(OF_CLASSES + OF_MASKS))
def test_nothing_is_selected_on_test_images(name: str, data) -> None:
    """Other test images change the value, and nothing that was selected."""
    train, train_labels, test, test_labels = data
    before = run(name, data)
    after = run(name, (train, train_labels, test.flip(1), test_labels.flip(0)))
    assert [result["selection"] for result in after] == [result["selection"] for result in before]
    assert [result["id"] for result in after] == [result["id"] for result in before]
    assert [result["value"] for result in after] != [result["value"] for result in before]


@pytest.mark.parametrize("name", without_fine_tuning(OF_CLASSES))
def test_the_classes_of_the_result_are_those_of_the_images(name: str, data) -> None:
    """Numbers of classes may have gaps, and a class may be missing in one of the splits."""
    train, train_labels, test, test_labels = data
    gaps = torch.tensor([0, 5, 9])
    values = [result["value"] for result in run(name, (train, gaps[train_labels], test, gaps[test_labels]))]
    assert values == pytest.approx([result["value"] for result in run(name, data)], abs=0.1)
    rows = test_labels != 2
    assert run(name, (train, train_labels, test[rows], test_labels[rows]))


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (torch.zeros(240), ["classes", 240]),
        (torch.full((240,), -1), ["-1"]),
        (torch.full((240,), 0.5), ["fractions"]),
        (torch.zeros(239), [240, 239]),
    ],
)
def test_bad_labels_end_in_one_sentence(name: str, labels, parts, data) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        run(name, (data[0], labels, *data[2:]))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_settings_are_checked_before_anything_is_measured(name: str, data) -> None:
    config = load_protocol(name).Config()
    config.check(f"evaluation.settings.{name}")
    with pytest.raises(UserError, match=mentions(f"evaluation.settings.{name}.nothing")):
        run(name, data, nothing=1)
    assert fields(config)


@pytest.mark.parametrize("name", OF_CLASSES + OF_MASKS)
def test_a_card_shows_every_number(name: str, data) -> None:
    facts = new_facts()
    result = facts["results"]["trained"]
    facts["results"] = {"trained": result | {"protocols": run(name, data)}}
    card = render_card(check_facts(facts), has_pretraining=False)
    for number in facts["results"]["trained"]["protocols"]:
        assert f"{100 * number['value']:.1f} %" in card
        assert number["text"] in card and number["column"] in card


def test_other_protocols_are_measured_if_one_has_too_few_images(data) -> None:
    """The result names the protocol that failed. If no protocol can be measured, the error is raised."""
    names = ["knn", "ridge"]
    settings = {"protocols": names, "settings": {"knn": {"neighbors": [241]}}}
    result = evaluate_features(settings, *data)
    assert [each["protocol"] for each in result["protocols"]] == ["ridge"]
    (skipped,) = result["skipped"]
    assert not missing(skipped, "k-NN", 241, 240)
    text = terminal_text({"encoder": result})
    assert f"(not measured: {skipped})" in text and text.split()[:2] == ["this", "encoder"]
    with pytest.raises(UserError, match=mentions(241, 240)):
        evaluate_features(settings | {"protocols": ["knn"]}, *data)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_one_image_per_class(name: str, data) -> None:
    """Each protocol gives a result or one sentence."""
    train, train_labels, test, test_labels = data
    try:
        results = run(name, (train[:3], train_labels[:3], test, test_labels))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert all(0 <= result["value"] <= 1 for result in results)


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_a_protocol_changes_neither_the_encoder_nor_the_global_random_state(name: str, data) -> None:
    model, _ = encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, numbers, python = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run(name, data)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numbers).all()
    assert random.getstate() == python


@pytest.mark.parametrize("name", WITH_ENCODER)
def test_features_alone_are_not_enough_for_a_protocol_that_needs_an_encoder(name: str, data) -> None:
    result = evaluate_features({"protocols": [name]}, *data)
    assert result["protocols"] == []
    assert PROTOCOLS[name].title in result["skipped"][0]


def test_a_column_contains_only_numbers_of_one_protocol_id(data) -> None:
    facts = new_facts()
    facts["results"]["untrained"]["protocols"][0]["id"] = "knn-2-0"
    card = render_card(check_facts(facts), has_pretraining=False)
    column = facts["results"]["trained"]["protocols"][0]["column"]
    (row,) = (line for line in card.splitlines() if line.startswith(f"| {column} |"))
    assert row.split(" | ")[1] != "-" and row.split(" | ")[2] == "-"


def test_results_of_version_0_1_are_read() -> None:
    words = {"knn": "20-NN by", "few_labels": "1-NN among", "linear": "softmax", "features": "pooler_output"}
    old = {
        "protocol": words,
        "images": {"train": 100, "test": 400},
        "classes": 10,
        "feature_size": 8,
        "knn": {"neighbors": 20, "temperature": 0.07, "accuracy": 0.5, "grid": [{"neighbors": 20}]},
        "linear": {"accuracy": 0.6, "learning_rate": 0.1, "at_edge": False},
        "few_labels": [{"labels_per_class": 1, "mean": 0.3, "std": 0.04, "draws": 16}],
        "skipped": [],
        "statistics": {"rank_me": 3.0},
        "seconds": {},
    }
    before = copy.deepcopy(old)
    new = with_current_layout(old)
    assert old == before
    assert [(each["key"], each["value"]) for each in new["protocols"]] == [
        ("knn_20", 0.5), ("few_labels_1", 0.3), ("linear_probe", 0.6),
    ]  # fmt: skip
    assert [each["standard_error"] for each in new["protocols"]] == pytest.approx(
        [0.025, 0.01, 0.0245], abs=1e-4
    )
    assert {*new["protocols"][0]} | {"metric"} == {*get_type_hints(ProtocolResult)}
    assert new["features"] == "pooler_output" and new["feature_size"] == 8
    assert with_current_layout(new) == new


def test_the_metrics_of_classes_equal_a_loop() -> None:
    """Of equal scores, the lower class number ranks first; a class without images does not count."""
    scores = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 2, 2, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3, 3]]).repeat(4, 1)
    labels = torch.tensor([0, 2, 6, 1, 1, 4, 0, 2, 5, 3, 1, 0])
    orders = [sorted(range(7), key=lambda number, row=row: (-row[number], number)) for row in scores.tolist()]
    right = [order[0] == label for order, label in zip(orders, labels.tolist(), strict=True)]
    pairs = list(zip(right, orders, labels.tolist(), strict=True))
    classes = {label: [ok for ok, _, own in pairs if own == label] for label in labels.tolist()}
    found = class_metrics(scores.float(), labels)
    assert found["top_1"] == sum(right) / 12
    assert found["top_5"] == sum(label in order[:5] for _, order, label in pairs) / 12
    means = [sum(own) / len(own) for own in classes.values()]
    assert found["mean_per_class"] == pytest.approx(sum(means) / len(means))


def test_an_excluded_class_is_not_among_the_first_five() -> None:
    """Logistic regression excludes classes without training images. Before, top-5 accuracy counted them."""
    scores = torch.tensor([[0.3, -torch.inf, 0.1], [0.3, 0.2, 0.1]])
    found = class_metrics(scores, torch.tensor([1, 1]))
    assert (found["top_1"], found["top_5"]) == (0.0, 0.5)
    features = torch.eye(3).repeat(10, 1)
    labels = torch.arange(30) % 3
    (result,) = evaluate_features(
        {"protocols": ["logistic_regression"]}, features[labels < 2], labels[labels < 2], features, labels
    )["protocols"]
    assert result["metrics"]["top_5"] == pytest.approx(2 / 3) == result["value"]


def test_the_text_of_knn_names_the_values_of_k_that_were_tested() -> None:
    """The bank has 100 images, but only 90 during the selection of k. So k = 100 is not tested."""
    features, labels = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 2
    _, selected = evaluate_features({"protocols": ["knn"]}, features, labels, features[:9], labels[:9])[
        "protocols"
    ]
    assert "5 values of k, 1 to 50)" in selected["text"]


@pytest.mark.parametrize(
    ("scores", "labels", "parts"),
    [
        (torch.full((3, 2), float("nan")), [0, 1, 1], ["NaN", 3]),
        (torch.tensor([[1.0, float("nan")], [1.0, 0.0]]), [0, 1], ["NaN", 1, 2]),
        (torch.zeros(2, 2), [0, -100], ["-100"]),
        (torch.zeros(0, 2), [], [0]),
    ],
)
def test_scores_of_a_diverged_model_are_an_error_and_not_right(scores, labels, parts) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        class_metrics(scores, torch.tensor(labels, dtype=torch.long))
    assert class_metrics(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))["top_1"] == 1


def test_settings_that_are_no_mapping_name_their_key(data) -> None:
    for value in (5, [5], "5"):
        with pytest.raises(
            UserError, match=mentions("evaluation.settings.knn", "mapping", "{key: value}")
        ) as raised:
            evaluate_features({"settings": {"knn": value}}, *data)
        assert "Config" not in str(raised.value)
    with (
        pytest.warns(FutureWarning, match="neighbors"),
        pytest.raises(UserError, match=mentions("evaluation.settings.knn")),
    ):
        evaluate_features({"neighbors": [3], "settings": {"knn": 5}}, *data)


@pytest.mark.parametrize("name", ["linear", "mlp", "logistic_regression"])
def test_a_constant_feature_keeps_its_scale(name: str, data) -> None:
    """A feature that is zero in the training images must not decide about test images, where it is not."""
    train, labels, test, test_labels = data
    further = torch.zeros(len(train), 1), 0.1 * torch.randn(len(test), 1, generator=torch.manual_seed(0))
    wider = torch.cat([train, further[0]], 1), labels, torch.cat([test, further[1]], 1), test_labels
    (before,), (after,) = run(name, data, standardize=True), run(name, wider, standardize=True)
    assert after["value"] == pytest.approx(before["value"], abs=0.03)


def test_standardized_features() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = 3 + 2 * torch.randn(50, 4, generator=generator), torch.ones(2, 4)
    train[:, 1] = 7.1  # its deviation is not zero, but rounding
    scaled, others = standardized(train, test)
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled[:, kept].std(0), torch.ones(3))
    torch.testing.assert_close(others[:, 1], torch.full((2,), 1 - 7.1))
    scaled, others = standardized(train, test, center=False)
    torch.testing.assert_close(scaled[:, kept], train[:, kept] / train[:, kept].std(0))
    assert torch.equal(others[:, 1], test[:, 1])


def test_scores_of_a_diverged_training_are_not_right() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, nan], [nan, 1.0], [inf, 0.0], [-inf, -inf], [-inf, 0.0], [1.0, 1.0]])
    assert is_right(scores, torch.tensor([0, 0, 0, 0, 1, 0])).tolist() == [False] * 4 + [True] * 2
    heads = torch.full((3, 1, 2), nan)
    assert heads_accuracy(heads, torch.ones(4, 2), torch.zeros(4, dtype=torch.long)) == [0.0]


def test_a_missing_label_is_an_error_that_says_what_to_do(data) -> None:
    train, labels, test, test_labels = data
    unlabeled = labels.clone()
    unlabeled[:2] = -1
    callers = (
        lambda: evaluate_features({"protocols": ["knn"]}, train, unlabeled, test, test_labels),
        lambda: evaluate_features({"protocols": ["knn"]}, test, test_labels, train, unlabeled),
        lambda: knn_accuracy(train, unlabeled, test, test_labels),
        lambda: few_label_knn(train, unlabeled, test, test_labels, labels_per_class=1),
        lambda: linear_probe(train, unlabeled, test, test_labels, epochs=1),
        lambda: class_metrics(train, unlabeled),
    )
    for caller in callers:
        with pytest.raises(UserError, match=mentions("-1", "no label", "2 of 240", "labels >= 0")):
            caller()
    kept = unlabeled >= 0
    assert class_metrics(train[kept], unlabeled[kept])["top_5"] > 0


@pytest.mark.parametrize("where", ["recipe", "Python"])
def test_the_former_key_of_few_labels_works(where: str) -> None:
    with pytest.warns(
        FutureWarning, match=mentions("few_label_knn.labels", "few_label_knn.labels_per_class")
    ):
        if where == "recipe":
            _, config = read_sections(["data.path=x", "evaluation.settings.few_label_knn.labels=[3]"])
        else:
            config = EvaluationConfig(settings={"few_label_knn": {"labels": [3]}})
        settings = config.of_protocol("few_label_knn")
    assert settings.labels_per_class == [3]
