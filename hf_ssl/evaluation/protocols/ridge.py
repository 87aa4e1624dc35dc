# SPDX-License-Identifier: Apache-2.0
"""Ridge regression: a linear classifier in closed form, whose penalty is selected by leave-one-out.

Legend: N training images, A principal axes, K classes, L penalties.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hf_ssl.errors import check_values
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import swept_result
from hf_ssl.evaluation.statistics import Axes, float64_device, principal_axes, row_chunks

VERSION = 1
PENALTIES = tuple(10.0 ** (step / 2) for step in range(-16, 7))  # half-decades from 1e-8 to 1e3


@dataclass
class Config:
    """Settings.

    Attributes:
        penalties: values of lambda, relative to the mean over all features of their summed squares. The same
            values then fit features of any scale and any number of images.
    """

    penalties: list[float] = field(default_factory=lambda: list(PENALTIES))

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        penalties = list(self.penalties)
        check_values(where, ("penalties", penalties, are_positive(penalties), "one or more positive numbers"))


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of ridge regression to one-hot targets.

    The selected lambda has the highest leave-one-out accuracy. If several values have it, the largest is
    selected. The predicted class has the highest output. This is the prediction of scikit-learn's
    `RidgeClassifier`, whose targets are 2 * one-hot - 1.
    """
    train, test = inputs.train, inputs.test
    device = float64_device(inputs.device)
    labels = train.labels.to(device)
    with inputs.progress("ridge regression"):
        fit = RidgeFit.of(train.features.to(device), labels, inputs.classes)
        relative = sorted(set(config.penalties))
        unit = float(fit.axes.squares.sum()) / train.features.shape[1]
        unit = unit if unit > 0 else 1.0
        penalties = [value * unit for value in relative]
        validation = fit.leave_one_out_accuracy(train.features.to(device), labels, penalties)
        best = max(range(len(relative)), key=lambda number: (validation[number], number))
        scores = fit.scores(test.features.to(device), penalties[best])
    return [
        swept_result(
            inputs,
            "ridge",
            VERSION,
            asdict(config),
            scores,
            key="ridge",
            title="Ridge regression accuracy",
            column="ridge regression",
            method="ridge regression of one-hot classes on frozen features, in closed form",
            setting="The penalty lambda",
            values=relative,
            validation=validation,
            best=best,
            selected_on="all training images by leave-one-out",
            selection={"lambda": penalties[best]},
            unit=" times the mean summed square of a feature",
            details={"relative_lambda": relative[best]},
        )
    ]


class RidgeFit(NamedTuple):
    """Ridge regression with an intercept for every penalty, from one eigendecomposition. All is float64.

    Attributes:
        axes: principal axes of the training features.
        targets: (A, K), products of the coordinates and the one-hot targets, summed over the images.
        shares: (K,) share of the images in each class, which are the intercepts.
    """

    axes: Axes
    targets: Tensor
    shares: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> "RidgeFit":
        """Return the fit to features (N, D) and class numbers (N,)."""
        axes = principal_axes(features)
        sums = axes.mean.new_zeros(classes, features.shape[1])
        chunks = row_chunks(features)
        for part, numbers in zip(chunks, labels.split(len(chunks[0])), strict=True):
            sums.index_add_(0, numbers, part.double() - axes.mean)
        return cls(axes, (sums @ axes.axes).T, labels.bincount(minlength=classes).double() / len(labels))

    def scores(self, features: Tensor, penalty: float) -> Tensor:
        """Return the outputs (N, K) for features (N, D)."""
        weights = self.axes.axes @ (self.targets / (self.axes.squares + penalty)[:, None])
        return torch.cat([(part.double() - self.axes.mean) @ weights for part in row_chunks(features)]) + (
            self.shares
        )

    def leave_one_out_accuracy(
        self, features: Tensor, labels: Tensor, penalties: Sequence[float]
    ) -> list[float]:
        """Return the accuracy for each penalty if each training image is predicted by a fit to the others.

        The residual of an image in a fit without it is its residual in the fit to all, divided by 1 - h. The
        leverage h is its diagonal element of the matrix that maps targets to outputs.

        Args:
            features, labels: those of the fit, (N, D) and (N,).
            penalties: L numbers.
        """
        inverse_AL = 1 / (self.axes.squares[:, None] + features.new_tensor(penalties, dtype=torch.float64))
        right = [0] * len(penalties)
        chunks = row_chunks(features)
        for part, numbers in zip(chunks, labels.split(len(chunks[0])), strict=True):
            rows = self.axes.project(part)
            targets = one_hot(numbers, len(self.shares)).double()
            others_NL = (1 - 1 / len(labels) - rows.square() @ inverse_AL).clamp_min(1e-12)
            for number in range(len(penalties)):
                outputs = rows @ (self.targets * inverse_AL[:, number, None]) + self.shares
                without = targets - (targets - outputs) / others_NL[:, number, None]
                right[number] += int((without.argmax(dim=1) == numbers).sum())
        return [count / len(labels) for count in right]
