# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins and VICReg, for batches smaller and larger than the number of dimensions."""

import pytest
import torch
from messages import mentions

from hf_ssl.losses import barlow_twins, barlow_twins_terms, decorrelation, vicreg_terms

# batch, dims: computed from the D x D matrix, or from Gram matrices if batch < dims
SHAPES = [(7, 3), (2, 2), (4, 4), (3, 4), (2, 9)]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_views(batch, dims):
    return [(randn(batch, dims, seed=seed) + seed).requires_grad_() for seed in (1, 2)]


def slow_barlow_twins_terms(z1, z2):
    batch, dims = z1.shape
    columns = []
    for z in (z1, z2):
        mean = sum(z) / batch
        variance = sum((row - mean) ** 2 for row in z) / batch
        columns.append([(z[:, i] - mean[i]) / torch.sqrt(variance[i] + 1e-5) for i in range(dims)])
    on_diagonal = off_diagonal = torch.zeros((), dtype=z1.dtype)
    for i in range(dims):
        for j in range(dims):
            correlation = sum(columns[0][i] * columns[1][j]) / batch
            if i == j:
                on_diagonal = on_diagonal + (correlation - 1) ** 2
            else:
                off_diagonal = off_diagonal + correlation**2
    return on_diagonal, off_diagonal


def slow_vicreg_terms(z1, z2, eps=1e-4):
    batch, dims = z1.shape
    invariance = sum((a - b) ** 2 for a, b in zip(z1.flatten(), z2.flatten(), strict=True)) / (batch * dims)
    variance = covariance = torch.zeros((), dtype=z1.dtype)
    for z in (z1, z2):
        centered = z - sum(z) / batch
        for i in range(dims):
            for j in range(dims):
                entry = sum(centered[:, i] * centered[:, j]) / (batch - 1)
                if i == j:
                    variance = variance + torch.clamp(1 - torch.sqrt(entry + eps), min=0) / (2 * dims)
                else:
                    covariance = covariance + entry**2 / dims
    return invariance, variance, covariance


LOSSES = [(barlow_twins_terms, slow_barlow_twins_terms), (vicreg_terms, slow_vicreg_terms)]
EACH = pytest.mark.parametrize(("terms", "slow_terms"), LOSSES, ids=["barlow_twins", "vicreg"])


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_each_term_equals_its_definition_in_value_and_gradients(terms, slow_terms, shape):
    views = two_views(*shape)
    fast, slow = terms(*views), slow_terms(*views)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        gradients = torch.autograd.grad(one, views, retain_graph=True)
        expected = torch.autograd.grad(other, views, retain_graph=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)


@EACH
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(terms, slow_terms, shape):
    assert torch.autograd.gradcheck(terms, two_views(*shape))


@EACH
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_parts_do_not_change_the_result(terms, slow_terms, shape, monkeypatch):
    def everything():
        views = two_views(*shape)
        values = terms(*views)
        return [*values, *torch.autograd.grad(sum(values), views)]

    whole = everything()
    for sizes in ((1, 1, 1), (2, 4, 3), (3, 1, 4)):
        monkeypatch.setitem(decorrelation._SIZES, "cpu", decorrelation._Sizes(*sizes))
        torch.testing.assert_close(everything(), whole, rtol=1e-10, atol=1e-12)


def test_barlow_twins_weights_its_terms():
    views = two_views(3, 5)
    on_diagonal, off_diagonal = barlow_twins_terms(*views)
    loss = barlow_twins(*views, off_diagonal_weight=0.1)
    torch.testing.assert_close(loss, on_diagonal + 0.1 * off_diagonal)


@pytest.mark.parametrize("dims", [2, 4, 64])
def test_equal_features_have_a_closed_form(dims):
    """If all features are equal, every correlation is 1 and every covariance is the variance."""
    column = torch.tensor([1.0, -1.0] * 4)[:, None].double()
    z = column.expand(8, dims)
    scale = 1 / (1 + 1e-5)
    on_diagonal, off_diagonal = barlow_twins_terms(z, z)
    assert on_diagonal.item() == pytest.approx(dims * (scale - 1) ** 2, abs=1e-12)
    assert off_diagonal.item() == pytest.approx(dims * (dims - 1) * scale**2)
    invariance, variance, covariance = vicreg_terms(z / 2, z / 2)
    assert invariance.item() == 0
    assert variance.item() == pytest.approx(1 - (2 / 7 + 1e-4) ** 0.5)
    assert covariance.item() == pytest.approx(2 * (dims - 1) * (2 / 7) ** 2)


