# SPDX-License-Identifier: Apache-2.0
"""The softmax regression agrees with scikit-learn: objective, probabilities and accuracy."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from hf_ssl.evaluation import evaluate_features
from hf_ssl.evaluation.inputs import hold_out
from hf_ssl.evaluation.protocols.logistic_regression import STRENGTHS
from hf_ssl.evaluation.softmax_regression import Problem
from hf_ssl.evaluation.statistics import principal_axes

Data = tuple[torch.Tensor, torch.Tensor]


def make_data(rows: int, width: int, classes: int = 4, seed: int = 0) -> Data:
    """Features with a mean and with variances that differ by six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    means = 0.6 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    features = torch.randn(rows, width, generator=generator) + means[labels]
    return features * torch.logspace(0, -3, width) + 0.5, labels


def of_sklearn(features: torch.Tensor, labels: torch.Tensor, strength: float) -> LogisticRegression:
    model = LogisticRegression(C=strength, max_iter=20_000, tol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features.double().numpy(), labels.numpy())


def loss_of(model: LogisticRegression, features: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean cross entropy + |W|^2 / (2 N C)."""
    probabilities = model.predict_log_proba(features.double().numpy())
    entropy = -probabilities[np.arange(len(labels)), labels.numpy()].mean()
    return entropy + (model.coef_**2).sum() / (2 * len(labels) * model.C)


@pytest.mark.parametrize(
    ("rows", "width", "strength"),
    [(400, 12, 1e-4), (400, 12, 0.1), (400, 12, 1e4), (30, 50, 1e-4), (30, 50, 0.1), (30, 50, 10.0)],
)
def test_the_solution_is_that_of_scikit_learn(rows: int, width: int, strength: float) -> None:
    features, labels = make_data(rows, width)
    test, _ = make_data(200, width, seed=1)
    problem = Problem(features, labels, 4)
    (solution,) = problem.solve([strength], iterations=1000)
    model = of_sklearn(features, labels, strength)
    assert solution.converged
    assert solution.loss == pytest.approx(loss_of(model, features, labels), abs=1e-5)
    found = problem.scores(solution, test).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(test.double().numpy()), atol=0.01)


def test_separable_classes_have_the_predictions_of_scikit_learn() -> None:
    """The weights grow with C, and the loss is almost zero."""
    features, labels = make_data(30, 50)
    test, _ = make_data(200, 50, seed=1)
    problem = Problem(features, labels, 4)
    solution = problem.solve([1.0, 100.0, 1e4], iterations=1000)[-1]
    model = of_sklearn(features, labels, 1e4)
    assert loss_of(model, features, labels) < 0.002
    assert solution.loss == pytest.approx(loss_of(model, features, labels), abs=1e-5)
    found = problem.scores(solution, test).argmax(dim=1).numpy()
    assert (found == model.predict(test.double().numpy())).mean() > 0.98


def test_the_gradient_is_the_derivative_of_the_objective() -> None:
    features, labels = make_data(50, 6)
    problem = Problem(features, labels, 4)
    weights = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    scores = torch.addmm(weights[-1], problem.rows_NA, weights[:-1])
    loss = torch.nn.functional.cross_entropy(scores, labels) + weights[:-1].square().sum() / (2 * 50 * 0.3)
    loss.backward()
    found, gradient = problem.objective(weights.detach(), 0.3)
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, weights.grad, rtol=1e-4, atol=1e-6)


def test_a_path_of_penalties_gives_the_same_solutions_as_single_ones() -> None:
    features, labels = make_data(300, 8)
    problem = Problem(features, labels, 4)
    strengths = [1e-3, 0.1, 10.0]
    for found in problem.solve(strengths):
        (alone,) = problem.solve([found.strength])
        assert found.loss == pytest.approx(alone.loss, abs=1e-6)


def test_classes_without_images_are_never_predicted() -> None:
    features, labels = make_data(200, 8)
    dense = Problem(features, labels, 4)
    sparse = Problem(features, torch.tensor([1, 3, 4, 7])[labels], 9)
    (solution,), (same,) = dense.solve([1.0]), sparse.solve([1.0])
    scores = sparse.scores(same, features)
    torch.testing.assert_close(scores[:, [1, 3, 4, 7]], dense.scores(solution, features))
    assert bool((scores[:, [0, 2, 5, 6, 8]] == -torch.inf).all())


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (5, 9)])
def test_principal_axes(rows: int, width: int) -> None:
    features, _ = make_data(rows, width)
    axes = principal_axes(features)
    centered = features.double() - features.double().mean(dim=0)
    count = min(rows - 1, width)
    torch.testing.assert_close(axes.axes.T @ axes.axes, torch.eye(count, dtype=torch.float64))
    projected = axes.project(features)
    torch.testing.assert_close(projected.T @ projected, axes.squares.diag(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(projected @ axes.axes.T, centered)
    assert principal_axes(torch.ones(4, 3)).axes.shape == (3, 0), "no direction has variance"


def test_the_protocol_selects_c_like_a_loop_with_scikit_learn() -> None:
    train, labels = make_data(600, 10)
    test, test_labels = make_data(1000, 10, seed=1)
    strengths = [1e-3, 0.1, 10.0, 1000.0]
    settings = {"logistic_regression": {"strengths": strengths}}
    config = {"protocols": ["logistic_regression"], "settings": settings}
    (result,) = evaluate_features(config, train, labels, test, test_labels)["protocols"]
    kept, chosen = hold_out(600, 0)
    assert (len(kept), len(chosen)) == (540, 60) and len({*kept.tolist(), *chosen.tolist()}) == 600
    expected = [
        of_sklearn(train[kept], labels[kept], strength).score(
            train[chosen].double().numpy(), labels[chosen].numpy()
        )
        for strength in strengths
    ]
    assert list(result["details"]["validation"].values()) == pytest.approx(expected, abs=1 / 60 + 1e-9)
    final = of_sklearn(train, labels, result["selection"]["C"])
    assert result["value"] == pytest.approx(
        final.score(test.double().numpy(), test_labels.numpy()), abs=0.002
    )
    assert result["details"]["loss"] == pytest.approx(loss_of(final, train, labels), abs=1e-5)


def test_standardized_features_give_the_same_result_for_all_units() -> None:
    train, labels = make_data(300, 10)
    test, test_labels = make_data(300, 10, seed=1)
    options = {"strengths": [0.01, 1.0], "standardize": True}
    config = {"protocols": ["logistic_regression"], "settings": {"logistic_regression": options}}
    units = torch.logspace(-2, 2, 10)
    (one,) = evaluate_features(config, train, labels, test, test_labels)["protocols"]
    (other,) = evaluate_features(config, train * units, labels, test * units, test_labels)["protocols"]
    assert one["value"] == pytest.approx(other["value"], abs=0.005)
    assert "frozen features, standardized" in one["text"]


def test_the_values_of_c_are_those_of_dinov2() -> None:
    np.testing.assert_allclose(STRENGTHS, (10 ** torch.linspace(-6, 5, 45).double()).numpy(), rtol=1e-5)
