# SPDX-License-Identifier: Apache-2.0
"""Losses of SwAV and DeepCluster v2: assignments to prototypes, and their prediction from other views.

Legend: V views, the first A of which have assignments; B batch, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_ssl.losses.soft_targets import check_temperature, check_views, cross_view_cross_entropy
from hf_ssl.losses.upcasting import full_precision, without_autocast


@torch.no_grad()
@full_precision
def sinkhorn(scores_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments of samples to prototypes that use all prototypes about equally.

    The algorithm starts from exp(scores / epsilon). In each iteration, it divides each prototype's column and
    then each sample's row by its sum. The first iteration is computed in logarithms. After it, no sum can
    vanish or overflow. If a column sums to 1, its largest entry is at least 1 / B. The division of the rows
    makes this entry at most K times smaller. The same argument holds for rows.

    Args:
        scores_BK: cosines of samples and prototypes. They include the samples of all processes and of the
            queue, because each sample's assignment depends on the other samples.
        epsilon: temperature, 0.05 in the paper and 0.03 in some runs of the authors.
        iterations: at least 1, 3 in the paper.

    Returns:
        Assignments (B, K) in float32 or better, without a gradient. Each row sums to 1.

    Raises:
        ValueError: `scores_BK` is not a matrix or is empty, or `epsilon` or `iterations` is not positive.

    Source: Caron et al., arXiv:2006.09882, eq. 3 to 5 and its appendix. The code of the authors and that of
    lightly give equal results, unless they overflow.
    """
    if scores_BK.ndim != 2 or 0 in scores_BK.shape:
        raise ValueError(
            f"sinkhorn.scores_BK: expected shape (batch, prototypes), got {tuple(scores_BK.shape)}"
        )
    if epsilon <= 0:
        raise ValueError(f"sinkhorn.epsilon: expected a number above 0, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"sinkhorn.iterations: expected at least 1, got {iterations}")
    assignments_BK = (scores_BK / epsilon).log_softmax(0).softmax(1)
    for _ in range(iterations - 1):
        assignments_BK /= assignments_BK.sum(0)
        assignments_BK /= assignments_BK.sum(1, keepdim=True)
    return assignments_BK


@without_autocast
def swapped_prediction(scores_VBK: Tensor, assignments_ABK: Tensor, *, temperature: float) -> Tensor:
    """Return the cross entropy of each view's scores against the assignments of the other views, in nats.

    The loss is the mean over samples b, views a with assignments and views v != a of
    `-sum over k of assignments[a, b, k] * log_softmax(scores[v, b] / temperature)[k]`.

    Args:
        scores_VBK: cosines of V >= 2 views of the same B images with the prototypes, from crops of any size.
        assignments_ABK: probabilities for the first A of these views, for example from `sinkhorn`. They get
            no gradient.
        temperature: divides the scores, 0.1 in the paper.

    Returns:
        A scalar in float32 or better: the mean over the B * A * (V - 1) pairs.

    Raises:
        ValueError: the shapes do not match, or the temperature is not positive.

    Source: Caron et al., arXiv:2006.09882, eq. 2 and 6. The authors' code, lightly and solo-learn have the
    same scale. Eq. 6 in the paper is a sum over pairs.
    """
    check_views("swapped_prediction", scores_VBK, assignments_ABK, "assignments")
    check_temperature("swapped_prediction", temperature)
    return cross_view_cross_entropy(scores_VBK, assignments_ABK, temperature, lambda given_AbK: given_AbK)


@full_precision
def cluster_cross_entropy(scores_VBK: Tensor, assignment_B: Tensor, *, temperature: float) -> Tensor:
    """Return the cross entropy of the scores of all views against one cluster for each sample, in nats.

    Args:
        scores_VBK: cosines of V >= 1 views of the same B images with the prototypes.
        assignment_B: int64, the cluster of each image. An image with -100 has no cluster and is ignored.
        temperature: divides the scores, 0.1 in the authors' code.

    Returns:
        A scalar: the mean over the views of images with a cluster. If no image has one, the loss and its
        gradient are 0.

    Raises:
        ValueError: the shapes do not match, the clusters are not int64, or the temperature is not positive.

    Source: DeepCluster v2 in Caron et al., arXiv:2006.09882, appendix. The authors' code has the same scale
    and takes the mean over several heads.
    """
    if scores_VBK.ndim != 3 or 0 in scores_VBK.shape:
        raise ValueError(
            "cluster_cross_entropy.scores_VBK: expected shape (views, batch, prototypes), got "
            f"{tuple(scores_VBK.shape)}"
        )
    if assignment_B.shape != scores_VBK.shape[1:2] or assignment_B.dtype != torch.int64:
        raise ValueError(
            f"cluster_cross_entropy.assignment_B: expected int64, one for each of {scores_VBK.shape[1]} "
            f"images, got {assignment_B.dtype} {tuple(assignment_B.shape)}"
        )
    check_temperature("cluster_cross_entropy", temperature)
    logits_NK = (scores_VBK / temperature).flatten(0, 1)
    total = cross_entropy(logits_NK, assignment_B.repeat(len(scores_VBK)), reduction="sum", ignore_index=-100)
    return total / (len(scores_VBK) * (assignment_B != -100).sum()).clamp(min=1)
