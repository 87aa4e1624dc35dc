# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses: NT-Xent, InfoNCE, triplet.

Legend: V views, B batch, D dimensions, K rows of a queue, N = V * B rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, normalize, softplus

from hf_ssl.losses.upcasting import SMALLEST_TEMPERATURE, full_precision, without_autocast

# The side of the blocks in which the similarity matrix is computed. A block of 1024 x 1024 floats (4 MiB)
# fits into the cache of a CPU core. An accelerator is faster with larger products.
_BLOCK_SIZE = {"cpu": 1024}
_BLOCK_SIZE_OTHER_DEVICES = 8192


@full_precision
def nt_xent(z_VBD: Tensor, *, temperature: float) -> Tensor:
    """Return the normalized temperature-scaled cross entropy of each view against all others, in nats.

    With s(i, j) = cos(z_i, z_j) / temperature, the loss is the mean over anchors (v, b) and positives (w, b),
    w != v, of `-s(vb, wb) + log(sum of exp(s(vb, k)) over all k != vb)`. The sum has all N - 1 other rows,
    including the other positives (SupCon's "out" form with instances as classes). The N x N matrix is never
    in memory: its blocks are computed in the forward and again in the backward pass.

    Args:
        z_VBD: embeddings of V >= 2 views of the same B >= 2 images. This function normalizes them.
        temperature: at least 0.003.

    Returns:
        A scalar: the mean over the V * B * (V - 1) ordered positive pairs. It is log(N - 1) for constant
        embeddings.

    Raises:
        ValueError: there are fewer than two views or fewer than two images (and so no negatives), or the
            temperature is too small.

    Source: Chen et al., arXiv:2002.05709, eq. 1 (V = 2); Khosla et al., arXiv:2004.11362, eq. 2. The
    authors' TensorFlow code adds the means of both anchors, so its value is twice this one.
    """
    if z_VBD.ndim != 3 or z_VBD.shape[0] < 2:
        raise ValueError(
            f"nt_xent.z_VBD: expected shape (views >= 2, batch, dimensions), got {tuple(z_VBD.shape)}"
        )
    if z_VBD.shape[1] < 2:
        raise ValueError(
            "nt_xent.z_VBD: expected a batch of at least 2 images, because each image needs negatives, got 1"
        )
    if temperature < SMALLEST_TEMPERATURE:
        raise ValueError(f"nt_xent.temperature: expected at least {SMALLEST_TEMPERATURE}, got {temperature}")
    views, dtype = z_VBD.shape[0], z_VBD.dtype
    if temperature < 0.03:
        # The exponentials are relative to the largest possible similarity, 1 / temperature. In float32, they
        # would underflow.
        z_VBD = z_VBD.double()
    z_VBD = normalize(z_VBD, dim=-1)
    others_VBD = z_VBD.sum(0) - z_VBD
    positive = (z_VBD * others_VBD).sum() / (views - 1) / temperature
    z_ND = z_VBD.flatten(0, 1)
    return ((_OtherRowsLogSumExp.apply(z_ND, temperature) - positive) / len(z_ND)).to(dtype)


@full_precision
def info_nce(
    query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor | None = None, *, temperature: float
) -> Tensor:
    """Return the cross entropy of each query's own key against negatives, in nats.

    With s(q, k) = cos(q, k) / temperature, the loss is the mean over queries i of
    `-s(q_i, k_i) + log(sum of exp(s(q_i, k)) over k_i and the negatives)`. With a queue, only its rows
    are negatives. Without a queue, the other keys of the batch are the negatives.

    Args:
        query_BD, key_BD: embeddings of two views of the same B images. This function normalizes them. The
            keys get gradients unless the caller detaches them, as MoCo does.
        queue_KD: keys of earlier batches, if any. This function normalizes them.
        temperature: divides the cosines.

    Returns:
        A scalar: the mean over the B queries. It is log(1 + negatives) if all embeddings are equal.

    Raises:
        ValueError: the shapes do not match, there are no negatives (one image without a queue, or an empty
            queue), or the temperature is not positive.

    Source: He et al., arXiv:1911.05722, eq. 1 (with a queue); Chen et al., arXiv:2104.02057, algorithm 1
    (without). MoCo v1 and v2 and lightly's NTXentLoss with a memory bank have the same scale. MoCo v3
    multiplies by 2 * temperature and adds both directions.
    """
    if query_BD.ndim != 2 or query_BD.shape != key_BD.shape:
        raise ValueError(
            "info_nce: expected query_BD and key_BD of one shape (batch, dimensions), got "
            f"{tuple(query_BD.shape)} and {tuple(key_BD.shape)}"
        )
    if queue_KD is not None and (queue_KD.ndim != 2 or queue_KD.shape[1:] != key_BD.shape[1:]):
        raise ValueError(
            f"info_nce.queue_KD: expected a queue (rows, {key_BD.shape[1]}) for keys {tuple(key_BD.shape)}, "
            f"got {tuple(queue_KD.shape)}"
        )
    negatives = len(key_BD) - 1 if queue_KD is None else len(queue_KD)
    if negatives < 1 or len(query_BD) < 1:
        raise ValueError(
            "info_nce: expected at least one query and one negative, got "
            f"{len(query_BD)} queries and {max(negatives, 0)} negatives; use a batch of 2 images or a queue"
        )
    if temperature <= 0:
        raise ValueError(f"info_nce.temperature: expected a number above 0, got {temperature}")
    query_BD, key_BD = normalize(query_BD, dim=-1), normalize(key_BD, dim=-1)
    if queue_KD is None:
        own_B = torch.arange(len(query_BD), device=query_BD.device)
        return cross_entropy(query_BD @ key_BD.T / temperature, own_B)
    positive_B = (query_BD * key_BD).sum(-1) / temperature
    negatives_BK = query_BD @ normalize(queue_KD, dim=-1).T / temperature
    return softmax_loss(positive_B, negatives_BK)


