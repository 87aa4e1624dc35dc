# SPDX-License-Identifier: Apache-2.0
"""Linear probe: the accuracy of a linear classifier on frozen features, which are computed once and cached.

The first number is that of the published feature. For an encoder with a class token, the second number is
that of DINOv2's grid: the best one of several features and learning rates.

Legend: N training rows, B rows in a step, D features, K classes, R learning rates trained simultaneously.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_name, check_values, counted
from hf_ssl.evaluation.config import LEARNING_RATES, MOMENTUM, are_positive
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs, hold_out
from hf_ssl.evaluation.knn import as_labels, check_features
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import EDGE, accuracy_result, by_setting, is_at_edge, is_right
from hf_ssl.evaluation.statistics import standardized
from hf_ssl.modeling.configuration import cosine_factor
from hf_ssl.modeling.pooling import VECTORS

VERSION = 1


@dataclass
class Config:
    """Settings.

    Attributes:
        learning_rates: initial learning rates for this batch size, which are trained simultaneously.
        epochs, batch_size: of the training.
        standardize: see `linear_probe`.
        features: features of DINOv2's grid, names of `VECTORS`; []: only the published feature.
    """

    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))
    epochs: int = 100
    batch_size: int = 256
    standardize: bool = False
    features: list[str] = field(default_factory=lambda: list(VECTORS))

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        rates = list(self.learning_rates)
        check_values(
            where,
            ("learning_rates", rates, are_positive(rates), "one or more positive numbers"),
            ("epochs", self.epochs, self.epochs > 0, "a positive number"),
            ("batch_size", self.batch_size, self.batch_size > 0, "a positive number"),
        )
        for name in self.features:
            check_name(f"{where}.features", name, VECTORS, "known features")


def features(config: Config) -> list[str]:
    """Return the further features for the grid."""
    return list(config.features)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of the classifier with the selected learning rate, see `linear_probe`.

    If the encoder has more than one feature of the grid, the second result is that of the selected feature
    and learning rate.
    """
    results = [_result(inputs, config, {})]
    train, test = inputs.train.further, inputs.test.further
    grid = {name: (train[name], test[name]) for name in VECTORS if name in config.features and name in train}
    if len(grid) > 1:
        results.append(_result(inputs, config, grid))
    return results


def _result(inputs: Inputs, config: Config, grid: dict[str, tuple[Tensor, Tensor]]) -> ProtocolResult:
    """Return the result of the features of a grid, or of the published feature if there are none."""
    train, test = inputs.train, inputs.test
    candidates = grid or {"": (train.features, test.features)}
    epochs = (len(candidates) + 1) * config.epochs  # of the sweep, and of the best one
    settings = asdict(config)
    del settings["features"]
    with inputs.progress("linear probe", epochs, "epoch") as bar:
        fit = _fit(
            list(candidates.values()), train.labels, test.labels, **settings,
            seed=inputs.seed, device=inputs.device, advance=bar.update,
        )  # fmt: skip
    probe, feature = fit.probe, list(candidates)[fit.feature]
    rates = sorted(set(config.learning_rates))
    state = "standardized" if config.standardize else "not standardized"
    selected = f"The learning rate {probe.learning_rate:g}{EDGE * probe.at_edge}"
    tested = f"{len(rates)} tested, {rates[0]:g} to {rates[-1]:g}"
    if grid:
        selected += f" and the feature {feature} ({VECTORS[feature]})"
        tested = f"{len(rates)} learning rates, {rates[0]:g} to {rates[-1]:g}, of {', '.join(grid)}"
    validation = {name: by_setting(found) for name, found in zip(candidates, fit.validation, strict=True)}
    return accuracy_result(
        "linear",
        VERSION,
        settings
        | {"seed": inputs.seed}
        | ({"features": list(grid)} if grid else {})
        # True was the value while features that are constant in the training images changed their scale.
        | ({"standardize": "but constant features"} if config.standardize else {}),
        fit.scores,
        test.labels,
        key="linear_grid" if grid else "linear_probe",
        title="Linear probe accuracy with the selected feature" if grid else "Linear probe accuracy",
        column=f"linear probe, best of {len(grid)} features" if grid else "linear probe",
        text=f"softmax regression on frozen features, {state}, without augmentation. Optimizer: SGD, "
        f"momentum {MOMENTUM:g}, no weight decay, {counted(probe.epochs, 'epoch')}, batch size "
        f"{probe.batch_size}, cosine schedule. {selected} had the highest accuracy on a held-out "
        f"{SELECTED_ON} ({tested}). The final classifier was trained on all {train} and tested on {test}",
        selection={"learning_rate": probe.learning_rate} | ({"feature": feature} if grid else {}),
        selected_on=SELECTED_ON,
        details={
            "at_edge": probe.at_edge,
            "validation_accuracy": probe.validation_accuracy,
            "validation": validation if grid else validation[""],
            "epochs": fit.epochs,
        },
    )


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
    features = [(train_features, test_features)]
    settings = (learning_rates, epochs, batch_size, standardize, seed, device, advance)
    return _fit(features, train_labels, test_labels, *settings).probe


