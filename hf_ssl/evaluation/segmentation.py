# SPDX-License-Identifier: Apache-2.0
"""Linear heads for semantic segmentation on cached patch tokens, and the intersection over union (layer 1).

Legend: N images, B images in a step, P = h * w patches, D features, K classes, R heads that are trained
simultaneously, H, W pixels of a mask.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl.evaluation.statistics import scale_of
from hf_ssl.modeling.configuration import cosine_factor

VOID = -100
"""Class number of ignored pixels, the default `ignore_index` of torch's `cross_entropy`."""
WEIGHT_DECAY = 1e-4


class Heads(NamedTuple):
    """Linear heads on standardized tokens.

    Attributes:
        mean, deviation: (D,), of `token_statistics`.
        weights, biases: (R, D, K) and (R, K).
    """

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    biases: Tensor

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, R, K, h, w) of tokens (B, P, D) on a square grid."""
        rows = (tokens.to(self.mean) - self.mean) / self.deviation
        found = torch.einsum("bpd,rdc->brcp", rows, self.weights) + self.biases[:, :, None]
        side = math.isqrt(tokens.shape[1])
        return found.unflatten(3, (side, side))


def token_statistics(tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the scale (`scale_of`) of the features (D,) float32 over tokens of some images.

    Args:
        tokens: (N, P, D).
        rows: numbers of the images.
    """
    count = len(rows) * tokens.shape[1]
    total = square = largest = torch.zeros(tokens.shape[2], dtype=torch.float64)
    for part in rows.split(256):
        total = total + tokens[part].double().sum(dim=(0, 1)).cpu()
        largest = largest.maximum(tokens[part].abs().amax(dim=(0, 1)).double().cpu())
    mean = total / count
    for part in rows.split(256):
        square = square + (tokens[part].double() - mean.to(tokens.device)).square().sum(dim=(0, 1)).cpu()
    return mean.float(), scale_of((square / count).sqrt(), largest).float()


def train_heads(
    tokens: Tensor,
    targets: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    rows: Tensor,
    device: torch.device,
    advance: Callable[[int], object] = lambda epochs: None,
) -> Heads:
    """Return one head for each learning rate, trained on the same batches with AdamW and a cosine schedule.

    The loss is the cross entropy between the bilinearly upsampled logits and the targets. It is the mean over
    the pixels of a batch that are not ignored. The weights start at zero.

    Args:
        tokens: (N, P, D).
        targets: (N, H, W), class numbers or `VOID`. All masks have the same size.
        classes: K.
        learning_rates: initial learning rates of the R heads.
        epochs, batch_size: settings of the training.
        generator: generator for the order of the images.
        rows: numbers of the training images. The tokens of other images have no effect.
        device: device of the computation.
        advance: called with 1 after each epoch.
    """
    mean, deviation = (each.to(device) for each in token_statistics(tokens, rows))
    size, count = tokens.shape[2], len(learning_rates)
    with torch.inference_mode(False), torch.enable_grad():
        weights = [torch.zeros(size, classes, device=device, requires_grad=True) for _ in learning_rates]
        biases = [torch.zeros(classes, device=device, requires_grad=True) for _ in learning_rates]
        groups = [
            {"params": list(pair), "lr": rate}
            for *pair, rate in zip(weights, biases, learning_rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
        step, steps = 0, epochs * math.ceil(len(rows) / batch_size)
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for index in order.split(batch_size):
                for group, rate in zip(optimizer.param_groups, learning_rates, strict=True):
                    group["lr"] = rate * cosine_factor(step, steps)
                batch, labels = tokens[index].to(device), targets[index].to(device).long()
                heads = Heads(mean, deviation, torch.stack(weights), torch.stack(biases))
                enlarged = F.interpolate(
                    heads.logits(batch).flatten(0, 1), tuple(labels.shape[1:]), mode="bilinear"
                )
                wanted = labels.repeat_interleave(count, dim=0)
                counted = max(1, int((labels != VOID).sum()))
                loss = F.cross_entropy(enlarged, wanted, ignore_index=VOID, reduction="sum") / counted
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
            advance(1)
    return Heads(mean, deviation, torch.stack(weights).detach(), torch.stack(biases).detach())


def pixel_counts(heads: Heads, tokens: Iterable[Tensor], masks: Iterable[Tensor], classes: int) -> Tensor:
    """Return the numbers of correct, predicted and true pixels of each class, (N, R, 3, K) int64.

    The logits are upsampled bilinearly to the size of each mask. Pixels of the class `VOID` are ignored.

    Args:
        heads: R heads.
        tokens: (N, P, D), or N tensors (P, D).
        masks: N masks of class numbers (H, W), which can differ in size.
        classes: K.
    """
    device, found = heads.weights.device, []
    for token, mask in zip(tokens, masks, strict=True):
        (logits,) = heads.logits(token[None].to(device))
        target = mask.to(device)
        counted = target != VOID
        truth = target[counted].long()
        rows = []
        for each in logits.split(1):  # one head at a time, because upsampled logits can need much memory
            enlarged = F.interpolate(each, tuple(target.shape), mode="bilinear")
            guess = enlarged.argmax(dim=1)[0][counted]
            right = truth[guess == truth]
            parts = (right, guess, truth)
            rows.append(torch.stack([part.bincount(minlength=classes) for part in parts]))
        found.append(torch.stack(rows).cpu())
    return torch.stack(found)


def class_iou(counts: Tensor) -> Tensor:
    """Return the intersection over union (..., K) float64; NaN for classes neither true nor predicted.

    Args:
        counts: (..., 3, K), sums over images of `pixel_counts`.
    """
    right, predicted, true = counts.double().unbind(dim=-2)
    return right / (predicted + true - right)


def mean_iou(counts: Tensor) -> Tensor:
    """Return the mean (...) of `class_iou` over the classes that are true or predicted in any pixel.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge: A Retrospective, 2015, section 2.4.
    The pixels of all images are summed before the division.
    """
    return class_iou(counts).nanmean(dim=-1)
