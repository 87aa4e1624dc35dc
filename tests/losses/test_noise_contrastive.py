# SPDX-License-Identifier: Apache-2.0
"""InfoNCE of CPC and the losses of memory banks: definitions in loops, closed forms, gradients, memory."""

import math

import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl.losses import (
    cpc_info_nce,
    info_nce,
    memory_nce,
    memory_nce_constant,
    memory_scores,
    memory_softmax,
    noise_contrastive,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(below, *shape, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def assert_equal_with_gradients(one, other, inputs):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    gradients = (torch.autograd.grad(value, inputs) for value in (one, other))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# CPC


def slow_cpc(predictions, targets, positives, negatives):
    """Return the loss one prediction at a time, with the probability as a quotient of exponentials."""
    total = 0.0
    for n, prediction in enumerate(predictions):

        def score(row, prediction=prediction):
            return torch.exp(sum(p * t for p, t in zip(prediction, targets[row], strict=True)))

        own = int(positives[n])
        if negatives is None:
            others = [row for row in range(len(targets)) if row != own]
        else:
            others = negatives[n].tolist()
        total = total - torch.log(score(own) / (score(own) + sum(score(row) for row in others)))
    return total / len(predictions)


@pytest.mark.parametrize("positives", [None, torch.tensor([2, 0, 6, 5, 3, 3])])
@pytest.mark.parametrize("sampled", [None, 1, 9])
def test_cpc_equals_its_definition_in_value_and_gradients(positives, sampled):
    """Nine negatives among six rows contain repeated rows and, for some predictions, the positive."""
    inputs = [randn(6, 4, seed=1), randn(6 if positives is None else 7, 4, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    negatives = None if sampled is None else rows(6, 6, sampled, seed=3)
    own = torch.arange(6) if positives is None else positives
    if sampled == 9:
        assert (negatives == own[:, None]).any()
    loss = cpc_info_nce(*inputs, positives, negatives)
    assert_equal_with_gradients(loss, slow_cpc(*inputs, own, negatives), inputs)


def test_one_step_of_cpc_over_a_grid_of_patches():
    """Position (y, x) of each image predicts the patch k rows below. The candidates are all its patches.

    The slow version loops over images and positions, as the definition in the paper does.
    """
    batch, side, step = 2, 4, 2
    contexts, patches = randn(batch, side, side, 3, seed=1), randn(batch, side, side, 3, seed=2)
    patch_rows = torch.arange(batch * side * side).view(batch, side, side)
    loss = cpc_info_nce(
        contexts[:, :-step].reshape(-1, 3), patches.reshape(-1, 3), patch_rows[:, step:].flatten()
    )
    losses = []
    for image in range(batch):
        for y in range(side - step):
            for x in range(side):
                scores = torch.einsum("d,byxd->byx", contexts[image, y, x], patches)
                losses.append(scores.flatten().logsumexp(0) - scores[image, y + step, x])
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("sampled", [False, True])
def test_cpc_gradcheck(sampled):
    inputs = [randn(4, 3, seed=1).requires_grad_(), randn(5, 3, seed=2).requires_grad_()]
    positives, negatives = rows(5, 4, seed=3), rows(5, 4, 6, seed=4) if sampled else None
    assert torch.autograd.gradcheck(lambda p, t: cpc_info_nce(p, t, positives, negatives), inputs)


def test_cpc_of_equal_scores_is_the_log_of_the_number_of_candidates():
    """The bound log(candidates) - loss of the mutual information is then 0."""
    ones = torch.ones(8, 4)
    assert cpc_info_nce(ones, ones).item() == pytest.approx(math.log(8), abs=1e-5)
    assert cpc_info_nce(ones, ones, None, rows(8, 8, 20)).item() == pytest.approx(math.log(21), abs=1e-5)


def test_the_bound_of_cpc_approaches_the_mutual_information():
    """The target is one of 16 equally probable vectors, and the prediction knows it: log(16) nats."""
    known = torch.eye(16, dtype=torch.float64)[torch.arange(512) % 16]
    negatives = rows(512, 512, 500, seed=1)
    bound = math.log(501) - cpc_info_nce(20 * known, known, None, negatives).item()
    assert math.log(16) - 0.1 < bound < math.log(16) + 0.05
    independent = 20 * known[torch.randperm(512, generator=torch.Generator().manual_seed(2))]
    assert math.log(501) - cpc_info_nce(independent, known, None, negatives).item() < 0


def test_cpc_of_perfect_predictions_is_exact():
    """The scores are 30 and 0: log(1 + K exp(-30)). A difference of float32 numbers near 30 would give 0."""
    prediction, targets = torch.tensor([[30.0, 0.0]]), torch.eye(2)
    loss = cpc_info_nce(prediction, targets, torch.tensor([0]), torch.tensor([[1, 1, 1]]))
    assert loss.item() == pytest.approx(3 * math.exp(-30), rel=1e-4)


LONG = torch.int64


@pytest.mark.parametrize(
    ("prediction", "target", "positive", "negative", "parts"),
    [
        ((4, 3), (4, 2), None, None, ["(4, 3)", "(4, 2)"]),
        ((4, 3, 1), (4, 3), None, None, ["(4, 3, 1)"]),
        ((0, 3), (4, 3), None, None, [0, 4]),
        ((1, 3), (1, 3), None, None, ["negatives", 1]),
        ((4, 3), (5, 3), None, None, ["positive_N", 4, 5]),
        ((4, 3), (5, 3), ((3,), LONG), None, ["positive_N", 4, "(3,)"]),
        ((4, 3), (5, 3), ((4,), torch.int32), None, ["positive_N", "torch.int32"]),
        ((4, 3), (4, 3), None, ((3, 2), LONG), ["negative_NK", 4, "(3, 2)"]),
        ((4, 3), (4, 3), None, ((4, 0), LONG), ["negative_NK", "(4, 0)"]),
        ((4, 3), (4, 3), None, ((4,), LONG), ["negative_NK", "(4,)"]),
        ((4, 3), (4, 3), None, ((4, 2), torch.float32), ["negative_NK", "torch.float32"]),
    ],
)
def test_cpc_raises_for_invalid_arguments(prediction, target, positive, negative, parts):
    indices = [
        None if given is None else torch.zeros(given[0], dtype=given[1]) for given in (positive, negative)
    ]
    with pytest.raises(ValueError, match=mentions("cpc_info_nce", *parts)):
        cpc_info_nce(torch.ones(prediction), torch.ones(target), *indices)


# Scores of a memory bank


@pytest.fixture(params=[1, 5, 12, 40, 10**6])
def chunk(request, monkeypatch):
    """Chunks of one value, of parts of a row of indices, of whole rows, and of everything."""
    monkeypatch.setitem(noise_contrastive._VALUES_PER_CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
def test_scores_equal_those_of_gathered_rows_in_value_and_gradients():
    anchors, bank = randn(5, 3, seed=1).requires_grad_(), randn(8, 3, seed=2)
    indices = rows(8, 5, 7, seed=3)
    scores = memory_scores(anchors, bank, indices)
    slow = torch.stack(
        [
            torch.stack([(anchor * bank[row]).sum() for row in own])
            for anchor, own in zip(anchors, indices, strict=True)
        ]
    )
    weights = randn(5, 7, seed=4)
    torch.testing.assert_close(scores, slow, rtol=1e-13, atol=1e-14)
    assert_equal_with_gradients((scores * weights).sum(), (slow * weights).sum(), [anchors])
    assert torch.autograd.gradcheck(lambda a: memory_scores(a, bank, indices), [anchors])


def test_only_anchors_get_gradients():
    anchors, bank = randn(4, 3, seed=1).requires_grad_(), randn(6, 3, seed=2).requires_grad_()
    memory_scores(anchors, bank, rows(6, 4, 5)).sum().backward()
    assert anchors.grad is not None and bank.grad is None
    assert not memory_scores(anchors.detach(), bank, rows(6, 4, 5)).requires_grad


def test_a_changed_bank_is_an_error_in_the_backward_pass():
    """Its rows are read again. With other rows, the gradient would be wrong."""
    anchors, bank = randn(4, 3, seed=1).requires_grad_(), randn(6, 3, seed=2)
    loss = memory_scores(anchors, bank, rows(6, 4, 5)).sum()
    bank[2] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_bank_in_half_precision_gives_float32_scores_of_its_rows(half):
    anchors, bank, indices = randn(4, 8, seed=1).float(), randn(6, 8, seed=2).to(half), rows(6, 4, 5)
    scores = memory_scores(anchors, bank, indices)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, memory_scores(anchors, bank.float(), indices), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gathered_rows_are_never_in_memory(made, dtype, monkeypatch):
    """The largest new tensor is (B, K), and one chunk of rows is smaller than that."""
    monkeypatch.setitem(noise_contrastive._VALUES_PER_CHUNK, "cpu", 256)
    anchors, bank = randn(8, 16, seed=1).float().requires_grad_(), randn(50, 16, seed=2).to(dtype)
    indices = rows(50, 8, 200)
    with made:
        memory_scores(anchors, bank, indices).square().sum().backward()
    assert max(made.sizes) == 8 * 200


@pytest.mark.parametrize(
    ("anchors", "bank", "indices", "parts"),
    [
        ((4, 3), (6, 2), ((4, 5), LONG), ["(4, 3)", "(6, 2)"]),
        ((4,), (6, 3), ((4, 5), LONG), ["(4,)"]),
        ((4, 3), (2, 6, 3), ((4, 5), LONG), ["(2, 6, 3)"]),
        ((4, 3), (6, 3), ((3, 5), LONG), ["indices_BK", 4, "(3, 5)"]),
        ((4, 3), (6, 3), ((4, 0), LONG), ["indices_BK", "(4, 0)"]),
        ((4, 3), (6, 3), ((4, 5), torch.int32), ["indices_BK", "torch.int32"]),
    ],
)
def test_scores_raise_for_invalid_arguments(anchors, bank, indices, parts):
    with pytest.raises(ValueError, match=mentions("memory_scores", *parts)):
        memory_scores(torch.ones(anchors), torch.ones(bank), torch.zeros(indices[0], dtype=indices[1]))


# NCE and softmax


def slow_nce(positives, negatives, num_rows, z, temperature, epsilon):
    """Return the loss term by term, as the authors' code computes it, with eps in both denominators."""
    count, total = negatives.shape[1], 0.0
    for positive, others in zip(positives, negatives, strict=True):
        own = torch.exp(positive / temperature) / z
        total = total - torch.log(own / (own + count / num_rows + epsilon))
        for score in others:
            probability = torch.exp(score / temperature) / z
            total = total - torch.log(count / num_rows / (probability + count / num_rows + epsilon))
    return total / len(positives)


def scores(batch=5, negatives=7):
    """Return cosines of positives and negatives."""
    return torch.tanh(randn(batch, seed=1)), torch.tanh(randn(batch, negatives, seed=2))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("num_rows", "epsilon"), [(50, 1e-7), (10**7, 1e-7), (10**7, 2**-23)])
def test_nce_equals_its_definition_in_value_and_gradients(num_rows, epsilon, temperature):
    """With 10**7 rows, eps is a seventh of K Pn or more. 1e-7 is the default."""
    chosen = {} if epsilon == 1e-7 else {"epsilon": epsilon}
    inputs = [tensor.requires_grad_() for tensor in scores()]
    for z in (30.0 * num_rows, torch.tensor(30.0 * num_rows, dtype=torch.float64, requires_grad=True)):
        loss = memory_nce(*inputs, num_rows=num_rows, z=z, temperature=temperature, **chosen)
        slow = slow_nce(*inputs, num_rows, 30.0 * num_rows, temperature, epsilon)
        assert_equal_with_gradients(loss, slow, inputs)


def test_nce_has_a_closed_form():
    """If all rows are equally probable, P = 1 / N: log(1 + K) + K log(1 + 1 / K), except eps."""
    for temperature in (0.1, 1.0):
        positives, negatives = torch.full((4,), 0.5), torch.full((4, 30), 0.5)
        z = memory_nce_constant(positives, negatives, num_rows=900, temperature=temperature)
        assert z.item() == pytest.approx(900 * math.exp(0.5 / temperature), rel=1e-5)
        loss = memory_nce(positives, negatives, num_rows=900, z=z, temperature=temperature)
        assert loss.item() == pytest.approx(math.log(31) + 30 * math.log(31 / 30), rel=1e-4)


def test_the_constant_gets_no_gradient():
    positives, z = torch.zeros(2, requires_grad=True), torch.tensor(30.0, requires_grad=True)
    memory_nce(positives, torch.zeros(2, 3), num_rows=10, z=z).backward()
    assert positives.grad is not None and z.grad is None


def test_nce_is_finite_where_probabilities_underflow():
    """P is exp(-200) for the positive. The losses are its logarithm and that of K Pn."""
    loss = memory_nce(torch.tensor([-200.0]), torch.tensor([[-200.0]]), num_rows=10, z=1.0)
    assert loss.item() == pytest.approx(200 + math.log(0.1 + 1e-7) + 1e-6, rel=1e-6)


def test_the_constant_makes_the_mean_probability_one_in_n():
    positives, negatives = scores()
    z = memory_nce_constant(positives, negatives, num_rows=50, temperature=0.5)
    probabilities = torch.cat([positives[:, None], negatives], dim=1).div(0.5).exp() / z
    assert probabilities.mean().item() == pytest.approx(1 / 50)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_softmax_equals_its_definition_in_value_and_gradients(temperature):
    inputs = [tensor.requires_grad_() for tensor in scores()]
    loss, slow = memory_softmax(*inputs, temperature=temperature), 0.0
    for positive, others in zip(*inputs, strict=True):
        rest = sum(torch.exp(score / temperature) for score in others)
        slow = slow - torch.log(
            torch.exp(positive / temperature) / (torch.exp(positive / temperature) + rest)
        )
    assert_equal_with_gradients(loss, slow / 5, inputs)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, n: memory_softmax(p, n, temperature=0.3),
        lambda p, n: memory_nce(p, n, num_rows=50, z=400.0, temperature=0.3),
    ],
)
def test_gradcheck_of_losses_of_a_memory_bank(loss):
    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in scores(3, 4)])


