# SPDX-License-Identifier: Apache-2.0
"""Linear probe: the accuracy of a linear classifier on frozen features, which are computed once and cached.

Legend: N training rows, B rows in a step, D features, C classes, R learning rates trained simultaneously.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation.config import LEARNING_RATES, are_positive
from hf_ssl.evaluation.inputs import Inputs, accuracy_result
from hf_ssl.evaluation.knn import as_labels, check_features
from hf_ssl.evaluation.results import ProtocolResult

VERSION = 1
MOMENTUM = 0.9
HELD_OUT = 0.1


@dataclass
class Config:
    """Settings.

    Attributes:
        learning_rates: initial learning rates for this batch size, which are trained simultaneously.
        epochs, batch_size: of the training.
        standardize: see `linear_probe`.
    """

    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))
    epochs: int = 100
    batch_size: int = 256
    standardize: bool = False

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        rates = list(self.learning_rates)
        check_values(
            where,
            ("learning_rates", rates, are_positive(rates), "one or more positive numbers"),
            ("epochs", self.epochs, self.epochs > 0, "a positive number"),
            ("batch_size", self.batch_size, self.batch_size > 0, "a positive number"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of the classifier with the selected learning rate, see `linear_probe`."""
    train, test = inputs.train, inputs.test
    with inputs.progress("linear probe", 2 * config.epochs, "epoch") as bar:  # of the sweep, and of the best
        probe, logits_NC = _fit(
            train.features, train.labels, test.features, test.labels, **asdict(config),
            seed=inputs.seed, device=inputs.device, advance=bar.update,
        )  # fmt: skip
    rates = sorted(config.learning_rates)
    state = "standardized" if config.standardize else "not standardized"
    edge = " (at the edge of the sweep)" if probe.at_edge else ""
    selected_on = f"{100 * HELD_OUT:g} % of the training images"
    return [
        accuracy_result(
            "linear",
            VERSION,
            asdict(config) | {"seed": inputs.seed},
            logits_NC,
            test.labels,
            key="linear_probe",
            title="Linear probe accuracy",
            column="linear probe",
            text=f"softmax regression on frozen features, {state}, without augmentation. Optimizer: SGD, "
            f"momentum {MOMENTUM:g}, no weight decay, {probe.epochs} epochs, batch size {probe.batch_size}, "
            f"cosine schedule. The learning rate {probe.learning_rate:g}{edge} had the highest accuracy on a "
            f"held-out {selected_on} ({len(rates)} tested, {rates[0]:g} to {rates[-1]:g}). The final "
            f"classifier was trained on all {train} and tested on {test}",
            selection={"learning_rate": probe.learning_rate},
            selected_on=selected_on,
            details={
                "at_edge": probe.at_edge,
                "validation_accuracy": probe.validation_accuracy,
                "validation": {str(rate): value for rate, value in probe.validation.items()},
            },
        )
    ]


