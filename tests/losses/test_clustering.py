# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl.losses import cluster_cross_entropy, sinkhorn, soft_targets, swapped_prediction


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosines(batch, prototypes, dims=8):
    return normalize(randn(batch, dims, seed=1), dim=1) @ normalize(randn(prototypes, dims, seed=2), dim=1).T


def probabilities(*shape, seed=0):
    return randn(*shape, seed=seed).softmax(-1)


def slow_sinkhorn(scores, epsilon, iterations):
    """Return the assignments one number at a time, without logarithms."""
    matrix = [[math.exp(float(score) / epsilon) for score in row] for row in scores]
    samples, prototypes = range(len(matrix)), range(len(matrix[0]))
    for _ in range(iterations):
        for k in prototypes:
            total = sum(matrix[b][k] for b in samples)
            for b in samples:
                matrix[b][k] /= total
        for b in samples:
            total = sum(matrix[b])
            matrix[b] = [value / total for value in matrix[b]]
    return torch.tensor(matrix, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("epsilon", [0.005, 0.03, 0.05, 0.5])
@pytest.mark.parametrize("shape", [(6, 3), (3, 7), (1, 4), (4, 1)])
def test_sinkhorn_equals_its_definition(shape, epsilon, iterations):
    scores = cosines(*shape)
    expected = slow_sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(sinkhorn(scores, epsilon=epsilon, iterations=iterations), expected)
    single = sinkhorn(scores.float(), epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("epsilon", [0.005, 0.03])
def test_sinkhorn_works_for_exponentials_that_overflow_and_vanish(epsilon, scale):
    """exp(1 / 0.005) is infinite in float32. Its ratio to exp(-1 / 0.005) is infinite even in float64.

    One sample is far from every prototype, and one prototype is far from every sample.
    """
    scores = torch.ones(64, 16)
    scores[:, 3] = -1
    scores[7] = -1
    scores[9:] = cosines(64, 16).float()[9:]
    assignments = sinkhorn(scale * scores, epsilon=epsilon, iterations=3)
    assert assignments.isfinite().all()
    torch.testing.assert_close(assignments.sum(1), torch.ones(64))
    assert (assignments.sum(0) > 0).all(), "every prototype should be used"


def test_sinkhorn_spreads_samples_over_prototypes():
    scores = cosines(240, 12)
    scores[:, 0] += 1  # without balancing, this prototype would get nearly all samples
    assert (scores.argmax(1) == 0).float().mean() > 0.8
    assignments = sinkhorn(scores, epsilon=0.05, iterations=30)
    torch.testing.assert_close(assignments.sum(1), torch.ones(240).double())
    torch.testing.assert_close(assignments.sum(0), torch.full((12,), 20.0).double(), rtol=0.02, atol=0)


def test_sinkhorn_of_equal_scores_is_uniform_and_follows_the_order_of_its_input():
    torch.testing.assert_close(
        sinkhorn(torch.full((5, 4), 0.7), epsilon=0.05, iterations=3), torch.full((5, 4), 0.25)
    )
    scores = cosines(6, 4)
    assignments = sinkhorn(scores, epsilon=0.1, iterations=3)
    torch.testing.assert_close(sinkhorn(scores.flip(0), epsilon=0.1, iterations=3), assignments.flip(0))
    torch.testing.assert_close(sinkhorn(scores.flip(1), epsilon=0.1, iterations=3), assignments.flip(1))
    torch.testing.assert_close(sinkhorn(scores + 3, epsilon=0.1, iterations=3), assignments)


def test_sinkhorn_depends_on_the_other_samples_and_has_no_gradient():
    """For this reason, it needs the scores of all processes."""
    scores = cosines(8, 4).requires_grad_()
    whole = sinkhorn(scores, epsilon=0.1, iterations=3)
    assert not whole.requires_grad
    assert not torch.allclose(sinkhorn(scores[:4], epsilon=0.1, iterations=3), whole[:4])


@pytest.mark.parametrize(
    ("shape", "epsilon", "iterations", "parts"),
    [
        ((2, 3, 4), 0.05, 3, ["(2, 3, 4)"]),
        ((0, 4), 0.05, 3, ["(0, 4)"]),
        ((3, 4), 0.0, 3, ["epsilon", "0.0"]),
        ((3, 4), 0.05, 0, ["iterations", 0]),
    ],
)
def test_sinkhorn_raises_for_invalid_arguments(shape, epsilon, iterations, parts):
    with pytest.raises(ValueError, match=mentions("sinkhorn", *parts)):
        sinkhorn(torch.ones(shape), epsilon=epsilon, iterations=iterations)


def slow_swapped_prediction(scores, assignments, temperature):
    total, terms = 0.0, 0
    for a, assigned in enumerate(assignments):
        for v, view in enumerate(scores):
            for b in range(len(view)):
                if v != a:
                    logits = view[b] / temperature
                    total = total - sum(assigned[b] * (logits - torch.logsumexp(logits, 0)))
                    terms += 1
    return total / terms


@pytest.mark.parametrize(("views", "assigned"), [(2, 1), (2, 2), (5, 2), (3, 3)])
@pytest.mark.parametrize("mass", [1, 0.7])
def test_swapped_prediction_equals_its_definition(views, assigned, mass):
    """This holds also for assignments whose rows do not sum to one."""
    scores, targets = randn(views, 3, 4).requires_grad_(), mass * probabilities(assigned, 3, 4, seed=1)
    loss = swapped_prediction(scores, targets, temperature=0.3)
    slow = slow_swapped_prediction(scores, targets, 0.3)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(slow, scores))


def test_swapped_prediction_gradcheck():
    targets = probabilities(2, 3, 4, seed=1)
    assert torch.autograd.gradcheck(
        lambda scores: swapped_prediction(scores, targets, temperature=0.3), randn(4, 3, 4).requires_grad_()
    )


@pytest.mark.parametrize("numbers", [1, 24, 10**6])
def test_parts_do_not_change_swapped_prediction(numbers, monkeypatch):
    scores, targets = randn(3, 5, 4).requires_grad_(), probabilities(2, 5, 4, seed=1)
    slow = slow_swapped_prediction(scores, targets, 0.1)
    monkeypatch.setitem(soft_targets._LOGITS_PER_PART, "cpu", numbers)
    loss = swapped_prediction(scores, targets, temperature=0.1)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(slow, scores))