def test_softmax_has_closed_forms():
    """It is log(1 + K) for equal scores and log(1 + K exp(-1 / T)) if the negatives are orthogonal."""
    ones, zeros = torch.ones(3), torch.zeros(3, 9)
    assert memory_softmax(ones, torch.ones(3, 9), temperature=0.1).item() == pytest.approx(math.log(10))
    loss = memory_softmax(ones, zeros, temperature=0.5)
    assert loss.item() == pytest.approx(math.log1p(9 * math.exp(-2)), rel=1e-6)
    loss = memory_softmax(torch.zeros(1).double(), torch.full((1, 1), 20.5).double())
    assert loss.item() == pytest.approx(20.5 + math.exp(-20.5), rel=1e-14)
    loss = memory_softmax(ones, zeros, temperature=1 / 30)
    assert loss.item() == pytest.approx(9 * math.exp(-30), rel=1e-4)


def test_losses_do_not_depend_on_the_order_of_negatives():
    positives, negatives = scores()
    for loss in (memory_softmax, lambda p, n: memory_nce(p, n, num_rows=50, z=40.0)):
        torch.testing.assert_close(loss(positives, negatives.flip(1)), loss(positives, negatives))
        assert (
            loss(positives + 0.1, negatives) < loss(positives, negatives) < loss(positives, negatives + 0.1)
        )


