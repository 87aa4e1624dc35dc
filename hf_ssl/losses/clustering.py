# SPDX-License-Identifier: Apache-2.0
"""SwAV and DeepCluster v2: assignments to prototypes, and their prediction from other views.

Legend: V views, the first A of which have assignments; B batch, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_ssl.losses.precision import full_precision, without_autocast
from hf_ssl.losses.soft_targets import check_temperature, check_views, cross_view_entropy


@torch.no_grad()
@full_precision
def sinkhorn(scores_BK: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Soft assignments of samples to prototypes that use all prototypes about equally.

    Starts from exp(scores / epsilon) and, `iterations` times, divides each prototype's column and then each
    sample's row by its sum. The first division of both kinds is made in logarithms. From then on no sum can
    vanish or overflow: a column that sums to one has an entry of 1 / B at least, which is divided by K at
    most, and the same for rows.

    Args:
        scores_BK: cosines of samples and prototypes; of all processes and of the queue, since each sample's
            assignment depends on the others.
        epsilon: temperature; 0.05 in the paper, 0.03 for some runs of the authors.
        iterations: at least 1; 3 in the paper.

    Returns:
        Assignments (B, K) in float32 or better, without a gradient; rows sum to 1.

    Raises:
        ValueError: not a matrix, an epsilon that is not positive, or no iteration.

    Source: Caron et al., arXiv:2006.09882, eq. 3 to 5 and its appendix. The authors' code and lightly's give
    the same where they do not overflow.
    """
    if scores_BK.ndim != 2 or 0 in scores_BK.shape:
        raise ValueError(f"sinkhorn needs scores (batch, prototypes), got {tuple(scores_BK.shape)}")
    if epsilon <= 0 or iterations < 1:
        raise ValueError(
            f"sinkhorn needs an epsilon above 0 and at least one iteration, got {epsilon} and {iterations}"
        )
    assignments_BK = (scores_BK / epsilon).log_softmax(0).softmax(1)
    for _ in range(iterations - 1):
        assignments_BK /= assignments_BK.sum(0)
        assignments_BK /= assignments_BK.sum(1, keepdim=True)
    return assignments_BK


@without_autocast
def swapped_prediction(scores_VBK: Tensor, assignments_ABK: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of each view's prototypes against the assignments of the other views, in nats.

    Nested-loop meaning: the mean over samples b and over assigned views a and views v != a of `-sum over k of
    assignments[a, b, k] * log_softmax(scores[v, b] / temperature)[k]`.

    Args:
        scores_VBK: cosines with the prototypes of V >= 2 views of the same B images, from crops of any size.
        assignments_ABK: probabilities, as `sinkhorn` makes them, for the first A of these views; no gradient
            reaches them.
        temperature: divides the scores; 0.1 in the paper.

    Returns:
        Scalar in float32 or better: mean over the B * A * (V - 1) pairs.

    Raises:
        ValueError: shapes that do not belong together, or a temperature that is not positive.

    Source: Caron et al., arXiv:2006.09882, eq. 2 and 6. The authors' code, lightly and solo-learn have the
    same scale; eq. 6 in the paper is a sum over pairs.
    """
    check_views("swapped_prediction", scores_VBK, assignments_ABK, "assignments")
    check_temperature("swapped_prediction", temperature)
    return cross_view_entropy(scores_VBK, assignments_ABK, temperature, _as_they_are)


@full_precision
def cluster_cross_entropy(scores_VBK: Tensor, assignment_B: Tensor, *, temperature: float) -> Tensor:
    """Cross entropy of the prototypes of all views against one cluster for each sample, in nats.

    Args:
        scores_VBK: cosines with the prototypes of V >= 1 views of the same B images.
        assignment_B: int64, the cluster of each image; -100 where there is none, which ignores the image.
        temperature: divides the scores; 0.1 in the authors' code.

    Returns:
        Scalar: mean over the views of images that have a cluster; 0, with a gradient of 0, if none has.

    Raises:
        ValueError: shapes that do not belong together, clusters that are not int64, or a temperature that is
        not positive.

    Source: DeepCluster v2 in Caron et al., arXiv:2006.09882, appendix. The authors' code has the same scale
    and takes the mean over several heads.
    """
    if scores_VBK.ndim != 3 or 0 in scores_VBK.shape:
        raise ValueError(
            f"cluster_cross_entropy needs scores (views, batch, prototypes), got {tuple(scores_VBK.shape)}"
        )
    if assignment_B.shape != scores_VBK.shape[1:2] or assignment_B.dtype != torch.int64:
        raise ValueError(
            f"cluster_cross_entropy needs one int64 cluster for each of {scores_VBK.shape[1]} images, got "
            f"{assignment_B.dtype} {tuple(assignment_B.shape)}"
        )
    check_temperature("cluster_cross_entropy", temperature)
    logits_NK = (scores_VBK / temperature).flatten(0, 1)
    total = cross_entropy(logits_NK, assignment_B.repeat(len(scores_VBK)), reduction="sum", ignore_index=-100)
    return total / (len(scores_VBK) * (assignment_B != -100).sum()).clamp(min=1)


def _as_they_are(assignments_AbK: Tensor) -> Tensor:
    return assignments_AbK