class LinearProbe(NamedTuple):
    """Result of `linear_probe`.

    Attributes:
        accuracy: test accuracy of the head that was trained on all training rows with `learning_rate`.
        learning_rate: the best learning rate of the sweep.
        validation_accuracy: the largest value in `validation`.
        validation: accuracy on the held-out rows for each learning rate of the sweep.
        at_edge: whether the best learning rate is the first or the last of several. If so, a wider sweep may
            give a higher accuracy.
        epochs, batch_size: settings of both trainings.
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
    """Return the test accuracy of a linear classifier (softmax, bias, no weight decay) on cached features.

    The optimizer is SGD with momentum 0.9. The learning rate decays to zero by a cosine over the steps. The
    weights start at zero. The features are neither standardized nor normalized, as in the published
    protocols. There is no augmentation, because the features are cached.

    All learning rates are trained simultaneously on 90 % of the training rows. The best one on the other 10 %
    is trained again on all training rows. The test rows are used once, at the end.

    Args:
        train_features, train_labels: (N, D) and (N,), N >= 2.
        test_features, test_labels: any number of rows.
        learning_rates: rates at this batch size, not scaled.
        epochs, batch_size: settings of both trainings.
        standardize: first scale each column to mean 0 and standard deviation 1 over the training rows, as MAE
            does (its BatchNorm without affine parameters). The optimal head is the same, but SGD comes nearer
            to it. With 1,000 images and 32 features of an untrained ResNet, the accuracy was 0.87 instead of
            0.77. With 12,000 images and 512 features, it was 0.40 instead of 0.38.
        seed: seed of a separate generator for the split and the order of the rows.
        device: device of the computation; None: the device of the training features.
        advance: callback for a progress bar, called with 1 after each of the 2 x `epochs` epochs.

    Raises:
        UserError: the number of labels is wrong, features are not finite, or a setting is out of range.

    Source: the MoCo, SwAV and DINO protocols (SGD with momentum 0.9, 100 epochs, learning rates for batch
    size 256); DINOv2 (2304.07193) for training the heads of the sweep together. Difference: published sweeps
    choose the learning rate on the split that they report.
    """
    data = (train_features, train_labels, test_features, test_labels)
    return _fit(*data, learning_rates, epochs, batch_size, standardize, seed, device, advance)[0]


def _fit(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    standardize: bool,
    seed: int,
    device: torch.device | str | None,
    advance: Callable[[int], object],
) -> tuple[LinearProbe, Tensor]:
    """Return the result of `linear_probe`, and the logits of the test images (N, C)."""
    train_features = check_features(train_features, "linear probe, training")
    test_features = check_features(test_features, "linear probe, test", train_features.shape[1])
    rates = sorted(set(learning_rates))
    if not are_positive(rates) or epochs < 1 or batch_size < 1:
        raise UserError(
            f"linear probe: expected positive settings, got {rates}, {epochs} epochs, batch {batch_size}"
        )
    if len(train_features) < 2:
        raise UserError("linear probe: expected at least 2 training images, got 1")
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
    scores = torch.cat([logits(head, rows)[:, 0] for rows in test.split(4096)])
    accuracy = int((scores.argmax(dim=1) == test_targets).sum()) / len(test_targets)
    at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
    return LinearProbe(accuracy, best, validation[best], validation, at_edge, epochs, batch_size), scores


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
    """Return one linear head per learning rate, trained on the same batches, as one tensor (D + 1, R, C).

    The last row holds the biases. One tensor holds all heads, so that a step needs only two matrix products.
    The gradient of the mean cross entropy with respect to the logits is (softmax - one hot) / B.

    Args:
        features: float32 (N, D).
        labels: int64 (N,).
        classes: C.
        learning_rates: R initial learning rates.
        epochs, batch_size: settings of the training.
        generator: generator for the order of the rows.
        advance: called with 1 after each epoch.
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
            target = labels[index][:, None, None].expand(-1, len(learning_rates), 1)
            error.scatter_add_(2, target, error.new_full(target.shape, -1.0))
            error /= len(index)
            torch.mm(batch.T, error.flatten(1), out=gradient[:-1].view(width, -1))
            torch.sum(error, dim=0, out=gradient[-1])
            velocity.mul_(MOMENTUM).add_(gradient)
            heads.sub_(velocity * (rates * (0.5 * (1 + math.cos(math.pi * step / steps)))))
            step += 1
        advance(1)
    return heads


def logits(heads: Tensor, features: Tensor) -> Tensor:
    """Return the logits (B, R, C) for heads (D + 1, R, C) and features (B, D)."""
    width = features.shape[1]
    return torch.addmm(heads[-1].flatten(), features, heads[:-1].view(width, -1)).view(
        len(features), *heads.shape[1:]
    )


def heads_accuracy(heads: Tensor, features: Tensor, labels: Tensor) -> list[float]:
    """Return the accuracy of each head, R numbers in [0, 1]."""
    right = torch.zeros(heads.shape[1], dtype=torch.long, device=features.device)
    for rows, targets in zip(features.split(4096), labels.split(4096), strict=True):
        right += (logits(heads, rows).argmax(dim=2) == targets[:, None]).sum(dim=0)
    return (right.cpu().double() / len(labels)).tolist()
