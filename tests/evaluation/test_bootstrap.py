# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap: coverage of known errors, pairing, symmetry; and the stored predictions."""

import math

import numpy as np
import pytest
import torch
from messages import mentions

from hf_ssl.evaluation import class_metrics, evaluate_features
from hf_ssl.evaluation.bootstrap import bootstrap_error, pack_right, paired_bootstrap, unpack_right
from hf_ssl.evaluation.results import find_results, mean_error, standard_error, with_current_layout


def runs(count: int, accuracy: float, images: int = 2000, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).random((count, images)) < accuracy)


@pytest.mark.parametrize("images", [1, 7, 8, 9, 1000])
def test_predictions_are_packed_and_unpacked(images: int) -> None:
    right = np.random.default_rng(0).random(images) < 0.5
    text = pack_right(right)
    assert len(text) == 2 * math.ceil(images / 8)
    assert np.array_equal(unpack_right(text, images), right)
    with pytest.raises(ValueError, match=mentions(images + 8)):
        unpack_right(text, images + 8)


def test_a_fixed_example_of_the_layout() -> None:
    assert pack_right(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], bool)) == "8080"


def test_the_interval_of_one_run_is_that_of_the_images() -> None:
    """Two independent classifiers: the variances of both accuracies add up."""
    (first,), (second,) = runs(1, 0.8), runs(1, 0.7, seed=1)
    found = paired_bootstrap([first], [second])
    assert found.value == pytest.approx(first.mean() - second.mean())
    error = (0.8 * 0.2 / 2000 + 0.7 * 0.3 / 2000) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found.p < 0.01
    assert paired_bootstrap([first], [second]) == found


def test_errors_on_the_same_images_cancel() -> None:
    """The second classifier has the errors of the first one, and 20 more of 2,000."""
    (first,) = runs(1, 0.7)
    second = first.copy()
    second[np.flatnonzero(first)[:20]] = False
    found = paired_bootstrap([first], [second])
    assert found.value == pytest.approx(0.01)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * (0.01 * 0.99 / 2000) ** 0.5, rel=0.15)
    assert found.p < 0.01 < paired_bootstrap([first], runs(1, 0.7, seed=2)).p


def test_both_orders_agree_and_equal_runs_do_not_differ() -> None:
    first, second = runs(3, 0.75), runs(2, 0.7, seed=1)
    one, other = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert one.value == pytest.approx(-other.value)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.005)
    equal = paired_bootstrap(first[:1], first[:1])
    assert equal == (0, 0, 0, 1)


def test_the_variation_over_runs_widens_the_interval() -> None:
    """Runs with accuracies 0.6 and 0.8: their mean is uncertain, whatever the number of images."""
    spread = [*runs(1, 0.6, 20_000), *runs(1, 0.8, 20_000, seed=1)]
    narrow = paired_bootstrap(runs(2, 0.7, 20_000, seed=2), runs(2, 0.7, 20_000, seed=3), samples=1000)
    wide = paired_bootstrap(spread, runs(2, 0.7, 20_000, seed=3), samples=1000)
    assert wide.high - wide.low > 0.19 > 0.03 > narrow.high - narrow.low


def test_results_contain_the_predictions() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    features = torch.eye(3, 12)[labels] + 0.7 * torch.randn(150, 12, generator=generator)
    data = features[:100], labels[:100], features[100:], labels[100:]
    result = evaluate_features({"settings": {"linear": {"epochs": 2}}}, *data)
    for number in result["protocols"]:
        right = unpack_right(number["details"]["right"], 50)
        assert right.mean() == pytest.approx(number["value"]), number["key"]


def test_a_label_without_a_score_is_wrong() -> None:
    found = class_metrics(torch.eye(2), torch.tensor([0, 7]))
    assert found == {"top_1": 0.5, "top_5": 0.5, "mean_per_class": 0.5}


def test_the_bootstrap_of_a_mean_has_the_error_of_the_mean() -> None:
    values = np.random.default_rng(0).random(500)
    assert mean_error(values.tolist()) == pytest.approx(values.std(ddof=1) / 500**0.5)
    found = bootstrap_error(lambda rows: values[rows].mean(), 500, seed=1, samples=2000)
    assert found == pytest.approx(mean_error(values.tolist()), rel=0.05)
    assert bootstrap_error(lambda rows: math.nan, 500, seed=1) == 0


def test_an_old_result_of_one_draw_has_the_error_over_images() -> None:
    few = {"labels_per_class": 1, "mean": 0.6, "std": 0.0, "draws": 1}
    knn = {"neighbors": 1, "temperature": 0.1, "accuracy": 0.5, "grid": {}}
    words = {"knn": "", "few_labels": "", "features": ""}
    old = {"protocol": words, "knn": knn, "linear": None, "few_labels": [few], "images": {"test": 100}}
    (result,) = find_results(with_current_layout(old), "few_label_knn")
    assert result["standard_error"] == standard_error(0.6, 100) > 0.04
