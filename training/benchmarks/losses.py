# SPDX-License-Identifier: Apache-2.0
"""Defines the rows about losses: the time of forward and backward pass, and the peak memory."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ssl.losses import (
    barlow_twins,
    dino_center,
    dino_cross_entropy,
    memory_nce,
    memory_scores,
    nt_xent,
    vicreg_terms,
)
from training.benchmarks.pairs import Pair
from training.benchmarks.row import Row


def two_views(
    ours: Callable[[Tensor, Tensor], Tensor], peer: Callable[[], Any], batch: int, dims: int
) -> Any:
    """Return a builder of both programs for a loss of two views (B, D).

    Args:
        ours: loss function of hf_ssl.
        peer: returns the loss module of the other library.
        batch: B.
        dims: D.
    """

    def build(device: torch.device) -> Pair:
        generator = torch.Generator().manual_seed(0)
        z1, z2 = (torch.randn(batch, dims, generator=generator).to(device).requires_grad_() for _ in range(2))
        module = peer().to(device)

        def program(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
            def step() -> None:
                z1.grad = z2.grad = None
                loss(z1, z2).backward()

            return step

        return Pair(program(ours), program(module))

    return build


def lightly_nt_xent() -> Any:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.1)


def _nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    return nt_xent(torch.stack([z1, z2]), temperature=0.1)


def lightly_barlow_twins() -> Any:
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss(lambda_param=0.005)


def _barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    return barlow_twins(z1, z2, off_diagonal_weight=0.005)


def lightly_vicreg() -> Any:
    from lightly.loss import VICRegLoss

    return VICRegLoss()


def _vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    invariance, variance, covariance = vicreg_terms(z1, z2)
    return 25 * invariance + 25 * variance + covariance


def dino(views: int, batch: int, outputs: int) -> Any:
    """Return a builder for the loss and the center update of DINO, with two views of the teacher.

    Args:
        views: number of views of the student.
        batch: images in the batch.
        outputs: number of prototypes.
    """

    def build(device: torch.device) -> Pair:
        from lightly.loss import DINOLoss

        generator = torch.Generator().manual_seed(0)
        student = torch.randn(views, batch, outputs, generator=generator).to(device).requires_grad_()
        teacher = torch.randn(2, batch, outputs, generator=generator).to(device)
        center = torch.zeros(outputs, device=device)
        module = DINOLoss(outputs, teacher_temp=0.04).to(device)

        def ours() -> None:
            student.grad = None
            loss = dino_cross_entropy(
                student, teacher, center, student_temperature=0.1, teacher_temperature=0.04
            )
            center.copy_(dino_center(center, teacher, momentum=0.9))
            loss.backward()

        def peer() -> None:
            student.grad = None
            module(list(teacher), list(student), epoch=0).backward()  # lightly 1.5 requires the epoch

        return Pair(ours, peer)

    return build


_NUM_ROWS, _TEMPERATURE, _Z = 100_000, 0.07, 200_000.0


def bank_nce(anchors_BD: Tensor, bank_ND: Tensor, indices_BK: Tensor) -> Tensor:
    scores = memory_scores(anchors_BD, bank_ND, indices_BK)
    return memory_nce(
        scores[:, 0], scores[:, 1:], num_rows=len(bank_ND), z=_Z, temperature=_TEMPERATURE, epsilon=1e-7
    )


def plain_bank_nce(anchors_BD: Tensor, bank_ND: Tensor, indices_BK: Tensor) -> Tensor:
    """Return the same loss from gathered rows (B, K, D), as in the code of CMC and InsDis."""
    rows_BKD = bank_ND[indices_BK]
    odds = (torch.bmm(rows_BKD, anchors_BD[:, :, None])[:, :, 0] / _TEMPERATURE).exp() / _Z
    noise = (indices_BK.shape[1] - 1) / len(bank_ND)
    positive = (odds[:, 0] / (odds[:, 0] + noise + 1e-7)).log()
    negatives = (noise / (odds[:, 1:] + noise + 1e-7)).log()
    return -(positive.sum() + negatives.sum()) / len(anchors_BD)


def memory_bank(batch: int, negatives: int, num_rows: int = _NUM_ROWS, dims: int = 128) -> Any:
    """Return a builder for the NCE loss of images against random rows of a memory bank.

    Args:
        batch: images in the batch.
        negatives: random rows for each image.
        num_rows: rows of the memory bank.
        dims: width of the rows.
    """

    def build(device: torch.device) -> Pair:
        generator = torch.Generator().manual_seed(0)
        bank = normalize(torch.randn(num_rows, dims, generator=generator), dim=1).to(device)
        anchors = normalize(torch.randn(batch, dims, generator=generator), dim=1).to(device).requires_grad_()
        indices = torch.randint(num_rows, (batch, negatives + 1), generator=generator).to(device)

        def program(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
            def step() -> Tensor:
                anchors.grad = None
                loss(anchors, bank, indices).backward()
                return cast(Tensor, anchors.grad)

            return step

        return Pair(program(bank_nce), program(plain_bank_nce))

    return build


def _wide(name: str, title: str, batch: int, aim: float, memory_aim: float, repeats: int) -> Row:
    """Return a row about embeddings with 8192 dimensions."""
    ours, peer = {
        "barlow_twins": (_barlow_twins, lightly_barlow_twins),
        "vicreg": (_vicreg, lightly_vicreg),
    }[name]
    return Row(
        f"{name}_{batch}",
        f"{title}, 2 x {batch} x 8192, forward and backward",
        "lightly",
        aim,
        two_views(ours, peer, batch, 8192),
        "step",
        1,
        repeats,
        memory_aim=memory_aim,
        accelerator=True,
    )


ROWS = [
    Row(
        "nt_xent",
        "NT-Xent, 2 x 4096 x 128, forward and backward",
        "lightly",
        3,
        two_views(_nt_xent, lightly_nt_xent, 4096, 128),
        "step",
        None,
        7,
        memory_aim=15,
        accelerator=True,
    ),
    _wide("barlow_twins", "Barlow Twins", 256, aim=3.5, memory_aim=10, repeats=5),
    _wide("barlow_twins", "Barlow Twins", 2048, aim=1.7, memory_aim=2, repeats=3),
    _wide("vicreg", "VICReg", 256, aim=50, memory_aim=10, repeats=5),
    _wide("vicreg", "VICReg", 2048, aim=3.5, memory_aim=3, repeats=3),
    Row(
        "dino",
        "DINO, 65,536 outputs, 10 crops of 32, forward and backward",
        "lightly",
        2.5,
        dino(10, 32, 65536),
        "step",
        1,
        7,
        memory_aim=2,
        accelerator=True,
    ),
    Row(
        "memory_bank",
        "NCE of 64 images, 16,384 rows of a memory bank each, forward and backward",
        "plain torch, gathered rows (B, K, D)",
        2,
        memory_bank(64, 16384),
        "step",
        1,
        7,
        memory_aim=2,
        accelerator=True,
    ),
]
