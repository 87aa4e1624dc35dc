# SPDX-License-Identifier: Apache-2.0
"""MLP probe: the accuracy of a classifier with one hidden layer on frozen features.

Legend: N training images, B images in a step, D features, H hidden units, K classes, R learning rates trained
simultaneously.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.config import MOMENTUM, are_positive
from hf_ssl.evaluation.inputs import Inputs, hold_out
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import is_right, swept_result
from hf_ssl.evaluation.statistics import standardized
from hf_ssl.modeling.configuration import cosine_factor

VERSION = 1
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_EPSILON = 1e-5


@dataclass
class Config:
    """Settings.

    Attributes:
        hidden_size: number of hidden units.
        learning_rates: initial learning rates for this batch size, which are trained simultaneously.
        epochs, batch_size: of the training.
        standardize: whether each feature is first scaled to mean 0 and standard deviation 1 over the
            training images.
    """

    hidden_size: int = 512
    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))
    epochs: int = 20
    batch_size: int = 256
    standardize: bool = True

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        rates, positive = list(self.learning_rates), "a positive number"
        check_values(
            where,
            ("hidden_size", self.hidden_size, self.hidden_size > 0, positive),
            ("learning_rates", rates, are_positive(rates), "one or more positive numbers"),
            ("epochs", self.epochs, self.epochs > 0, positive),
            ("batch_size", self.batch_size, self.batch_size > 1, "at least 2, which BatchNorm needs"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of a linear layer, BatchNorm, ReLU and a linear layer, trained by SGD.

    All learning rates are trained simultaneously on 90 % of the training images. The best one on the other
    10 % is trained again on all training images. The test images are used once, at the end.

    Raises:
        UserError: there are too few training images.

    Source: the layers are those of AMDIM (1906.00910, `MLPClassifier` of its code, whose default is also 512
    units). Its encoder ends with BatchNorm, which standardizes the features. BatchNorm makes the hidden layer
    independent of the scale of the features, so the same learning rates suit all encoders. Differences: no
    dropout, and SGD as in the linear probe.
    """
    train, test, device = inputs.train, inputs.test, inputs.device
    if len(train) < 4:
        raise UserError(f"MLP probe: expected at least 4 training images, got {len(train)}; add images")
    rows, labels = train.features.to(device), train.labels.to(device)
    queries = test.features.to(device)
    if config.standardize:
        rows, queries = standardized(rows, queries)
    kept, chosen = (index.to(device) for index in hold_out(len(train), inputs.seed))
    rates = sorted(set(config.learning_rates))
    generator = torch.Generator().manual_seed(inputs.seed)
    settings = (config.hidden_size, config.epochs, config.batch_size, generator)
    with inputs.progress("MLP probe", 2 * config.epochs, "epoch") as bar:  # of the sweep, and of the best
        probes = train_probes(rows[kept], labels[kept], inputs.classes, rates, *settings, bar.update)
        right = is_right(probes.logits(rows[chosen]), labels[chosen])
        validation = right.double().mean(dim=1).tolist()
        best = max(range(len(rates)), key=lambda number: validation[number])
        final = train_probes(rows, labels, inputs.classes, [rates[best]], *settings, bar.update)
        scores = final.logits(queries)[0]
    state = "standardized" if config.standardize else "not standardized"
    return [
        swept_result(
            inputs,
            "mlp",
            VERSION,
            asdict(config) | {"seed": inputs.seed},
            scores,
            key="mlp_probe",
            title="MLP probe accuracy",
            column="MLP probe",
            method=f"classifier with {counted(config.hidden_size, 'hidden unit')}, BatchNorm and ReLU on "
            f"frozen features, {state}, without augmentation. Optimizer: SGD, momentum {MOMENTUM:g}, no "
            f"weight decay, {counted(config.epochs, 'epoch')}, batch size "
            f"{config.batch_size}, cosine schedule",
            setting="The learning rate",
            values=rates,
            validation=validation,
            best=best,
            selection={"learning_rate": rates[best]},
        )
    ]


