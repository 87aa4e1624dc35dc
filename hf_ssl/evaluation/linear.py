# SPDX-License-Identifier: Apache-2.0
"""Linear probe: how well a linear classifier does on frozen features, which are computed once and kept.

Legend: N training rows, B rows in a step, D features, C classes, R learning rates trained side by side.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import LEARNING_RATES
from hf_ssl.evaluation.knn import as_labels, check_features

MOMENTUM = 0.9
HELD_OUT = 0.1


class LinearProbe(NamedTuple):
    """Result of `linear_probe`.

    accuracy is on the test set, by the head trained on all training rows at learning_rate; validation holds
    the accuracy on the held-out rows for each learning rate of the sweep, and validation_accuracy the best of
    them. at_edge: the best one is the first or the last of several: a wider sweep may do better.
    """

    accuracy: float
    learning_rate: float
    validation_accuracy: float
    validation: dict[float, float]
    at_edge: bool
    epochs: int
    batch_size: int


def linear_probe(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 100,
    batch_size: int = 256,
    standardize: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda epochs: None,
) -> LinearProbe:
    """Test accuracy of a linear classifier (softmax, bias, no weight decay) on cached features.

    SGD with momentum 0.9, cosine to zero by step, from zero weights, on the features as they are (neither
    standardised nor normalised, as in the published protocols; no augmentation, because the features are
    cached). All learning rates are trained at once on 90 % of the training rows; the best on the other 10 %
    is trained again on all of them. The test rows are used once, at the end.

    Args:
        train_features, train_labels: (N, D) and (N,), N >= 2.
        test_features, test_labels: as many rows as there are.
        learning_rates: rates at this batch size, not scaled.
        epochs, batch_size: of both trainings.
        standardize: bring each column to mean 0 and deviation 1 over the training rows first, as MAE does
            (its BatchNorm without affine). The best reachable head is the same, but SGD comes nearer to it:
            with 1,000 images and 32 features of an untrained ResNet 0.87 instead of 0.77, with 12,000 images
            and 512 features 0.40 instead of 0.38.
        seed: for the split and the order of the rows, by a generator of its own.
        device: where to compute; None: where the training features are.
        advance: called with 1 after each of the 2 x `epochs` epochs, for a progress bar.

    Raises:
        UserError: labels that do not fit, features that are not finite, or a setting out of range.

    Source: the MoCo, SwAV and DINO protocols (SGD 0.9, 100 epochs, batch 256 where it is not scaled); DINOv2
    (2304.07193) for training the sweep's heads together. Deviation: published sweeps choose the learning
    rate on the split that they report.
    """
    check_features(train_features, "linear probe, training")
    check_features(test_features, "linear probe, test")
    rates = sorted(set(learning_rates))
    if not rates or rates[0] <= 0 or epochs < 1 or batch_size < 1:
        raise UserError(
            f"linear probe: expected positive settings, got {rates}, {epochs} epochs, batch {batch_size}."
        )
    if len(train_features) < 2:
        raise UserError("linear probe: expected at least 2 training images, got 1.")
    device = torch.device(device) if device is not None else train_features.device
    features = train_features.to(device=device, dtype=torch.float32)
    labels = as_labels(train_labels, len(features), "linear probe, training").to(device)
    test = test_features.to(device=device, dtype=torch.float32)
    test_targets = as_labels(test_labels, len(test), "linear probe, test").to(device)
    if standardize:
        mean, deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-6)
        features, test = (features - mean) / deviation, (test - mean) / deviation
    classes = int(torch.maximum(labels.max(), test_targets.max())) + 1

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator).to(device)
    held_out = max(1, round(HELD_OUT * len(features)))
    chosen, kept = order[:held_out], order[held_out:]
    heads = train_heads(features[kept], labels[kept], classes, rates, epochs, batch_size, generator, advance)
    validation = dict(zip(rates, heads_accuracy(heads, features[chosen], labels[chosen]), strict=True))
    best = max(rates, key=lambda rate: validation[rate])

    head = train_heads(features, labels, classes, [best], epochs, batch_size, generator, advance)
    accuracy = heads_accuracy(head, test, test_targets)[0]
    at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
    return LinearProbe(accuracy, best, validation[best], validation, at_edge, epochs, batch_size)


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    advance: Callable[[int], object] = lambda epochs: None,
) -> Tensor:
    """One linear head for each learning rate, all on the same batches: (D + 1, R, C), biases in the last row.

    features float32 (N, D), labels int64 (N,). The heads lie side by side, so that a step is two matrix
    products for all of them; the gradient of the mean cross entropy, (softmax - one hot) / B, is written out.
    """
    rows, width = features.shape
    heads = features.new_zeros(width + 1, len(learning_rates), classes)
    velocity = torch.zeros_like(heads)
    gradient = torch.zeros_like(heads)
    rates = torch.tensor(learning_rates, device=features.device, dtype=features.dtype)[None, :, None]
    steps_in_epoch = math.ceil(rows / batch_size)
    step, steps = 0, epochs * steps_in_epoch
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator).to(features.device)
        for index in order.split(batch_size):
            batch = features.index_select(0, index)
            error = logits(heads, batch).softmax(dim=2)
            error.scatter_add_(
                2,
                labels[index][:, None, None].expand(-1, len(learning_rates), 1),
                error.new_full((len(index), len(learning_rates), 1), -1.0),
            )
            error /= len(index)
            torch.mm(batch.T, error.flatten(1), out=gradient[:-1].view(width, -1))
            torch.sum(error, dim=0, out=gradient[-1])
            velocity.mul_(MOMENTUM).add_(gradient)
            heads.sub_(velocity * (rates * (0.5 * (1 + math.cos(math.pi * step / steps)))))
            step += 1
        advance(1)
    return heads


def logits(heads: Tensor, features: Tensor) -> Tensor:
    """(B, R, C) of heads (D + 1, R, C) and features (B, D)."""
    width = features.shape[1]
    return torch.addmm(heads[-1].flatten(), features, heads[:-1].view(width, -1)).view(
        len(features), *heads.shape[1:]
    )


def heads_accuracy(heads: Tensor, features: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each head, R numbers in [0, 1]."""
    right = torch.zeros(heads.shape[1], dtype=torch.long, device=features.device)
    for rows, targets in zip(features.split(4096), labels.split(4096), strict=True):
        right += (logits(heads, rows).argmax(dim=2) == targets[:, None]).sum(dim=0)
    return (right.cpu().double() / len(labels)).tolist()
