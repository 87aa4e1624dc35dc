# SPDX-License-Identifier: Apache-2.0
"""Measurements of methods: the use of prototypes in closed form, and the alignment of linear predictors."""

import math

import numpy as np
import pytest
import torch

from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.modeling.outputs import eigenspace_alignment, prototype_usage
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model


@pytest.mark.parametrize(
    ("nearest", "count", "entropy", "used"),
    [
        ([0, 1, 2, 3], 4, 1, 1),
        ([0, 0, 1, 1], 4, math.log(2) / math.log(4), 2 / 4),
        ([0, 0, 0, 1], 2, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2), 1),
        ([2, 2, 2, 2], 4, 0, 1 / 4),
        ([0, 1, 1], 100, -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)) / math.log(3), 2 / 3),
        ([0], 1, 0, 1),
    ],
)
def test_entropy_and_share(nearest, count, entropy, used):
    found = prototype_usage(torch.tensor(nearest), count)
    assert found == pytest.approx({"prototype_entropy": entropy, "prototypes_used": used}, abs=1e-6)


def slow_alignment(weight, rows):
    """Mean over eigenvectors u of the correlation matrix of |cos(u, W u)|, one at a time."""
    correlation = sum(torch.outer(row, row) for row in rows) / len(rows)
    values, vectors = np.linalg.eigh(correlation.numpy())
    found = []
    for value, u in zip(values, vectors.T, strict=True):
        if value > 1e-6 * values.max():
            image = weight.numpy() @ u
            found.append(abs(u @ image) / np.linalg.norm(image) / np.linalg.norm(u))
    return sum(found) / len(found)


def test_eigenspace_alignment_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, dtype=torch.float64, generator=generator) * torch.arange(1, 7)
    weight = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    found = eigenspace_alignment(weight, rows.unflatten(0, (20, 2)))
    assert found == pytest.approx(slow_alignment(weight, rows), rel=1e-9) and found < 0.9
    few = rows[:3]  # three of six eigenvalues are zero
    found = eigenspace_alignment(weight, few)
    assert found == pytest.approx(slow_alignment(weight, few), rel=1e-9)


def test_a_predictor_with_the_eigenvectors_of_the_correlation_matrix_is_aligned():
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    vectors = torch.linalg.eigh(rows.T @ rows)[1]
    aligned = (vectors * torch.tensor([-1.0, 0.5, 2.0, 3.0])) @ vectors.T
    assert eigenspace_alignment(aligned, rows) == pytest.approx(1, abs=1e-6)
    assert eigenspace_alignment(torch.eye(4), rows) == pytest.approx(1, abs=1e-5)
    quarter = vectors @ torch.tensor([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1.0, 0]]) @ vectors.T
    assert eigenspace_alignment(quarter, rows) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("frequency", [1, 3])
def test_byol_with_a_linear_predictor_and_directpred_measure_the_alignment(frequency):
    settings = ["method.projection_size=4", "method.projection_hidden_size=8"]
    recipes = [
        load_recipe("smoke/byol", [*settings, "method.predictor_layers=1"]),
        load_recipe("smoke/directpred", [*settings, f"method.update_frequency={frequency}"]),
    ]
    rows = torch.randn(20, 2, 4, generator=torch.Generator().manual_seed(2))
    for recipe in recipes:
        model = build_model(recipe, seed=0)
        layer = model.predictor if recipe.method["name"] == "directpred" else model.predictor[0]
        torch.nn.init.normal_(layer.weight)
        torch.testing.assert_close(
            model.predictor(rows), rows @ layer.weight.T
        )  # the map that is measured, without a bias
        measured = model.measurements({"projections": rows})
        expected = slow_alignment(layer.weight.detach().double(), rows.flatten(0, 1).double())
        assert measured["eigenspace_alignment"] == pytest.approx(expected, rel=1e-6)
        assert set(measured) == {"predictor_rank", "eigenspace_alignment"}
        assert set(measured) <= set(MEASUREMENTS)
    assert build_model(load_recipe("smoke/byol"), seed=0).measurements({"projections": rows}) == {}
