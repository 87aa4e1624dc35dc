# SPDX-License-Identifier: Apache-2.0
"""The linear probe against torch's own SGD, against scikit-learn, and its rule about the test set."""

import math

import pytest
import torch
from messages import mentions
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.evaluation import knn_accuracy, linear_probe
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.evaluation.knn import leave_one_out_knn
from hf_ssl.evaluation.protocols.linear import Config, run, train_heads
from hf_ssl.evaluation.scores import by_setting
from hf_ssl.modeling.pooling import VECTORS


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_learning_rate_must_be_positive_and_finite(rate: float) -> None:
    features, labels = torch.randn(8, 2), torch.arange(8) % 2
    with pytest.raises(UserError, match="linear probe"):
        linear_probe(features, labels, features, labels, learning_rates=[0.1, rate])
    with pytest.raises(UserError, match="temperature"):
        knn_accuracy(features, labels, features, labels, neighbors=[1], temperatures=[rate])
    with pytest.raises(UserError, match="temperature"):
        leave_one_out_knn(features, labels, neighbors=1, temperature=rate)


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    features, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return features[train], labels[train], features[test], labels[test]


def torch_head(features, labels, classes, rate, epochs, batch_size, generator) -> torch.Tensor:
    """The same training by autograd and torch.optim: an independent version."""
    head = torch.nn.Linear(features.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    steps = epochs * math.ceil(len(features) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator)
        for index in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(features[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    return torch.cat([head.weight.detach().T, head.bias.detach()[None]])


def test_heads_equal_those_of_torch_sgd() -> None:
    features, labels, _, _ = digits()
    rates = [0.01, 0.3, 2.0]
    heads = train_heads(features, labels, 10, rates, 2, 256, torch.Generator().manual_seed(4))
    for number, rate in enumerate(rates):
        expected = torch_head(features, labels, 10, rate, 2, 256, torch.Generator().manual_seed(4))
        torch.testing.assert_close(heads[:, number], expected, atol=2e-5, rtol=1e-4)


def test_reaches_what_scikit_learn_reaches() -> None:
    sklearn_linear = pytest.importorskip("sklearn.linear_model")
    features, labels, test, answers = digits()
    # NumPy arrays, because scikit-learn 1.6 does not accept the device of a CPU tensor.
    train, train_labels, held_out, truth = (tensor.numpy() for tensor in (features, labels, test, answers))
    theirs = sklearn_linear.LogisticRegression(C=1e3, max_iter=2000).fit(train, train_labels)
    expected = theirs.score(held_out, truth)
    probe = linear_probe(features, labels, test, answers, epochs=50)
    assert probe.accuracy == pytest.approx(expected, abs=0.02)
    assert probe.accuracy > 0.94
    assert probe.validation_accuracy == max(probe.validation.values())
    assert probe.validation[probe.learning_rate] == probe.validation_accuracy


def test_test_labels_choose_nothing() -> None:
    features, labels, test, answers = digits()
    honest = linear_probe(features, labels, test, answers, epochs=3)
    wrong = linear_probe(features, labels, test, (answers + 1) % 10, epochs=3)
    assert wrong.validation == honest.validation
    assert wrong.learning_rate == honest.learning_rate
    assert wrong.accuracy < 0.05 < honest.accuracy


def test_the_last_training_uses_the_held_out_rows_too() -> None:
    # One row a class: a class that was held out can only be known if the head was trained again on all rows.
    rows, labels = torch.eye(10), torch.arange(10)
    probe = linear_probe(rows, labels, rows, labels, learning_rates=[1.0], epochs=20, batch_size=10)
    assert probe.accuracy == 1.0
    assert probe.validation_accuracy == 0.0
    assert not probe.at_edge, "one rate is no sweep"


def test_edge_of_the_sweep_is_told() -> None:
    features, labels, test, answers = digits()
    probe = linear_probe(features, labels, test, answers, epochs=1, learning_rates=[1e-9, 1e-8, 0.1])
    assert (probe.learning_rate, probe.at_edge) == (0.1, True)
    probe = linear_probe(
        features, labels, test, answers, epochs=10, learning_rates=[1e-9, 0.3, 1e9], batch_size=64
    )
    assert (probe.learning_rate, probe.at_edge) == (0.3, False)


def test_standardizing_uses_training_rows_and_forgives_bad_scales() -> None:
    features, labels, test, answers = digits()
    scale = torch.logspace(-3, 3, 64)
    plain, forgiving = (
        linear_probe(
            features * scale + 50,
            labels,
            test * scale + 50,
            answers,
            epochs=10,
            learning_rates=[0.1],
            standardize=flag,
        ).accuracy
        for flag in (False, True)
    )
    assert plain < 0.6 < 0.9 < forgiving
    # One test row at a time: statistics of the test rows would say nothing about it.
    alone = [
        linear_probe(
            features,
            labels,
            test[row : row + 1],
            answers[row : row + 1],
            epochs=3,
            learning_rates=[0.1],
            standardize=True,
        ).accuracy
        for row in range(10)
    ]
    assert sum(alone) >= 7


def test_same_seed_same_result_and_global_randomness_untouched() -> None:
    features, labels, test, answers = digits()
    state = torch.random.get_rng_state()
    first = linear_probe(features, labels, test, answers, epochs=2, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    assert linear_probe(features, labels, test, answers, epochs=2, seed=7) == first
    assert linear_probe(features, labels, test, answers, epochs=2, seed=8).validation != first.validation


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"learning_rates": []}, ["[]"]),
        ({"learning_rates": [0.0]}, ["[0.0]"]),
        ({"epochs": 0}, ["epochs", 0]),
        ({"train_labels": [0] * 9}, [10, "(9,)"]),
        ({"train_features": torch.full((10, 4), torch.inf)}, ["10 of 10", "infinite"]),
    ],
)
def test_bad_input_is_refused_in_words(change: dict, parts: list) -> None:
    arguments = {
        "train_features": torch.ones(10, 4), "train_labels": [0] * 10,
        "test_features": torch.ones(10, 4), "test_labels": [0] * 10,
    } | change  # fmt: skip
    with pytest.raises(UserError, match=mentions("linear probe", *parts)):
        linear_probe(**arguments)