def softmax_loss(positive_B: Tensor, negative_BK: Tensor) -> Tensor:
    """Return the mean of log(exp(positive) + sum of exp(negatives)) - positive."""
    return exact_softplus(negative_BK.logsumexp(-1) - positive_B).mean()


def exact_softplus(values: Tensor) -> Tensor:
    """Return log(1 + exp(values)). Torch's threshold of 20 would make an error of 2e-9 in float64."""
    return softplus(values, threshold=50)


@full_precision
def triplet(anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, *, margin: float) -> Tensor:
    """Return the triplet loss: a positive must be nearer than a negative by a margin in squared distance.

    The loss is the mean over images of
    `max(0, |anchor - positive|^2 - |anchor - negative|^2 + margin)`. Triplets that satisfy the margin count
    as 0.

    Args:
        anchor_BD, positive_BD, negative_BD: embeddings, one triplet per row. This function does not normalize
            them. In the paper, they are on the unit sphere, where squared distances are at most 4.
        margin: above 0, 0.2 in the paper.

    Returns:
        A scalar: the mean over the B triplets. It equals the margin if all embeddings are equal.

    Raises:
        ValueError: the arguments are not three matrices of one shape, or the margin is not positive.

    Source: Schroff et al., arXiv:1503.03832, eq. 3, which is the sum over triplets. torch's
    triplet_margin_loss uses distances that are not squared.
    """
    if anchor_BD.ndim != 2 or not anchor_BD.shape == positive_BD.shape == negative_BD.shape:
        raise ValueError(
            "triplet: expected anchors, positives and negatives of one shape (batch, dimensions), got "
            f"{tuple(anchor_BD.shape)}, {tuple(positive_BD.shape)} and {tuple(negative_BD.shape)}"
        )
    if margin <= 0:
        raise ValueError(f"triplet.margin: expected a number above 0, got {margin}")
    near_B = (anchor_BD - positive_BD).square().sum(-1)
    far_B = (anchor_BD - negative_BD).square().sum(-1)
    return (near_B - far_B + margin).relu().mean()


class _OtherRowsLogSumExp(torch.autograd.Function):
    """The sum over rows i of log(sum over k != i of exp(z_i . z_k / T)), for unit rows z_ND.

    It is computed in blocks of the upper triangle. Since |z_i . z_k| <= 1, the logits are at most 1 / T. The
    log-sum-exp uses this bound instead of the maximum, so no row is read twice.
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
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        z_ND, sums_N = ctx.saved_tensors
        weights_N = 1 / sums_N
        result_ND = torch.zeros_like(z_ND)
        for rows, columns in _upper_blocks(z_ND):
            block = _exponentials(z_ND, rows, columns, ctx.temperature)
            # softmax(i, k) + softmax(k, i), because each pair is a logit of both rows
            block *= weights_N[rows, None] + weights_N[None, columns]
            result_ND[rows] += block @ z_ND[columns]
            if columns.start != rows.start:
                result_ND[columns] += block.T @ z_ND[rows]
        return result_ND * (gradient / ctx.temperature), None


def _upper_blocks(z_ND: Tensor) -> list[tuple[slice, slice]]:
    size = _BLOCK_SIZE.get(z_ND.device.type, _BLOCK_SIZE_OTHER_DEVICES)
    starts = range(0, len(z_ND), size)
    return [(slice(i, i + size), slice(j, j + size)) for i in starts for j in starts if j >= i]


def _exponentials(z_ND: Tensor, rows: slice, columns: slice, temperature: float) -> Tensor:
    """Return exp((z_i . z_k - 1) / T) for a block, with 0 where i = k."""
    block = z_ND[rows] @ z_ND[columns].T
    block.sub_(1).div_(temperature).exp_()
    if columns.start == rows.start:
        block.fill_diagonal_(0)
    return block
