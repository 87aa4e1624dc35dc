# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses. Legend: V views, B batch, D dims, N = V * B rows."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from hf_ssl.losses.precision import full_precision

# Rows of the similarity matrix that exist at once. A block of 1024 x 1024 floats (4 MiB) stays in the cache
# of a CPU core; an accelerator wants larger products.
_BLOCK = {"cpu": 1024}
_BLOCK_ELSEWHERE = 8192


@full_precision
def nt_xent(z_VBD: Tensor, *, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of each view against all others of the batch, in nats.

    Nested-loop meaning, s(i, j) = cos(z_i, z_j) / temperature: the mean over anchors (v, b) and positives
    (w, b), w != v, of `-s(vb, wb) + log(sum of exp(s(vb, k)) over all k != vb)`. The denominator holds all
    N - 1 others, other positives included (SupCon's "out" form with instances as classes). The N x N matrix
    is never held: blocks of it are computed in the forward and again in the backward pass.

    Args:
        z_VBD: embeddings, V >= 2 views of the same B images; normalised inside.
        temperature: at least 0.003.

    Returns:
        Scalar: mean over the V * B * (V - 1) ordered positive pairs; log(N - 1) for constant embeddings.

    Raises:
        ValueError: fewer than two views, a batch of one image (there would be no negatives), or the
        temperature is too small.

    Source: Chen et al., arXiv:2002.05709, eq. 1 (V = 2); Khosla et al., arXiv:2004.11362, eq. 2. The
    authors' TensorFlow code adds the two anchors' means, so its value is twice this one.
    """
    if z_VBD.ndim != 3 or z_VBD.shape[0] < 2:
        raise ValueError(
            f"nt_xent needs embeddings (views >= 2, batch, dims), got shape {tuple(z_VBD.shape)}"
        )
    if z_VBD.shape[1] < 2:
        raise ValueError(
            "nt_xent needs a batch of at least 2 images, since the others are its negatives, got 1"
        )
    if temperature < 0.003:
        raise ValueError(f"nt_xent needs a temperature of at least 0.003, got {temperature}")
    views, dtype = z_VBD.shape[0], z_VBD.dtype
    if temperature < 0.03:
        # Exponentials are taken relative to the largest possible similarity, 1 / temperature; float32 would
        # underflow here.
        z_VBD = z_VBD.double()
    z_VBD = normalize(z_VBD, dim=-1)
    others_VBD = z_VBD.sum(0) - z_VBD
    positive = (z_VBD * others_VBD).sum() / (views - 1) / temperature
    z_ND = z_VBD.flatten(0, 1)
    return ((_OtherRowsLogSumExp.apply(z_ND, temperature) - positive) / len(z_ND)).to(dtype)


class _OtherRowsLogSumExp(torch.autograd.Function):
    """Sum over rows i of log(sum over k != i of exp(z_i . z_k / T)) for unit rows z_ND, in blocks of the
    upper triangle.

    |z_i . z_k| <= 1 bounds the logits by 1 / T, so this bound serves as the maximum of the log-sum-exp and
    no row has to be read twice.
    """

    @staticmethod
    def forward(ctx: Any, z_ND: Tensor, temperature: float) -> Tensor:
        sums_N = z_ND.new_zeros(len(z_ND))
        for rows, columns in _upper_blocks(z_ND):
            block = _exponentials(z_ND, rows, columns, temperature)
            sums_N[rows] += block.sum(1)
            if columns.start != rows.start:
                sums_N[columns] += block.sum(0)
        ctx.save_for_backward(z_ND, sums_N)
        ctx.temperature = temperature
        return sums_N.log().sum() + len(z_ND) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        z_ND, sums_N = ctx.saved_tensors
        weights_N = 1 / sums_N
        result_ND = torch.zeros_like(z_ND)
        for rows, columns in _upper_blocks(z_ND):
            block = _exponentials(z_ND, rows, columns, ctx.temperature)
            # softmax(i, k) + softmax(k, i): each pair is a logit of both its rows
            block *= weights_N[rows, None] + weights_N[None, columns]
            result_ND[rows] += block @ z_ND[columns]
            if columns.start != rows.start:
                result_ND[columns] += block.T @ z_ND[rows]
        return result_ND * (gradient / ctx.temperature), None


def _upper_blocks(z_ND: Tensor) -> list[tuple[slice, slice]]:
    size = _BLOCK.get(z_ND.device.type, _BLOCK_ELSEWHERE)
    starts = range(0, len(z_ND), size)
    return [(slice(i, i + size), slice(j, j + size)) for i in starts for j in starts if j >= i]


def _exponentials(z_ND: Tensor, rows: slice, columns: slice, temperature: float) -> Tensor:
    """exp((z_i . z_k - 1) / T) for a block, 0 where i = k."""
    block = z_ND[rows] @ z_ND[columns].T
    block.sub_(1).div_(temperature).exp_()
    if columns.start == rows.start:
        block.fill_diagonal_(0)
    return block
