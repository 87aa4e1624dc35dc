# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl.losses import contrastive, nt_xent


def slow_nt_xent(z_VBD, temperature):
    """Return the loss by its definition, one anchor and one positive at a time."""
    views, batch, _ = z_VBD.shape
    z = normalize(z_VBD, dim=-1)
    total, pairs = torch.zeros((), dtype=z.dtype), 0
    for v in range(views):
        for b in range(batch):
            logits = [
                (torch.dot(z[v, b], z[w, c]) / temperature)
                for w in range(views)
                for c in range(batch)
                if (w, c) != (v, b)
            ]
            denominator = torch.logsumexp(torch.stack(logits), 0)
            for w in range(views):
                if w != v:
                    total = total - torch.dot(z[v, b], z[w, b]) / temperature + denominator
                    pairs += 1
    return total / pairs


def embeddings(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 5, 4), (3, 4, 5), (5, 3, 2)])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 2.0])
def test_equals_the_definition_in_value_and_gradient(shape, temperature):
    z, slow_z = embeddings(*shape).requires_grad_(), embeddings(*shape).requires_grad_()
    loss, slow = nt_xent(z, temperature=temperature), slow_nt_xent(slow_z, temperature)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * slow).backward()
    torch.testing.assert_close(z.grad, slow_z.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_blocks_do_not_change_the_result(monkeypatch, block):
    z = embeddings(3, 4, 5).requires_grad_()
    whole = nt_xent(z, temperature=0.2)
    (whole_gradient,) = torch.autograd.grad(whole, z)
    monkeypatch.setitem(contrastive._BLOCK_SIZE, "cpu", block)
    blocked = nt_xent(z, temperature=0.2)
    torch.testing.assert_close(blocked, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(blocked, z)[0], whole_gradient, rtol=1e-11, atol=1e-14)


def test_gradcheck():
    assert torch.autograd.gradcheck(
        lambda z: nt_xent(z, temperature=0.3), embeddings(3, 3, 4).requires_grad_()
    )


def test_constant_embeddings_give_the_log_of_the_other_rows():
    assert nt_xent(torch.ones(2, 8, 4), temperature=0.5).item() == pytest.approx(math.log(15), abs=1e-5)


def test_orthogonal_images_have_a_closed_form():
    """If both views are equal and images are orthogonal, the loss is -1/T + log(exp(1/T) + 2(B - 1))."""
    batch, temperature = 4, 0.5
    z = torch.eye(batch).expand(2, batch, batch)
    expected = -1 / temperature + math.log(math.exp(1 / temperature) + 2 * (batch - 1))
    assert nt_xent(z, temperature=temperature).item() == pytest.approx(expected, abs=1e-5)


def test_does_not_depend_on_scale_or_on_the_order_of_views_and_images():
    z = embeddings(3, 5, 4)
    loss = nt_xent(z, temperature=0.2)
    for other in (z * 7, z.flip(0), z.flip(1)):
        torch.testing.assert_close(nt_xent(other, temperature=0.2), loss)
    assert not torch.isclose(nt_xent(torch.stack([z[0], z[1].roll(1, 0), z[2]]), temperature=0.2), loss)


def test_half_precision_becomes_float32_even_under_autocast():
    z = embeddings(2, 64, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z, temperature=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z.float(), temperature=0.1))


@pytest.mark.parametrize(
    ("shape", "temperature", "parts"),
    [
        ((1, 4, 2), 0.1, ["(1, 4, 2)"]),
        ((2, 1, 2), 0.1, [2, 1]),
        ((2, 4, 2), 0.001, ["temperature", 0.003, 0.001]),
    ],
)
def test_raises_for_invalid_arguments(shape, temperature, parts):
    with pytest.raises(ValueError, match=mentions("nt_xent", *parts)):
        nt_xent(torch.ones(shape), temperature=temperature)


def test_agrees_with_lightly():
    """The loss has the scale of lightly's NTXentLoss."""
    loss = pytest.importorskip("lightly.loss")
    z = embeddings(2, 16, 8).float()
    torch.testing.assert_close(nt_xent(z, temperature=0.3), loss.NTXentLoss(temperature=0.3)(z[0], z[1]))
