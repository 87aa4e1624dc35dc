# SPDX-License-Identifier: Apache-2.0
"""Each loss equals that of lightly, up to a known factor. (NT-Xent: test_nt_xent.py.)"""

import pytest
import torch
from torch.nn.functional import normalize

from hf_ssl.losses import (
    barlow_twins,
    cosine_regression,
    dino_center,
    dino_cross_entropy,
    info_nce,
    sinkhorn,
    swapped_prediction,
    vicreg_terms,
)

lightly = pytest.importorskip("lightly.loss")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, factor, inputs, rtol=1e-4):
    """Check that `ours` is `factor` times `theirs`, in value and gradients."""
    torch.testing.assert_close(ours, factor * theirs, rtol=rtol, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(one, factor * other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 8), (8, 64)])
def test_barlow_twins_has_lightlys_scale(shape):
    views = [randn(*shape, seed=seed).requires_grad_() for seed in (1, 2)]
    theirs = lightly.BarlowTwinsLoss(lambda_param=0.005)(*views)
    same(barlow_twins(*views, off_diagonal_weight=0.005), theirs, 1, views)


@pytest.mark.parametrize("shape", [(16, 8), (8, 64)])
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_vicregs_terms_have_lightlys_scale(shape, weights):
    views = [randn(*shape, seed=seed).requires_grad_() for seed in (1, 2)]
    theirs = lightly.VICRegLoss(*weights)(*views)
    ours = sum(weight * term for weight, term in zip(weights, vicreg_terms(*views), strict=True))
    same(ours, theirs, 1, views)


def test_info_nce_with_a_queue_has_the_scale_of_lightlys_loss_with_a_memory_bank():
    query, key, queue = (randn(rows, 8, seed=seed) for seed, rows in enumerate((6, 6, 20)))
    theirs = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(20, 8))
    theirs.memory_bank.bank = normalize(queue, dim=1)
    theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    query.requires_grad_()
    same(info_nce(query, key, queue, temperature=0.2), theirs(query, key), 1, [query])


def test_byols_gradient_is_four_times_lightlys():
    """lightly uses half the sum of -cos over both directions, and BYOL the sum of 2 - 2 cos."""
    predictions = [randn(6, 8, seed=seed).requires_grad_() for seed in (1, 2)]
    targets = [randn(6, 8, seed=seed) for seed in (3, 4)]
    negative_cosine = lightly.NegativeCosineSimilarity()
    theirs = sum(negative_cosine(p, t) for p, t in zip(predictions, targets, strict=True)) / 2
    ours = sum(cosine_regression(p, t) for p, t in zip(predictions, targets, strict=True))
    same(ours - 4, theirs, 4, predictions)  # 2 - 2 cos has the constant 2 for each direction


def test_sinkhorn_equals_lightlys_unless_that_overflows():
    from lightly.loss.swav_loss import sinkhorn as theirs

    scores = normalize(randn(40, 8, seed=1), dim=1) @ normalize(randn(12, 8, seed=2), dim=1).T
    for epsilon, iterations in ((0.05, 3), (0.1, 1), (0.5, 5)):
        torch.testing.assert_close(
            sinkhorn(scores, epsilon=epsilon, iterations=iterations),
            theirs(scores, epsilon=epsilon, iterations=iterations),
            rtol=1e-3,
            atol=1e-6,
        )
    assert theirs(scores, epsilon=0.005).isnan().any()  # the reason for logarithms in hf_ssl
    assert sinkhorn(scores, epsilon=0.005, iterations=3).isfinite().all()


def test_swav_has_lightlys_scale():
    scores = randn(5, 12, 10).clamp(-1, 1).requires_grad_()
    assignments = torch.stack([sinkhorn(view, epsilon=0.1, iterations=3) for view in scores[:2]])
    theirs = lightly.SwaVLoss(temperature=0.2, sinkhorn_epsilon=0.1)(list(scores[:2]), list(scores[2:]))
    same(swapped_prediction(scores, assignments, temperature=0.2), theirs.squeeze(), 1, [scores], rtol=1e-3)


def test_dino_has_lightlys_scale_and_center_over_several_steps():
    theirs = lightly.DINOLoss(output_dim=32, student_temp=0.1, center_momentum=0.9)
    center = torch.zeros(32)
    for step in range(3):
        student, teacher = randn(5, 4, 32, seed=step).requires_grad_(), 3 + randn(2, 4, 32, seed=10 + step)
        ours = dino_cross_entropy(student, teacher, center, student_temperature=0.1, teacher_temperature=0.05)
        same(ours, theirs(list(teacher), list(student), teacher_temp=0.05, epoch=0), 1, [student])
        center = dino_center(center, teacher, momentum=0.9)
        torch.testing.assert_close(center, theirs.center.flatten())