class Probes:
    """R classifiers with one hidden layer, which differ only in their learning rates.

    Attributes:
        parameters: the weights (R, D, H) of the hidden layer, the gains and the biases (R, 1, H) of
            BatchNorm, and the weights (R, H, K) and the biases (R, 1, K) of the last layer.
        mean, variance: (R, 1, H), the moving averages of BatchNorm with momentum 0.1.
    """

    def __init__(self, rates: int, sizes: tuple[int, int, int], generator: torch.Generator) -> None:
        width, hidden, classes = sizes

        def uniform(rows: int, columns: int, inputs: int) -> Tensor:  # the initialization of nn.Linear
            values = torch.rand(rows, columns, generator=generator) * 2 - 1
            return (values / inputs**0.5).repeat(rates, 1, 1)

        one = torch.ones(rates, 1, hidden)
        first, last = uniform(width, hidden, width), uniform(hidden, classes, hidden)
        self.parameters = [first, one, torch.zeros_like(one), last, uniform(1, classes, hidden)]
        self.mean, self.variance = torch.zeros_like(one), one.clone()

    def to(self, device: torch.device) -> "Probes":
        """Move the classifiers to a device, and return them."""
        self.parameters = [each.to(device).requires_grad_() for each in self.parameters]
        self.mean, self.variance = self.mean.to(device), self.variance.to(device)
        return self

    def forward(self, rows: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
        """Return the logits (R, B, K) of rows (B, D). The default statistics are those of the batch."""
        first, gain, bias, last, last_bias = self.parameters
        hidden = torch.matmul(rows, first)
        if mean is None or variance is None:
            variance, mean = torch.var_mean(hidden, dim=1, correction=0, keepdim=True)
            unbiased = len(rows) / (len(rows) - 1)
            self.mean.lerp_(mean.detach(), 0.1)
            self.variance.lerp_(variance.detach() * unbiased, 0.1)
        scale = gain * (variance + _EPSILON).rsqrt()
        hidden = torch.addcmul(bias - mean * scale, hidden, scale).relu()
        return torch.baddbmm(last_bias, hidden, last)

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits (R, N, K) of rows (N, D) in evaluation mode."""
        return torch.cat([self.forward(part, self.mean, self.variance) for part in rows.split(4096)], dim=1)


def train_probes(
    features: Tensor,
    labels: Tensor,
    classes: int,
    learning_rates: Sequence[float],
    hidden_size: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    advance: Callable[[int], object] = lambda epochs: None,
) -> Probes:
    """Return one classifier per learning rate, all with the same first weights and the same batches.

    A step needs one batched product per layer for all learning rates. A last batch of one image is omitted,
    because BatchNorm needs two.

    Args:
        features: float32 (N, D), N >= 2.
        labels: int64 (N,).
        classes: K.
        learning_rates: R initial learning rates. They decay to zero by a cosine over the steps.
        hidden_size, epochs, batch_size: settings.
        generator: generator for the first weights and the order of the rows.
        advance: called with 1 after each epoch.
    """
    sizes = (features.shape[1], hidden_size, classes)
    probes = Probes(len(learning_rates), sizes, generator).to(features.device)
    parameters = probes.parameters
    velocities = [torch.zeros_like(each) for each in parameters]
    rates = torch.tensor(learning_rates, device=features.device)[:, None, None]
    per_epoch = math.ceil(len(features) / batch_size)
    step, steps = 0, epochs * per_epoch
    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for index in order.split(batch_size):
            if len(index) > 1:
                logits = probes.forward(features.index_select(0, index))
                target = labels[index].repeat(len(learning_rates))
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum")
                gradients = torch.autograd.grad(loss / len(index), parameters)
                now = rates * cosine_factor(step, steps)
                with torch.no_grad():
                    for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                        velocity.mul_(MOMENTUM).add_(gradient)
                        parameter.sub_(velocity * now)
            step += 1
        advance(1)
    return probes