def grid_inputs(seed: int, names: list[str], signal: str) -> Inputs:
    """Features of the grid in which one feature shows the class, and the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for count, name in ((300, "train"), (120, "test")):
        labels = torch.arange(count) % 3
        noise = {key: torch.randn(count, 8 + width, generator=generator) for width, key in enumerate(names)}
        if signal in noise:
            noise[signal][:, :3] += 3 * F.one_hot(labels, 3)
        splits.append(Split(torch.randn(count, 8, generator=generator), labels, name, noise))
    return Inputs(*splits, torch.device("cpu"))


@pytest.mark.parametrize("signal", VECTORS)
def test_the_grid_finds_the_feature_that_shows_the_class(signal: str) -> None:
    inputs, config = grid_inputs(0, list(VECTORS), signal), Config(epochs=5)
    published, grid = run(inputs, config)
    assert published["key"] == "linear_probe" and grid["key"] == "linear_grid"
    assert published["value"] < 0.5 < 0.9 < grid["value"]
    assert grid["selection"]["feature"] == signal
    assert f"the feature {signal} ({VECTORS[signal]})" in grid["text"]
    assert "13 learning rates, 0.0001 to 100, of cls, cls_mean, cls_last4, cls_last4_mean" in grid["text"]
    assert "120 images of split test" in grid["text"]
    validation = grid["details"]["validation"]
    assert list(validation) == list(VECTORS)
    best = max(value for rates in validation.values() for value in rates.values())
    assert validation[signal][f"{grid['selection']['learning_rate']:g}"] == best
    for result in (published, grid):
        curves = result["details"]["epochs"]
        assert len(curves["train"]) == len(curves["test"]) == 5
        assert curves["test"][-1] == result["value"]


def test_each_feature_of_the_grid_is_trained_as_if_it_were_alone() -> None:
    """And the heads are those of torch's SGD, feature by feature and rate by rate."""
    inputs, config = grid_inputs(1, list(VECTORS), "cls_mean"), Config(epochs=2, learning_rates=[0.03, 1.0])
    (_, grid), labels = run(inputs, config), inputs.train.labels
    for name in VECTORS:
        rows = inputs.train.further[name]
        alone = linear_probe(
            rows, labels, inputs.test.further[name], inputs.test.labels, epochs=2, learning_rates=[0.03, 1.0]
        )
        assert grid["details"]["validation"][name] == by_setting(alone.validation)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(300, generator=generator)
        chosen, kept = order[:30], order[30:]
        state = generator.get_state()
        for rate in (0.03, 1.0):
            generator.set_state(state)
            head = torch_head(rows[kept], labels[kept], 3, rate, 2, 256, generator)
            right = (rows[chosen] @ head[:-1] + head[-1]).argmax(1) == labels[chosen]
            assert alone.validation[rate] == pytest.approx(float(right.double().mean()))


def test_the_grid_needs_several_features_and_leaves_the_published_number_unchanged() -> None:
    inputs, config = grid_inputs(2, list(VECTORS), "cls"), Config(epochs=2)
    published, grid = run(inputs, config)
    for features, keys in (([], 1), (["cls"], 1), (["cls", "cls_last4"], 2)):
        results = run(inputs, Config(epochs=2, features=features))
        assert len(results) == keys and results[0] == published
    assert results[1]["id"] != grid["id"] and results[1]["column"] == "linear probe, best of 2 features"
    inputs.train.further.clear()  # an encoder without class token
    assert run(inputs, config) == [published]
    with pytest.raises(
        UserError, match=mentions("evaluation.settings.linear.features", "cls_max", "cls_mean")
    ):
        Config(features=["cls_max"]).check("evaluation.settings.linear")


def test_the_test_labels_choose_no_feature() -> None:
    inputs, config = grid_inputs(3, list(VECTORS), ""), Config(epochs=2)
    honest = run(inputs, config)[1]
    inputs.test.labels = (inputs.test.labels + 1) % 3
    wrong = run(inputs, config)[1]
    assert honest["selection"] == wrong["selection"]
    assert honest["details"]["validation"] == wrong["details"]["validation"]
    assert honest["value"] != wrong["value"]
