# SPDX-License-Identifier: Apache-2.0
"""The cross entropy of every view against the soft targets of the other views, for SwAV and DINO.

Legend: V views, the first A of which have targets; B batch, K classes. In a part of the data, b is a subset
of the images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ssl.losses.upcasting import upcast, without_autocast

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