def test_the_loss_of_independent_features_is_zero():
    """The features are the columns of a Hadamard matrix without the constant column."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    z = torch.kron(torch.kron(two, two), two)[:, 1:]
    on_diagonal, off_diagonal = barlow_twins_terms(z, z)
    assert on_diagonal.item() < 1e-8 and off_diagonal.item() < 1e-20
    assert [term.item() for term in vicreg_terms(z, z)] == [0, 0, 0]


def test_the_terms_of_constant_embeddings():
    """All correlations are 0, so each feature adds 1. All standard deviations are sqrt(eps)."""
    z = torch.full((8, 16), 3.0)
    on_diagonal, off_diagonal = barlow_twins_terms(z, z)
    assert (on_diagonal.item(), off_diagonal.item()) == (16, 0)
    terms = vicreg_terms(z, z)
    assert [term.item() for term in terms] == pytest.approx([0, 0.99, 0], abs=1e-6)


@EACH
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_does_not_depend_on_the_order_of_views_images_or_features(terms, slow_terms, shape):
    z1, z2 = (z.detach() for z in two_views(*shape))
    expected = terms(z1, z2)
    for other in ((z2, z1), (z1.flip(0), z2.flip(0)), (z1.flip(1), z2.flip(1))):
        torch.testing.assert_close(terms(*other), expected)
    assert not torch.isclose(sum(terms(z1, z2.roll(1, 0))), sum(expected))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_shifts_change_only_the_invariance_of_vicreg_and_scale_does_not_change_barlow_twins(shape):
    z1, z2 = (z.detach() for z in two_views(*shape))
    torch.testing.assert_close(
        barlow_twins_terms(300 * z1 + 5, 200 * z2 - 9),
        barlow_twins_terms(100 * z1, 100 * z2),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(vicreg_terms(z1 + 5, z2 - 9)[1:], vicreg_terms(z1, z2)[1:])
    torch.testing.assert_close(vicreg_terms(z1 + 5, z2 + 5), vicreg_terms(z1, z2))


def features(kind, batch, dims):
    noise = randn(batch, dims, seed=5)
    if kind == "correlated":  # one direction has nearly all of the variance
        return 100 * randn(batch, 1, seed=6) * randn(1, dims, seed=7) + noise
    if kind == "one large":  # the loss subtracts its square, which is on the diagonal
        noise[:, 0] *= 300
    if kind == "far":
        noise += 100
    if kind == "tiny":
        noise *= 1e-3
    return noise


@EACH
@pytest.mark.parametrize("kind", ["plain", "correlated", "one large", "far", "tiny"])
@pytest.mark.parametrize(("batch", "dims"), [(16, 2048), (63, 64), (256, 64)])
def test_float32_is_exact_enough(terms, slow_terms, kind, batch, dims):
    """Values and gradients are near those of float64, although the loss is a difference of large sums."""
    z1 = features(kind, batch, dims)
    z2 = z1 + 0.1 * z1.std() * randn(batch, dims, seed=9)
    single = [z.float().requires_grad_() for z in (z1, z2)]
    double = [z.detach().double().requires_grad_() for z in single]
    for one, exact in zip(terms(*single), terms(*double), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=5e-4 if kind == "one large" else 5e-5, atol=0)
        for gradient, other in zip(
            torch.autograd.grad(one, single, retain_graph=True),
            torch.autograd.grad(exact, double, retain_graph=True),
            strict=True,
        ):
            error = (gradient - other).norm() / other.norm().clamp(min=1e-12)
            assert error < 3e-4, f"gradient off by {error:.1e}"


@EACH
@pytest.mark.parametrize(("batch", "dims"), [(4, 512), (512, 4)])
def test_no_tensor_is_larger_than_the_gradient(terms, slow_terms, batch, dims, made):
    """There is no D x D matrix for a small batch and no B x B matrix for a large one."""
    views = two_views(batch, dims)
    with made:
        sum(terms(*views)).backward()
    assert max(made.sizes) == batch * dims


@EACH
@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        (((4, 3), (4, 2)), ["(4, 3)", "(4, 2)"]),
        (((4, 3), (3, 3)), ["(4, 3)", "(3, 3)"]),
        (((2, 4, 3), (2, 4, 3)), ["(2, 4, 3)"]),
        (((1, 3), (1, 3)), [2, 1]),
    ],
)
def test_raises_for_invalid_arguments(terms, slow_terms, shapes, parts):
    with pytest.raises(ValueError, match=mentions(*parts)):
        terms(*(torch.ones(shape) for shape in shapes))