ACCEPTED = {
    memory_nce: {"num_rows": 50, "z": 40.0, "temperature": 0.1},
    memory_nce_constant: {"num_rows": 50, "temperature": 0.1},
    memory_softmax: {"temperature": 0.1},
}


@pytest.mark.parametrize("loss", ACCEPTED)
@pytest.mark.parametrize(
    ("positive", "negative", "parts"),
    [
        ((4,), (3, 5), ["(4,)", "(3, 5)"]),
        ((4, 1), (4, 5), ["(4, 1)", "(4, 5)"]),
        ((4,), (4,), ["(4,)"]),
        ((4,), (4, 0), ["(4, 0)"]),
        ((0,), (0, 5), ["(0, 5)"]),
    ],
)
def test_losses_of_a_memory_bank_raise_for_invalid_shapes(loss, positive, negative, parts):
    with pytest.raises(ValueError, match=mentions(loss.__name__, *parts)):
        loss(torch.ones(positive), torch.ones(negative), **ACCEPTED[loss])


INVALID = {"num_rows": 0, "z": -1.0, "temperature": 0.0}


@pytest.mark.parametrize(("loss", "key"), [(loss, key) for loss in ACCEPTED for key in ACCEPTED[loss]])
def test_losses_of_a_memory_bank_raise_for_invalid_numbers(loss, key):
    with pytest.raises(ValueError, match=mentions(loss.__name__, key, INVALID[key])):
        loss(torch.ones(4), torch.ones(4, 5), **ACCEPTED[loss] | {key: INVALID[key]})


