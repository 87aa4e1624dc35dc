# SPDX-License-Identifier: Apache-2.0
"""Tests of all losses: precision, autocast, unchanged arguments."""

import pytest
import torch

from hf_ssl import losses
from hf_ssl.losses import (
    barlow_twins,
    barlow_twins_terms,
    cluster_cross_entropy,
    cosine_regression,
    cpc_info_nce,
    dino_center,
    dino_cross_entropy,
    info_nce,
    latent_smooth_l1,
    latent_squared_l2,
    masked_patch_mse,
    memory_nce,
    memory_nce_constant,
    memory_scores,
    memory_softmax,
    nt_xent,
    sinkhorn,
    swapped_prediction,
    triplet,
    vicreg_terms,
)


def randn(*shape, seed=0):
    """Return multiples of 1/16 between -8 and 8, which are exact in half precision."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (16 * numbers).round().clamp(-128, 128) / 16


ROWS = torch.randint(24, (32, 40), generator=torch.Generator().manual_seed(6))
Z1, Z2, Z3 = (randn(32, 24, seed=seed) for seed in (1, 2, 3))
VIEWS, TARGETS = randn(4, 8, 16, seed=4), randn(2, 8, 16, seed=5).softmax(-1)

# name -> (function of a first argument, that argument)
EXAMPLES = {
    "barlow_twins": (lambda z: barlow_twins(z, Z2.to(z), off_diagonal_weight=0.005), Z1),
    "barlow_twins_terms": (lambda z: barlow_twins_terms(z, Z2[:16].to(z)), Z1[:16]),
    "cluster_cross_entropy": (
        lambda s: cluster_cross_entropy(s, torch.arange(8), temperature=0.1),
        VIEWS,
    ),
    "cosine_regression": (lambda p: cosine_regression(p, Z2.to(p)), Z1),
    "cpc_info_nce": (lambda p: cpc_info_nce(p, Z2.to(p), negative_NK=ROWS), Z1 / 4),
    "dino_center": (lambda c: dino_center(c, VIEWS[:2].to(c), momentum=0.9), randn(16)),
    "dino_cross_entropy": (
        lambda s: dino_cross_entropy(
            s, VIEWS[:2].to(s), torch.zeros(16), student_temperature=0.1, teacher_temperature=0.04
        ),
        VIEWS,
    ),
    "info_nce": (lambda q: info_nce(q, Z2.to(q), Z3.to(q), temperature=0.1), Z1),
    "latent_smooth_l1": (lambda p: latent_smooth_l1(p, Z2.to(p)), Z1),
    "latent_squared_l2": (lambda p: latent_squared_l2(p, VIEWS.flip(0)[None].to(p)), VIEWS[None]),
    "masked_patch_mse": (
        lambda p: masked_patch_mse(p, VIEWS.flip(0).to(p), torch.ones(4, 8), normalize=True),
        VIEWS,
    ),
    "memory_nce": (
        lambda n: memory_nce(Z2[:, 0].to(n), n, num_rows=50, z=torch.tensor(70.0), temperature=4.0),
        Z1,
    ),
    "memory_nce_constant": (
        lambda n: memory_nce_constant(Z2[:, 0].to(n), n, num_rows=50, temperature=4.0),
        Z1,
    ),
    "memory_scores": (lambda a: memory_scores(a, Z2.to(a), ROWS).logsumexp(1).mean(), Z1),
    "memory_softmax": (lambda n: memory_softmax(Z2[:, 0].to(n), n, temperature=4.0), Z1),
    "nt_xent": (lambda z: nt_xent(z, temperature=0.1), VIEWS),
    "sinkhorn": (lambda s: sinkhorn(s, epsilon=0.5, iterations=3), Z1),
    "swapped_prediction": (lambda s: swapped_prediction(s, TARGETS, temperature=0.1), VIEWS),
    "triplet": (lambda a: triplet(a, Z2.to(a), Z3.to(a), margin=0.2), Z1),
    "vicreg_terms": (lambda z: vicreg_terms(z, Z2[:16].to(z)), Z1[:16]),
}
# Losses with a backward pass of their own. Under autocast, the backward pass of torch depends on the caller.
OWN_BACKWARD = {
    "barlow_twins",
    "barlow_twins_terms",
    "dino_cross_entropy",
    "memory_scores",
    "nt_xent",
    "swapped_prediction",
    "vicreg_terms",
}
WITHOUT_GRADIENT = {"dino_center", "memory_nce_constant", "sinkhorn"}

each = pytest.mark.parametrize("name", EXAMPLES)


def values(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_loss_has_an_example():
    assert sorted(losses.__all__) == sorted(EXAMPLES), "add an example of each loss to EXAMPLES"


@each
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_even_under_autocast(name, half):
    """The numbers equal those of float32, in the forward and in the backward pass."""
    function, example = EXAMPLES[name]
    results = []
    for dtype, autocast in ((torch.float32, False), (half, True)):
        argument = example.clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = values(function(argument))
            if name in OWN_BACKWARD:
                sum(result).backward()
        if name not in WITHOUT_GRADIENT | OWN_BACKWARD:
            sum(result).backward()
        assert all(value.dtype == torch.float32 for value in result)
        results.append((result, argument.grad))
    (expected, gradient), (result, half_gradient) = results
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    exact = values(function(example.double()))
    torch.testing.assert_close(result, tuple(value.float() for value in exact), rtol=1e-4, atol=1e-5)
    if name not in WITHOUT_GRADIENT:
        assert half_gradient.dtype == half
        torch.testing.assert_close(half_gradient, gradient.to(half), rtol=0.01, atol=1e-6)


@each
def test_float64_stays_float64(name):
    function, example = EXAMPLES[name]
    assert all(value.dtype == torch.float64 for value in values(function(example.double())))


@each
def test_the_argument_does_not_change_and_the_backward_pass_can_be_repeated(name):
    function, example = EXAMPLES[name]
    argument = example.clone().requires_grad_()
    result = values(function(argument))
    if name not in WITHOUT_GRADIENT:
        first = torch.autograd.grad(sum(result), argument, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(sum(result), argument), first, rtol=0, atol=0)
    torch.testing.assert_close(argument.detach(), example, rtol=0, atol=0)


@each
def test_without_gradients_the_value_is_the_same(name):
    function, example = EXAMPLES[name]
    with torch.no_grad():
        result = values(function(example))
    torch.testing.assert_close(result, values(function(example)), rtol=0, atol=0)


@each
def test_strided_inputs_equal_contiguous_ones(name):
    """Methods have embeddings batch first and pass transposed tensors."""
    function, example = EXAMPLES[name]
    strided = example.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    plain = example.clone().requires_grad_()
    assert strided.is_contiguous() == (example.ndim < 2)
    torch.testing.assert_close(values(function(strided)), values(function(plain)))
    if name not in WITHOUT_GRADIENT:
        gradients = [torch.autograd.grad(sum(values(function(x))), x)[0] for x in (strided, plain)]
        torch.testing.assert_close(*gradients)