def test_swapped_prediction_has_closed_forms():
    """Equal scores give log K. A view is never compared with its own assignment."""
    loss = swapped_prediction(torch.ones(3, 2, 8), probabilities(2, 2, 8).float(), temperature=0.1)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-6)
    wrong = torch.eye(4)[None, [0]]
    right = torch.eye(4)[None, [1]]
    scores = torch.cat([right, wrong])  # (2, 1, 4)
    assert swapped_prediction(scores, torch.cat([wrong, right]), temperature=0.01).item() == pytest.approx(0)
    assert swapped_prediction(scores, torch.cat([right, wrong]), temperature=0.01).item() == pytest.approx(
        100
    )


def test_the_assignments_get_no_gradient():
    targets = probabilities(2, 3, 4).requires_grad_()
    swapped_prediction(randn(2, 3, 4).requires_grad_(), targets, temperature=0.1).backward()
    assert targets.grad is None


@pytest.mark.parametrize(
    ("scores", "assignments", "temperature", "parts"),
    [
        ((1, 2, 3), (1, 2, 3), 0.1, ["(1, 2, 3)"]),
        ((2, 3), (2, 3), 0.1, ["(2, 3)"]),
        ((2, 2, 3), (2, 3), 0.1, ["(2, 2, 3)", "(2, 3)"]),
        ((2, 2, 3), (2, 4, 3), 0.1, ["(2, 2, 3)", "(2, 4, 3)"]),
        ((2, 2, 3), (3, 2, 3), 0.1, [2, 3]),
        ((2, 2, 3), (0, 2, 3), 0.1, [2, 0]),
        ((2, 2, 3), (2, 2, 3), 0.0, ["temperature", "0.0"]),
    ],
)
def test_swapped_prediction_raises_for_invalid_arguments(scores, assignments, temperature, parts):
    with pytest.raises(ValueError, match=mentions("swapped_prediction", *parts)):
        swapped_prediction(torch.ones(scores), torch.ones(assignments), temperature=temperature)


def slow_cluster_cross_entropy(scores, clusters, temperature):
    terms = [
        torch.logsumexp(view[b] / temperature, 0) - view[b][cluster] / temperature
        for view in scores
        for b, cluster in enumerate(clusters.tolist())
        if cluster != -100
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("clusters", [[2, 0, 3], [-100, 1, -100]])
def test_cluster_cross_entropy_equals_its_definition(clusters):
    scores, clusters = randn(4, 3, 5).requires_grad_(), torch.tensor(clusters)
    loss = cluster_cross_entropy(scores, clusters, temperature=0.2)
    slow = slow_cluster_cross_entropy(scores, clusters, 0.2)
    torch.testing.assert_close(loss, slow)
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, *torch.autograd.grad(slow, scores))
    assert (gradient[:, clusters == -100] == 0).all()


def test_cluster_cross_entropy_gradcheck():
    clusters = torch.tensor([2, -100, 0])
    assert torch.autograd.gradcheck(
        lambda scores: cluster_cross_entropy(scores, clusters, temperature=0.2),
        randn(2, 3, 4).requires_grad_(),
    )


def test_cluster_cross_entropy_has_closed_forms():
    assert cluster_cross_entropy(torch.ones(2, 3, 8), torch.tensor([1, 2, 7]), temperature=0.1).item() == (
        pytest.approx(math.log(8))
    )
    scores = torch.ones(2, 3, 8, requires_grad=True)
    loss = cluster_cross_entropy(scores, torch.full((3,), -100), temperature=0.1)
    loss.backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


@pytest.mark.parametrize(
    ("shape", "clusters", "temperature", "parts"),
    [
        ((3, 5), torch.zeros(3, dtype=torch.int64), 0.1, ["(3, 5)"]),
        ((2, 3, 5), torch.zeros(2, dtype=torch.int64), 0.1, [3, "(2,)"]),
        ((2, 3, 5), torch.zeros(3), 0.1, ["int64", "float32"]),
        ((2, 3, 5), torch.zeros(3, dtype=torch.int64), -1.0, ["temperature", "-1.0"]),
    ],
)
def test_cluster_cross_entropy_raises_for_invalid_arguments(shape, clusters, temperature, parts):
    with pytest.raises(ValueError, match=mentions("cluster_cross_entropy", *parts)):
        cluster_cross_entropy(torch.ones(shape), clusters, temperature=temperature)
