# SPDX-License-Identifier: Apache-2.0
"""Losses with sampled negatives: InfoNCE of CPC, and NCE and cross entropy against rows of a memory bank.

Legend: B batch, N predictions (in `memory_scores`: rows of the bank), M targets, K negatives, D dimensions.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from hf_ssl.losses.contrastive import exact_softplus, softmax_loss
from hf_ssl.losses.soft_targets import check_temperature
from hf_ssl.losses.upcasting import full_precision, upcast, without_autocast

# The number of values of the bank in one chunk. On a CPU, they fit into the cache of a core.
_VALUES_PER_CHUNK = {"cpu": 2**17}
_VALUES_PER_CHUNK_OTHER_DEVICES = 2**26


@full_precision
def cpc_info_nce(
    prediction_ND: Tensor,
    target_MD: Tensor,
    positive_N: Tensor | None = None,
    negative_NK: Tensor | None = None,
) -> Tensor:
    """Return the cross entropy of each prediction's own target against other targets, in nats.

    The score of a prediction and a target is their dot product. One call computes all positions of one step k
    in one matrix product: the predictions of all images and positions against the targets. Without
    `negative_NK`, all other targets are negatives. These are the other patches of the same image and all
    patches of the other images.

    Args:
        prediction_ND: linear maps of contexts. They are not normalized. The caller scales them (bolts: 0.1).
        target_MD: at least 2 encoded patches, which the caller may have mapped. They get gradients.
        positive_N: int64, the row of each prediction's own target. Without it, this is row i for
            prediction i, and N must equal M.
        negative_NK: int64, the rows of K negatives for each prediction. A row may be drawn several times, and
            it may be the positive, as in the code of Greedy InfoMax and CPCV2-PyTorch.

    Returns:
        A scalar: the mean over the N predictions. The number of candidates is M, or K + 1 with `negative_NK`.
        log(candidates) - loss is a lower bound of the mutual information of contexts and targets. The loss is
        log(candidates) if all scores are equal.

    Raises:
        ValueError: the shapes do not match, the rows are not int64, or there are no negatives.

    Source: van den Oord et al., arXiv:1807.03748, eq. 4 and 5; Henaff et al., arXiv:1905.09272, eq. 3. The
    negatives of pytorch-lightning-bolts are all vectors of the batch. Those of CPCV2-PyTorch are sampled. Its
    code adds 1e-11 to the softmax, which this function does not need. Its W_k maps the target.
    """
    if prediction_ND.ndim != 2 or target_MD.ndim != 2 or prediction_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(
            "cpc_info_nce: expected predictions (N, dimensions) and targets (M, dimensions) of one width, "
            f"got {tuple(prediction_ND.shape)} and {tuple(target_MD.shape)}"
        )
    predictions, targets = len(prediction_ND), len(target_MD)
    if predictions < 1 or targets < 2:
        raise ValueError(
            "cpc_info_nce: expected at least 1 prediction and 2 targets, because each prediction needs "
            f"negatives, got {predictions} and {targets}"
        )
    if positive_N is None:
        if predictions != targets:
            raise ValueError(
                "cpc_info_nce.positive_N: expected the row of each prediction's target, because there are "
                f"{predictions} predictions and {targets} targets, got none"
            )
        positive_N = torch.arange(predictions, device=target_MD.device)
    elif positive_N.shape != (predictions,) or positive_N.dtype != torch.int64:
        raise ValueError(
            f"cpc_info_nce.positive_N: expected int64, one row for each of {predictions} predictions, got "
            f"{positive_N.dtype} {tuple(positive_N.shape)}"
        )
    score_NM = prediction_ND @ target_MD.T
    if negative_NK is None:
        return cross_entropy(score_NM, positive_N)
    _check_indices("cpc_info_nce.negative_NK", negative_NK, predictions)
    positive_score_N = score_NM.gather(1, positive_N[:, None])[:, 0]
    return softmax_loss(positive_score_N, score_NM.gather(1, negative_NK))


@without_autocast
def memory_scores(anchors_BD: Tensor, bank_ND: Tensor, indices_BK: Tensor) -> Tensor:
    """Return the dot products (B, K) of each anchor with its own K rows of a memory bank.

    The rows are read in chunks, in the forward and again in the backward pass. They are never in memory as
    (B, K, D). If the bank changes before the backward pass, torch raises an error.

    Args:
        anchors_BD: embeddings. Only they get gradients.
        bank_ND: the rows of the memory bank. They may have half precision. Each chunk is converted to the
            precision of the result.
        indices_BK: int64, the rows for each anchor. A row may occur several times.

    Returns:
        Scores (B, K) in float32 or better.

    Raises:
        ValueError: the shapes do not match, or the indices are not int64.
    """
    if anchors_BD.ndim != 2 or bank_ND.ndim != 2 or anchors_BD.shape[1] != bank_ND.shape[1]:
        raise ValueError(
            "memory_scores: expected anchors (batch, dimensions) and a bank (rows, dimensions) of one width, "
            f"got {tuple(anchors_BD.shape)} and {tuple(bank_ND.shape)}"
        )
    _check_indices("memory_scores.indices_BK", indices_BK, len(anchors_BD))
    return _MemoryScores.apply(upcast(anchors_BD), bank_ND.detach(), indices_BK)


@full_precision
def memory_nce(
    positive_scores_B: Tensor,
    negative_scores_BK: Tensor,
    *,
    num_rows: int,
    z: float | Tensor,
    temperature: float = 1.0,
    epsilon: float = 1e-7,
) -> Tensor:
    """Return the noise-contrastive estimation (NCE) loss of positives against rows of a memory bank.

    The model's probability of a row is P = exp(score / temperature) / z. The K negatives are noise with the
    uniform probability Pn = 1 / num_rows. The loss is the mean over images of
    `-log(P / (P + K Pn + eps))` for the positive, plus the sum over negatives of
    `-log(K Pn / (P + K Pn + eps))`.

    Args:
        positive_scores_B: cosines of each anchor and its own row in the bank.
        negative_scores_BK: cosines of each anchor and K sampled rows.
        num_rows: number of rows in the bank.
        z: the normalizing constant, a number or a tensor (). CMC computes it once, from the first batch
            (`memory_nce_constant`). It gets no gradient. A tensor is not checked.
        temperature: divides the scores. With 1, they are already divided.
        epsilon: eps. CMC's and InsDis' code adds 1e-7, and VISSL's 2**-23.

    Returns:
        A scalar: the mean over the B images of a sum over K + 1 terms.

    Raises:
        ValueError: the shapes do not match, or `num_rows`, `z` or the temperature is not positive.

    Source: Wu et al., arXiv:1805.01978, eq. 5 to 8 (InsDis); Tian et al., arXiv:1906.05849, section 3.4 and
    appendix. CMC adds the losses of both directions. CMC's and VISSL's code have the same scale.
    """
    _check_scores("memory_nce", positive_scores_B, negative_scores_BK, temperature)
    _check_num_rows("memory_nce", num_rows)
    if not isinstance(z, Tensor) and z <= 0:
        raise ValueError(f"memory_nce.z: expected a number above 0, got {z}")
    # Everything is a logarithm, because P underflows for rows that are far from the anchor.
    log_z = z.detach().log() if isinstance(z, Tensor) else math.log(z)
    noise = negative_scores_BK.shape[1] / num_rows
    log_noise, log_rest = math.log(noise), math.log(noise + epsilon)
    of_positive_B = exact_softplus(log_rest + log_z - positive_scores_B / temperature)
    of_negative_BK = exact_softplus(negative_scores_BK / temperature - (log_rest + log_z)) + (
        log_rest - log_noise
    )
    return (of_positive_B + of_negative_BK.sum(1)).mean()


@torch.no_grad()
@full_precision
def memory_nce_constant(
    positive_scores_B: Tensor, negative_scores_BK: Tensor, *, num_rows: int, temperature: float = 1.0
) -> Tensor:
    """Return the constant z of `memory_nce` for the scores of the first batch, as CMC computes it.

    With z, the mean probability of the batch's B * (K + 1) scores is 1 / num_rows.

    Args:
        positive_scores_B, negative_scores_BK, num_rows, temperature: as in `memory_nce`.

    Returns:
        A scalar without gradient: num_rows times the mean of exp(score / temperature).

    Raises:
        ValueError: the shapes do not match, or `num_rows` or the temperature is not positive.

    Source: the code of Tian et al., arXiv:1906.05849 (`NCEAverage`); Wu et al., arXiv:1805.01978, eq. 8.
    """
    _check_scores("memory_nce_constant", positive_scores_B, negative_scores_BK, temperature)
    _check_num_rows("memory_nce_constant", num_rows)
    total = (positive_scores_B / temperature).exp().sum() + (negative_scores_BK / temperature).exp().sum()
    return total / (positive_scores_B.numel() + negative_scores_BK.numel()) * num_rows


@full_precision
def memory_softmax(
    positive_scores_B: Tensor, negative_scores_BK: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the cross entropy of each positive against its own K rows of a memory bank, in nats.

    Args:
        positive_scores_B: cosines of each anchor and its own row in the bank.
        negative_scores_BK: cosines of each anchor and K sampled rows.
        temperature: divides the scores. With 1, they are already divided.

    Returns:
        A scalar: the mean over the B images. It is log(1 + K) if all scores are equal. log K - loss is a
        lower bound of the mutual information of the two views.

    Raises:
        ValueError: the shapes do not match, or the temperature is not positive.

    Source: Tian et al., arXiv:1906.05849, eq. 2 and 3. The softmax of CMC's and PyContrast's code has the
    same scale.
    """
    _check_scores("memory_softmax", positive_scores_B, negative_scores_BK, temperature)
    return softmax_loss(positive_scores_B / temperature, negative_scores_BK / temperature)