def test_a_bank_with_the_positive_first_gives_the_loss_of_both_parts():
    """A method looks up the positive and the negatives together. This is the loss of an image at a time."""
    anchors, bank = (
        normalize(randn(4, 6, seed=1), dim=1).requires_grad_(),
        normalize(randn(20, 6, seed=2), dim=1),
    )
    own, negatives = torch.arange(4), rows(20, 4, 9, seed=3)
    looked_up = memory_scores(anchors, bank, torch.cat([own[:, None], negatives], dim=1))
    loss = memory_softmax(looked_up[:, 0], looked_up[:, 1:], temperature=0.07)
    slow = 0.0
    for anchor, positive, others in zip(anchors, own, negatives, strict=True):
        logits = torch.stack([anchor @ bank[row] / 0.07 for row in (positive, *others)])
        slow = slow + logits.logsumexp(0) - logits[0]
    assert_equal_with_gradients(loss, slow / 4, [anchors])


def test_all_info_nce_losses_are_exact_for_a_far_positive() -> None:
    """Torch's softplus replaces log(1 + exp(x)) by x above 20."""
    query, key = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[-1.0, 0.0]]).double()
    loss = info_nce(query, key, query, temperature=2 / 21)
    assert loss == memory_softmax(-torch.ones(1).double(), torch.ones(1, 1).double(), temperature=2 / 21)
    assert loss.item() == pytest.approx(math.log1p(math.exp(21)), rel=1e-13) != pytest.approx(21, rel=1e-13)
