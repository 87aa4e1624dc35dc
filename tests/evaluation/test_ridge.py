# SPDX-License-Identifier: Apache-2.0
"""Ridge regression agrees with scikit-learn, and its leave-one-out accuracy with a loop over the images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier

from hf_ssl.evaluation import evaluate_features
from hf_ssl.evaluation.protocols.ridge import RidgeFit


@pytest.fixture(params=[(60, 7), (20, 30)], ids=["more images", "more features"])
def data(request) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = request.param
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    features = torch.randn(rows, width, generator=generator) + 0.7 * torch.eye(3, width)[labels] + 3
    return features * torch.linspace(0.1, 5, width), labels


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 300.0])
def test_the_outputs_are_those_of_scikit_learn(data, penalty: float) -> None:
    features, labels = data
    queries = features.flip(0) * 1.1
    found = RidgeFit.of(features, labels, 4).scores(queries, penalty)
    rows, targets = features.double().numpy(), torch.nn.functional.one_hot(labels, 4).double().numpy()
    expected = Ridge(alpha=penalty, solver="svd").fit(rows, targets).predict(queries.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    classifier = RidgeClassifier(alpha=penalty).fit(rows, labels.numpy())
    assert found.argmax(dim=1).tolist() == classifier.predict(queries.double().numpy()).tolist()


def test_leave_one_out_is_a_loop_over_the_images(data) -> None:
    features, labels = data
    penalties = [1e-2, 1.0, 100.0, 1e4]
    rows, targets = features.double().numpy(), torch.nn.functional.one_hot(labels, 3).double().numpy()
    expected = []
    for penalty in penalties:
        right = 0
        for row in range(len(rows)):
            others = np.arange(len(rows)) != row
            model = Ridge(alpha=penalty, solver="svd").fit(rows[others], targets[others])
            right += int(model.predict(rows[[row]]).argmax() == labels[row])
        expected.append(right / len(rows))
    found = RidgeFit.of(features, labels, 3).leave_one_out_accuracy(features, labels, penalties)
    assert found == expected
    assert len(set(expected)) > 1, "the penalty matters"


def test_the_protocol_does_not_depend_on_the_scale_of_the_features(data) -> None:
    features, labels = data
    config = {"protocols": ["ridge"]}
    (one,) = evaluate_features(config, features, labels, features.flip(0), labels)["protocols"]
    (other,) = evaluate_features(config, features * 100, labels, features.flip(0) * 100, labels)["protocols"]
    assert other["value"] == one["value"]
    assert other["details"]["validation"] == one["details"]["validation"]
    assert other["selection"]["lambda"] == pytest.approx(1e4 * one["selection"]["lambda"], rel=1e-4)
    assert one["details"]["validation"][f"{one['details']['relative_lambda']:.6g}"] == max(
        one["details"]["validation"].values()
    )


def test_constant_features_predict_the_largest_class() -> None:
    labels = torch.tensor([0, 1, 1, 2])
    (result,) = evaluate_features(
        {"protocols": ["ridge"]}, torch.ones(4, 3), labels, torch.ones(4, 3), labels
    )["protocols"]
    assert result["value"] == 0.5