class _MemoryScores(torch.autograd.Function):
    """The dot products of anchors and rows of a bank, in chunks of rows."""

    @staticmethod
    def forward(ctx: Any, anchors_BD: Tensor, bank_ND: Tensor, indices_BK: Tensor) -> Tensor:
        result_BK = anchors_BD.new_empty(indices_BK.shape)
        for images, columns, rows_bkD in _chunks(bank_ND, indices_BK, anchors_BD.dtype):
            result_BK[images, columns] = torch.bmm(rows_bkD, anchors_BD[images, :, None])[:, :, 0]
        ctx.save_for_backward(bank_ND, indices_BK)
        return result_BK

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, gradient_BK: Tensor) -> tuple[Tensor, None, None]:
        bank_ND, indices_BK = ctx.saved_tensors
        result_BD = gradient_BK.new_zeros(len(gradient_BK), bank_ND.shape[1])
        for images, columns, rows_bkD in _chunks(bank_ND, indices_BK, gradient_BK.dtype):
            result_BD[images] += torch.bmm(gradient_BK[images, None, columns], rows_bkD)[:, 0]
        return result_BD, None, None


def _chunks(bank_ND: Tensor, indices_BK: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield a range of images, a range of their indices, and these rows of the bank (b, k, D)."""
    (batch, negatives), width = indices_BK.shape, bank_ND.shape[1]
    rows = max(1, _VALUES_PER_CHUNK.get(bank_ND.device.type, _VALUES_PER_CHUNK_OTHER_DEVICES) // width)
    images_at_once, columns_at_once = max(1, rows // negatives), min(rows, negatives)
    for image in range(0, batch, images_at_once):
        images = slice(image, image + images_at_once)
        for column in range(0, negatives, columns_at_once):
            columns = slice(column, column + columns_at_once)
            chosen = indices_BK[images, columns]
            rows_nD = bank_ND.index_select(0, chosen.flatten()).to(dtype)
            yield images, columns, rows_nD.view(*chosen.shape, width)


def _check_indices(name: str, indices_BK: Tensor, batch: int) -> None:
    valid = indices_BK.ndim == 2 and len(indices_BK) == batch and indices_BK.shape[1] > 0
    if not valid or indices_BK.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 rows ({batch}, K >= 1), got {indices_BK.dtype} {tuple(indices_BK.shape)}"
        )


def _check_scores(
    name: str, positive_scores_B: Tensor, negative_scores_BK: Tensor, temperature: float
) -> None:
    matching = positive_scores_B.ndim == 1 and negative_scores_BK.ndim == 2
    if not matching or len(positive_scores_B) != len(negative_scores_BK) or 0 in negative_scores_BK.shape:
        raise ValueError(
            f"{name}: expected positive scores (batch,) and negative scores (batch, K >= 1), got "
            f"{tuple(positive_scores_B.shape)} and {tuple(negative_scores_BK.shape)}"
        )
    check_temperature(name, temperature)


def _check_num_rows(name: str, num_rows: int) -> None:
    if num_rows < 1:
        raise ValueError(f"{name}.num_rows: expected at least 1, got {num_rows}")
