# SPDX-License-Identifier: Apache-2.0
"""Softmax regression with a penalty on the squares of the weights, solved by L-BFGS on any device.

Legend: N images, A coordinates, K classes, P classes that have training images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ssl.evaluation.statistics import principal_axes, row_chunks

TOLERANCE = 1e-5
_CHUNK = 1 << 24  # logits in a chunk


class Solution(NamedTuple):
    """A classifier.

    Attributes:
        strength: the C of scikit-learn.
        weights: (A + 1, P) float32 for the coordinates of `Problem`; the last row holds the biases.
        loss: the value of the objective of `Problem`.
        converged: whether the solver stopped before its largest number of iterations.
    """

    strength: float
    weights: Tensor
    loss: float
    converged: bool


class Problem:
    """Softmax regression for labeled features.

    The objective is that of scikit-learn's `LogisticRegression`, divided by N times its C: the mean cross
    entropy + |W|^2 / (2 N C). The biases have no penalty.

    The features are centered and rotated to their principal axes, which does not change the best classifier
    (`principal_axes`). There, a scale of each coordinate makes the curvature of the objective almost equal
    in all directions. L-BFGS then needs few iterations, also for features with very different variances.

    Args:
        features, labels: (N, D) and (N,) on the device of the computation, which must have float64.
        classes: K.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        self.axes = principal_axes(features)
        self.classes = classes
        # A class without images has no best bias: a lower one is always better.
        self.present = labels.unique()
        self.labels = torch.searchsorted(self.present, labels)
        self.rows_NA = self._project(features)
        self.variances = (self.axes.squares / len(features)).float()

    def subset(self, rows: Tensor) -> "Problem":
        """Return the problem of some images, with the same coordinates."""
        other = object.__new__(Problem)
        other.axes, other.variances = self.axes, self.variances
        other.classes, other.present = self.classes, self.present
        other.labels, other.rows_NA = self.labels[rows], self.rows_NA[rows]
        return other

    def _project(self, features: Tensor) -> Tensor:
        return torch.cat([self.axes.project(part).float() for part in row_chunks(features)])

    def scores(self, solution: Solution, features: Tensor) -> Tensor:
        """Return the logits (N, K) of features (N, D), which are -inf for classes without training images."""
        scores = features.new_full((len(features), self.classes), -torch.inf, dtype=torch.float32)
        scores[:, self.present] = logits(solution.weights, self._project(features))
        return scores

    def solve(
        self,
        strengths: Sequence[float],
        *,
        iterations: int = 100,
        start: Tensor | None = None,
        advance: Callable[[int], object] = lambda steps: None,
    ) -> list[Solution]:
        """Return the best classifier for each C, in ascending order. Each one starts from the one before.

        Args:
            strengths: values of C.
            iterations: largest number of iterations for each C.
            start: first weights; None: zeros.
            advance: called with 1 after each C.
        """
        found: list[Solution] = []
        shape = (self.rows_NA.shape[1] + 1, len(self.present))
        weights = self.rows_NA.new_zeros(shape) if start is None else start
        for strength in sorted(strengths):
            found.append(self._solve(strength, weights, iterations))
            weights = found[-1].weights
            advance(1)
        return found

    def _solve(self, strength: float, start: Tensor, iterations: int) -> Solution:
        penalty = 1 / (strength * len(self.labels))
        classes = len(self.present)
        curvature = max(1 / classes * (1 - 1 / classes), 1e-3)
        scale = (curvature * self.variances + penalty).rsqrt()
        scale = torch.cat([scale, scale.new_full((1,), curvature**-0.5)])[:, None]
        scaled = (start / scale).requires_grad_()
        solver = torch.optim.LBFGS(
            [scaled],
            max_iter=iterations,
            max_eval=2 * iterations,
            tolerance_grad=TOLERANCE,
            tolerance_change=1e-9,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective() -> Tensor:
            loss, gradient = self.objective(scaled * scale, strength)
            scaled.grad = gradient * scale
            return loss

        solver.step(objective)
        weights = scaled.detach() * scale
        loss, gradient = self.objective(weights, strength)
        state = solver.state[scaled]
        stopped = state["n_iter"] < iterations and state["func_evals"] < 2 * iterations
        converged = stopped or float((gradient * scale).abs().max()) <= TOLERANCE
        return Solution(strength, weights, float(loss), converged)

    def objective(self, weights: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Return the objective (float64) and its gradient (A + 1, P) for weights (A + 1, P)."""
        images = len(self.labels)
        gradient = torch.zeros_like(weights)
        total = torch.zeros((), dtype=torch.float64, device=weights.device)
        at_once = max(1, _CHUNK // len(self.present))
        for rows, labels in zip(self.rows_NA.split(at_once), self.labels.split(at_once), strict=True):
            log_probabilities = logits(weights, rows).log_softmax(dim=1)
            total -= log_probabilities.gather(1, labels[:, None]).sum(dtype=torch.float64)
            error = log_probabilities.exp_()
            error.scatter_add_(1, labels[:, None], error.new_full((len(labels), 1), -1.0))
            gradient[:-1].addmm_(rows.T, error)
            gradient[-1] += error.sum(dim=0)
        penalty = 1 / (strength * images)
        gradient /= images
        gradient[:-1] += penalty * weights[:-1]
        return total / images + penalty / 2 * weights[:-1].double().square().sum(), gradient


def logits(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the logits (N, P) of weights (A + 1, P), whose last row holds the biases, for rows (N, A)."""
    return torch.addmm(weights[-1], rows, weights[:-1])
