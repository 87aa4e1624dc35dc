# SPDX-License-Identifier: Apache-2.0
"""Losses with soft targets: SwAV, DeepCluster v2 and DINO, with their assignments and centers.

Legend: V views, the first A of which have targets (assignments to prototypes, or outputs of the teacher); B
batch, K prototypes, outputs or classes. In a part of the data, b is a subset of the images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, threshold

from hf_ssl.losses.upcasting import full_precision, upcast, without_autocast

# The number of logits in one part. On a CPU, they fit into the caches.
_LOGITS_PER_PART = {"cpu": 2**19}
_LOGITS_PER_PART_OTHER_DEVICES = 2**24

# Returns the probabilities of a part (A, b, K) of the targets.
Sharpen = Callable[[Tensor], Tensor]


def cross_view_cross_entropy(
    scores_VBK: Tensor, targets_ABK: Tensor, temperature: float, sharpen: Sharpen
) -> Tensor:
    """Return the mean cross entropy over images and over pairs (a, v) of different views.

    A pair compares `softmax(scores_v / temperature)` with `sharpen(targets_a)`. The cross entropy is linear
    in the target. This function therefore adds the targets of all pairs first, and each view needs only one
    softmax. It computes a few images at a time, in the forward and again in the backward pass. The only new
    tensor of the size of the scores is their gradient. The targets get no gradient.
    """
    pairs = len(targets_ABK) * (len(scores_VBK) - 1)
    total = _CrossViewCrossEntropy.apply(scores_VBK, targets_ABK.detach(), temperature, sharpen)
    return total / (pairs * scores_VBK.shape[1])


def check_views(name: str, scores_VBK: Tensor, targets_ABK: Tensor, targets: str) -> None:
    """Raise `ValueError` for shapes that `cross_view_cross_entropy` cannot pair."""
    if scores_VBK.ndim != 3 or len(scores_VBK) < 2 or 0 in scores_VBK.shape:
        raise ValueError(
            f"{name}: expected scores (views >= 2, batch, classes), got {tuple(scores_VBK.shape)}"
        )
    if targets_ABK.ndim != 3 or scores_VBK.shape[1:] != targets_ABK.shape[1:]:
        raise ValueError(
            f"{name}: expected {targets} (views, batch, classes) with the batch and classes of the scores "
            f"{tuple(scores_VBK.shape)}, got {tuple(targets_ABK.shape)}"
        )
    if not 1 <= len(targets_ABK) <= len(scores_VBK):
        raise ValueError(
            f"{name}: expected {targets} of 1 to {len(scores_VBK)} views, the first views with scores, got "
            f"{len(targets_ABK)}"
        )


def check_temperature(name: str, temperature: float | Tensor) -> None:
    """Raise `ValueError` for a temperature that is not positive. A temperature in a tensor is not checked."""
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"{name}: expected a temperature above 0, got {temperature}")


class _CrossViewCrossEntropy(torch.autograd.Function):
    """The sum over images, a, and v != a of the cross entropy of v against a."""

    @staticmethod
    def forward(
        ctx: Any, scores_VBK: Tensor, targets_ABK: Tensor, temperature: float, sharpen: Sharpen
    ) -> Tensor:
        assigned = len(targets_ABK)
        total = upcast(scores_VBK[0, 0, :1]).new_zeros(())
        for images in _parts(scores_VBK):
            targets_AbK = sharpen(targets_ABK[:, images])
            log_VbK = (upcast(scores_VBK[:, images]) / temperature).log_softmax(-1)
            total += (log_VbK[:assigned] * targets_AbK).sum()  # a view is not its own target
            total -= (log_VbK.sum(0) * targets_AbK.sum(0)).sum()
        ctx.save_for_backward(scores_VBK, targets_ABK)
        ctx.temperature, ctx.sharpen = temperature, sharpen
        return total

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scores_VBK, targets_ABK = ctx.saved_tensors
        assigned, factor = len(targets_ABK), gradient / ctx.temperature
        result_VBK = torch.empty_like(scores_VBK)
        for images in _parts(scores_VBK):
            targets_AbK = ctx.sharpen(targets_ABK[:, images]) * factor
            all_bK = targets_AbK.sum(0)
            mass_Ab1, all_b1 = targets_AbK.sum(-1, keepdim=True), all_bK.sum(-1, keepdim=True)
            softmax_VbK = (upcast(scores_VBK[:, images]) / ctx.temperature).softmax(-1)
            own, rest = softmax_VbK[:assigned], softmax_VbK[assigned:]
            torch.addcmul(targets_AbK - all_bK, own, all_b1 - mass_Ab1, out=result_VBK[:assigned, images])
            torch.addcmul(-all_bK, rest, all_b1, out=result_VBK[assigned:, images])
        return result_VBK, None, None, None


def _parts(scores_VBK: Tensor) -> list[slice]:
    views, batch, classes = scores_VBK.shape
    length = max(
        1, _LOGITS_PER_PART.get(scores_VBK.device.type, _LOGITS_PER_PART_OTHER_DEVICES) // (views * classes)
    )
    return [slice(start, start + length) for start in range(0, batch, length)]


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


@without_autocast
def dino_cross_entropy(
    student_VBK: Tensor,
    teacher_ABK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float | Tensor,
) -> Tensor:
    """Return the cross entropy of the student's outputs against the teacher's, in nats.

    The teacher's outputs are centered and sharpened. The loss is the mean over images b, teacher views a and
    student views v != a of `-sum over k of softmax((teacher[a, b] - center) / teacher_temperature)[k] *
    log_softmax(student[v, b] / student_temperature)[k]`.

    Args:
        student_VBK: logits of V >= 2 views of the same B images, from crops of any size.
        teacher_ABK: logits of the first A of these views. They get no gradient.
        center_K: subtracted from the teacher's logits. It is the center before this batch (`dino_center`).
        student_temperature: divides the student's logits, 0.1 in the paper.
        teacher_temperature: divides the teacher's logits. A scheduled temperature may be a tensor (). Its
            value is not checked, because the host would have to wait for the device.

    Returns:
        A scalar in float32 or better: the mean over the B * A * (V - 1) pairs. The only new tensor
        of the size of the student's logits is their gradient.

    Raises:
        ValueError: the shapes do not match, or a temperature is not positive.

    Source: Caron et al., arXiv:2104.14294, eq. 3 and algorithm 1. The authors' code, lightly and solo-learn
    have the same scale.
    """
    check_views("dino_cross_entropy", student_VBK, teacher_ABK, "outputs of the teacher")
    if center_K.shape != student_VBK.shape[2:]:
        raise ValueError(
            f"dino_cross_entropy.center_K: expected {student_VBK.shape[2]} outputs, got "
            f"{tuple(center_K.shape)}"
        )
    check_temperature("dino_cross_entropy", student_temperature)
    check_temperature("dino_cross_entropy", teacher_temperature)
    # These are copies, because a model may write the new center into its buffer before the backward pass.
    center_K, sharpness = upcast(center_K.detach()).clone(), 1 / teacher_temperature

    def sharpen(teacher_AbK: Tensor) -> Tensor:
        logits_AbK = (teacher_AbK - center_K).mul_(sharpness)
        logits_AbK -= logits_AbK.amax(-1, keepdim=True)
        # exp(-70) is below the rounding error of the sum, and denormal numbers make a CPU slow.
        return threshold(logits_AbK, -70.0, -torch.inf).softmax(-1)

    return cross_view_cross_entropy(student_VBK, teacher_ABK, student_temperature, sharpen)


@torch.no_grad()
@full_precision
def dino_center(center_K: Tensor, teacher_ABK: Tensor, *, momentum: float) -> Tensor:
    """Return the center of the teacher's outputs after an EMA update with this batch.

    Args:
        center_K: the center before this batch, which the loss of this batch uses.
        teacher_ABK: the teacher's logits for this batch. If all processes have the same batch size, the mean
            of their new centers is the new center of the whole batch.
        momentum: the weight of the old center in the new one, 0.9 in the paper.

    Returns:
        The new center (K,): `momentum * center + (1 - momentum) * mean over views and images`.

    Raises:
        ValueError: the shapes do not match.

    Source: Caron et al., arXiv:2104.14294, eq. 4.
    """
    if teacher_ABK.ndim != 3 or center_K.shape != teacher_ABK.shape[2:] or 0 in teacher_ABK.shape:
        raise ValueError(
            f"dino_center.teacher_ABK: expected shape (views, batch, {center_K.numel()}) for a center "
            f"{tuple(center_K.shape)}, got {tuple(teacher_ABK.shape)}"
        )
    return torch.lerp(teacher_ABK.mean((0, 1)), center_K, momentum)
