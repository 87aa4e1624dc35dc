# SPDX-License-Identifier: Apache-2.0
"""DINO's loss and centre. Legend: V views of the student, the first A of which the teacher sees too; B batch,
K outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import threshold

from hf_ssl.losses.precision import full_precision, raised, without_autocast
from hf_ssl.losses.soft_targets import check_temperature, check_views, cross_view_entropy


@without_autocast
def dino_cross_entropy(
    student_VBK: Tensor,
    teacher_ABK: Tensor,
    center_K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float | Tensor,
) -> Tensor:
    """Cross entropy of the student's outputs against the centred, sharpened outputs of the teacher, in nats.

    Nested-loop meaning: the mean over images b and over teacher views a and student views v != a of `-sum
    over k of softmax((teacher[a, b] - center) / teacher_temperature)[k] * log_softmax(student[v, b] /
    student_temperature)[k]`.

    Args:
        student_VBK: logits of V >= 2 views of the same B images, from crops of any size.
        teacher_ABK: logits of the first A of these views; no gradient reaches them.
        center_K: what is taken off the teacher's logits: the old centre, see `dino_center`.
        student_temperature: divides the student's logits; 0.1 in the paper.
        teacher_temperature: divides the teacher's. A scheduled one may be a tensor (), whose value is not
            checked, because a device would have to be waited for.

    Returns:
        Scalar in float32 or better: mean over the B * A * (V - 1) pairs. Beside it, only the gradient of the
        student's logits is held.

    Raises:
        ValueError: shapes that do not belong together, or a temperature that is not positive.

    Source: Caron et al., arXiv:2104.14294, eq. 3 and algorithm 1. The authors' code, lightly and solo-learn
    have the same scale.
    """
    check_views("dino_cross_entropy", student_VBK, teacher_ABK, "outputs of the teacher")
    if center_K.shape != student_VBK.shape[2:]:
        raise ValueError(
            f"dino_cross_entropy needs a centre of {student_VBK.shape[2]} outputs, got "
            f"{tuple(center_K.shape)}"
        )
    check_temperature("dino_cross_entropy", student_temperature)
    check_temperature("dino_cross_entropy", teacher_temperature)
    # Own copies: a model may write the new centre into its buffer before the backward pass comes by here.
    center_K, sharpness = raised(center_K.detach()).clone(), 1 / teacher_temperature

    def sharpen(teacher_AbK: Tensor) -> Tensor:
        logits_AbK = (teacher_AbK - center_K).mul_(sharpness)
        logits_AbK -= logits_AbK.amax(-1, keepdim=True)
        # Nothing of exp(-70) shows beside the largest, and numbers too small to be normal cost a CPU dearly.
        return threshold(logits_AbK, -70.0, -torch.inf).softmax(-1)

    return cross_view_entropy(student_VBK, teacher_ABK, student_temperature, sharpen)


@torch.no_grad()
@full_precision
def dino_center(center_K: Tensor, teacher_ABK: Tensor, *, momentum: float) -> Tensor:
    """The centre of the teacher's outputs, moved towards the mean of this batch.

    Args:
        center_K: the old centre, which the loss of this batch has used.
        teacher_ABK: the teacher's logits for this batch. With several processes of equal batches, the mean of
            their new centres is that of the whole batch.
        momentum: share of the old centre in the new, 0.9 in the paper.

    Returns:
        The new centre (K,): `momentum * center + (1 - momentum) * mean over views and images`.

    Raises:
        ValueError: shapes that do not belong together.

    Source: Caron et al., arXiv:2104.14294, eq. 4.
    """
    if teacher_ABK.ndim != 3 or center_K.shape != teacher_ABK.shape[2:] or 0 in teacher_ABK.shape:
        raise ValueError(
            f"dino_center needs outputs (views, batch, {center_K.numel()}) for a centre "
            f"{tuple(center_K.shape)}, got {tuple(teacher_ABK.shape)}"
        )
    return torch.lerp(teacher_ABK.mean((0, 1)), center_K, momentum)
