# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl.losses import info_nce, triplet


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_info_nce(queries, keys, queue, temperature):
    """Return the loss one query at a time. Without a queue, the other keys of the batch are the negatives."""
    cosine = torch.nn.functional.cosine_similarity
    total = 0.0
    for i, query in enumerate(queries):
        own = cosine(query, keys[i], dim=0) / temperature
        others = [key for j, key in enumerate(keys) if j != i] if queue is None else list(queue)
        logits = [own, *(cosine(query, other, dim=0) / temperature for other in others)]
        total = total + torch.logsumexp(torch.stack(logits), 0) - own
    return total / len(queries)


@pytest.mark.parametrize("rows", [None, 1, 7])
@pytest.mark.parametrize("temperature", [0.01, 0.2, 2.0])
def test_info_nce_equals_its_definition_in_value_and_gradients(rows, temperature):
    inputs = [randn(4, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    queue = None if rows is None else randn(rows, 3, seed=3)
    loss = info_nce(*inputs, queue, temperature=temperature)
    slow = slow_info_nce(*inputs, queue, temperature)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-13)
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("queue", [None, randn(5, 3, seed=3)])
def test_info_nce_gradcheck(queue):
    inputs = [randn(4, 3, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(lambda q, k: info_nce(q, k, queue, temperature=0.3), inputs)


def test_info_nce_of_equal_embeddings_is_the_log_of_the_number_of_keys():
    ones = torch.ones(8, 4)
    assert info_nce(ones, ones, temperature=0.1).item() == pytest.approx(math.log(8), abs=1e-5)
    assert info_nce(ones, ones, torch.ones(20, 4), temperature=0.1).item() == pytest.approx(math.log(21))


def test_with_a_queue_the_rest_of_the_batch_is_not_negative():
    """If all keys are orthogonal to the queue, each loss is log(1 + K exp(-1 / T)), also for equal images."""
    same = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    queue = torch.tensor([[0.0, 1.0]]).expand(10, 2)
    expected = math.log1p(10 * math.exp(-1 / 0.5))
    assert info_nce(same, same, queue, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_depends_on_the_pairs_and_not_on_scale_or_order():
    queries, keys, queue = randn(6, 4, seed=1), randn(6, 4, seed=2), randn(9, 4, seed=3)
    for negatives in (None, queue):
        loss = info_nce(queries, keys, negatives, temperature=0.2)
        scaled = info_nce(3 * queries, 5 * keys, negatives, temperature=0.2)
        torch.testing.assert_close(scaled, loss)
        torch.testing.assert_close(info_nce(queries.flip(0), keys.flip(0), negatives, temperature=0.2), loss)
        assert not torch.isclose(info_nce(queries, keys.roll(1, 0), negatives, temperature=0.2), loss)
    torch.testing.assert_close(
        info_nce(queries, keys, 7 * queue.flip(0), temperature=0.2),
        info_nce(queries, keys, queue, temperature=0.2),
    )


def test_info_nce_of_equal_pairs_is_exact_at_a_low_temperature():
    """log(1 + K exp(-1 / T)) is about 1e-13 here. A difference of float32 numbers near 30 would give 0."""
    query, queue = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    loss = info_nce(query, query, queue, temperature=1 / 30)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-4)


@pytest.mark.parametrize(
    ("query", "key", "queue", "temperature", "parts"),
    [
        ((4, 3), (4, 2), None, 0.1, ["(4, 3)", "(4, 2)"]),
        ((4, 3, 1), (4, 3, 1), None, 0.1, ["(4, 3, 1)"]),
        ((4, 3), (4, 3), (5, 2), 0.1, ["queue", "(4, 3)", "(5, 2)"]),
        ((1, 3), (1, 3), None, 0.1, ["negative", 1, 0]),
        ((4, 3), (4, 3), (0, 3), 0.1, ["negative", 4, 0]),
        ((0, 3), (0, 3), (5, 3), 0.1, [0, 5]),
        ((4, 3), (4, 3), None, 0.0, ["temperature", "0.0"]),
    ],
)
def test_info_nce_raises_for_invalid_arguments(query, key, queue, temperature, parts):
    with pytest.raises(ValueError, match=mentions("info_nce", *parts)):
        info_nce(
            torch.ones(query),
            torch.ones(key),
            None if queue is None else torch.ones(queue),
            temperature=temperature,
        )


def slow_triplet(anchors, positives, negatives, margin):
    total = 0.0
    for a, p, n in zip(anchors, positives, negatives, strict=True):
        near = sum((x - y) ** 2 for x, y in zip(a, p, strict=True))
        far = sum((x - y) ** 2 for x, y in zip(a, n, strict=True))
        total = total + torch.clamp(near - far + margin, min=0)
    return total / len(anchors)


def test_triplet_equals_its_definition_in_value_and_gradients():
    inputs = [normalize(randn(12, 3, seed=seed), dim=1).requires_grad_() for seed in (1, 2, 3)]
    loss, slow = triplet(*inputs, margin=0.2), slow_triplet(*inputs, 0.2)
    torch.testing.assert_close(loss, slow)
    gradients = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(slow, inputs))
    idle = gradients[0].abs().sum(1) == 0
    assert 0 < idle.sum() < 12, "some triplets should satisfy the margin and some not"


def test_triplet_gradcheck():
    inputs = [randn(5, 3, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    assert torch.autograd.gradcheck(lambda a, p, n: triplet(a, p, n, margin=0.5), inputs)


def test_triplet_has_closed_forms():
    """Equal embeddings give the margin. Distances 1 and 2 with margin 5 give 1 - 4 + 5."""
    same = torch.ones(3, 4)
    assert triplet(same, same, same, margin=0.3).item() == pytest.approx(0.3)
    zero, one, two = (torch.tensor([[float(x), 0.0]]) for x in (0, 1, 2))
    assert triplet(zero, one, two, margin=5).item() == 2
    assert triplet(zero, one, two, margin=2.9).item() == 0
    assert triplet(zero, two, one, margin=1).item() == 4  # the positive and the negative have different roles


@pytest.mark.parametrize(
    ("shapes", "margin", "parts"),
    [
        (((4, 3), (4, 3), (4, 2)), 0.2, ["(4, 3)", "(4, 2)"]),
        (((4, 3), (3, 3), (4, 3)), 0.2, ["(4, 3)", "(3, 3)"]),
        (((3,), (3,), (3,)), 0.2, ["(3,)"]),
        (((4, 3),) * 3, 0.0, ["margin", "0.0"]),
    ],
)
def test_triplet_raises_for_invalid_arguments(shapes, margin, parts):
    with pytest.raises(ValueError, match=mentions("triplet", *parts)):
        triplet(*(torch.ones(shape) for shape in shapes), margin=margin)
