# SPDX-License-Identifier: Apache-2.0
"""The loss and the center of DINO.

Legend: V views of the student, the first A of which are also the teacher's; B batch, K outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import threshold

from hf_ssl.losses.soft_targets import check_temperature, check_views, cross_view_cross_entropy
from hf_ssl.losses.upcasting import full_precision, upcast, without_autocast


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