def predict_scores(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    config: Config,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the logits (N, K) of the test images from the head of `linear_probe`.

    Args:
        train_features, train_labels: (M, D) and (M,).
        test_features, test_labels: (N, D) and (N,).
        config: settings of the protocol; `features` has no effect.
        seed: seed of the batches and of the held-out images.
        device: device of the computation; None: the device of the features.
    """
    settings = asdict(config)
    del settings["features"]
    return _fit(
        [(train_features, test_features)], train_labels, test_labels, **settings,
        seed=seed, device=device, advance=lambda epochs: None,
    ).scores  # fmt: skip


class _Fit(NamedTuple):
    """Result of `_fit`.

    Attributes:
        probe: the result for the best feature.
        feature: number of the best feature.
        validation: accuracy on the held-out rows for each feature and each learning rate.
        epochs: {"train": .., "test": ..}, the accuracies of the final head after each epoch.
        scores: logits of the test images (N, K).
    """

    probe: LinearProbe
    feature: int
    validation: list[dict[float, float]]
    epochs: dict[str, list[float]]
    scores: Tensor


def _fit(
    features: Sequence[tuple[Tensor, Tensor]],
    train_labels: Any,
    test_labels: Any,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    standardize: bool,
    seed: int,
    device: torch.device | str | None,
    advance: Callable[[int], object],
) -> _Fit:
    """Return the result of `linear_probe` for the best one of several features.

    The heads of all features receive the same batches.

    Args:
        features: training rows and test rows of each feature.
        Others: as for `linear_probe`.
    """
    rates = sorted(set(learning_rates))
    if not are_positive(rates) or epochs < 1 or batch_size < 1:
        raise UserError(
            f"linear probe: expected positive settings, got {rates}, {counted(epochs, 'epoch')}, batch "
            f"{batch_size}"
        )
    pairs = [_prepare(*pair, standardize, device) for pair in features]
    train, test = pairs[0]
    if len(train) < 2:
        raise UserError("linear probe: expected at least 2 training images, got 1")
    labels = as_labels(train_labels, len(train), "linear probe, training").to(train.device)
    targets = as_labels(test_labels, len(test), "linear probe, test").to(train.device)
    classes = int(torch.maximum(labels.max(), targets.max())) + 1

    generator = torch.Generator().manual_seed(seed)
    kept, chosen = (index.to(train.device) for index in hold_out(len(train), seed, generator=generator))
    validation = []
    state = generator.get_state()
    for rows, _ in pairs:
        generator.set_state(state)
        heads = train_heads(rows[kept], labels[kept], classes, rates, epochs, batch_size, generator, advance)
        accuracies = heads_accuracy(heads, rows[chosen], labels[chosen])
        validation.append(dict(zip(rates, accuracies, strict=True)))
    settings = [(number, rate) for number in range(len(pairs)) for rate in rates]
    feature, best = max(settings, key=lambda setting: validation[setting[0]][setting[1]])

    train, test = pairs[feature]
    curves: dict[str, list[float]] = {"train": [], "test": []}

    def record(heads: Tensor) -> None:
        curves["train"] += heads_accuracy(heads, train, labels)
        curves["test"] += heads_accuracy(heads, test, targets)

    head = train_heads(train, labels, classes, [best], epochs, batch_size, generator, advance, record)
    scores = torch.cat([logits(head, rows)[:, 0] for rows in test.split(4096)])
    at_edge = is_at_edge(rates, best)
    found = validation[feature]
    probe = LinearProbe(curves["test"][-1], best, found[best], found, at_edge, epochs, batch_size)
    return _Fit(probe, feature, validation, curves, scores)


def _prepare(
    train: Tensor, test: Tensor, standardize: bool, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Return the checked float32 rows of both splits on the device of the computation."""
    train = check_features(train, "linear probe, training")
    test = check_features(test, "linear probe, test", train.shape[1])
    device = torch.device(device) if device is not None else train.device
    train, test = (rows.to(device=device, dtype=torch.float32) for rows in (train, test))
    return standardized(train, test) if standardize else (train, test)


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    advance: Callable[[int], object] = lambda epochs: None,
    after_epoch: Callable[[Tensor], object] = lambda heads: None,
) -> Tensor:
    """Return one linear head per learning rate, trained on the same batches, as one tensor (D + 1, R, K).

    The last row holds the biases. One tensor holds all heads, so that a step needs only two matrix products.
    The gradient of the mean cross entropy with respect to the logits is (softmax - one hot) / B. During
    training, the first dimension is that of the classes. On a CPU, torch's softmax over ten classes takes 20
    times as long over the last dimension. This is the time of a matrix product with 500 features.

    Args:
        features: float32 (N, D).
        labels: int64 (N,).
        classes: K.
        learning_rates: R initial learning rates.
        epochs, batch_size: settings of the training.
        generator: generator for the order of the rows.
        advance: called with 1 after each epoch.
        after_epoch: called with the heads after each epoch.
    """
    rows, width = features.shape
    weights = features.new_zeros(classes, len(learning_rates), width)
    biases = features.new_zeros(classes, len(learning_rates), 1)
    velocity, bias_velocity = torch.zeros_like(weights), torch.zeros_like(biases)
    buffer = features.new_empty(min(batch_size, rows), width)  # new memory pages would cost a tenth of a step
    rates = torch.tensor(learning_rates, device=features.device, dtype=features.dtype)[None, :, None]
    steps_in_epoch = math.ceil(rows / batch_size)
    step, steps = 0, epochs * steps_in_epoch
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator).to(features.device)
        for index in order.split(batch_size):
            batch = torch.index_select(features, 0, index, out=buffer[: len(index)])
            scores = torch.addmm(biases.view(-1, 1), weights.view(-1, width), batch.T)
            error = scores.view(classes, -1, len(index)).softmax(dim=0)
            target = labels[index].expand(1, len(learning_rates), -1)
            error.scatter_add_(0, target, error.new_full(target.shape, -1.0))
            error /= len(index)
            # The product of the gradient also multiplies the velocity by the momentum and adds it.
            velocity.view(-1, width).addmm_(error.flatten(0, 1), batch, beta=MOMENTUM)
            bias_velocity.mul_(MOMENTUM).add_(error.sum(dim=2, keepdim=True))
            factor = cosine_factor(step, steps)
            weights.addcmul_(velocity, rates * factor, value=-1)
            biases.addcmul_(bias_velocity, rates * factor, value=-1)
            step += 1
        heads = torch.cat([weights, biases], dim=2).permute(2, 1, 0).contiguous()
        after_epoch(heads)
        advance(1)
    return heads


def logits(heads: Tensor, features: Tensor) -> Tensor:
    """Return the logits (B, R, K) for heads (D + 1, R, K) and features (B, D)."""
    width = features.shape[1]
    return torch.addmm(heads[-1].flatten(), features, heads[:-1].view(width, -1)).view(
        len(features), *heads.shape[1:]
    )


def heads_accuracy(heads: Tensor, features: Tensor, labels: Tensor) -> list[float]:
    """Return the accuracy of each head, R numbers in [0, 1]."""
    right = torch.zeros(heads.shape[1], dtype=torch.long, device=features.device)
    for rows, targets in zip(features.split(4096), labels.split(4096), strict=True):
        right += is_right(logits(heads, rows), targets[:, None]).sum(dim=0)
    return (right.cpu().double() / len(labels)).tolist()
