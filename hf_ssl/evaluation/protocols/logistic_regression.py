# SPDX-License-Identifier: Apache-2.0
"""Logistic regression: L-BFGS finds the best linear classifier for each of many penalties."""

from dataclasses import asdict, dataclass, field

from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.inputs import Inputs, hold_out
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import is_right, swept_result
from hf_ssl.evaluation.softmax_regression import Problem
from hf_ssl.evaluation.statistics import float64_device, standardized

VERSION = 1
STRENGTHS = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))


@dataclass
class Config:
    """Settings.

    Attributes:
        strengths: values of C, the weight of the summed cross entropy against the penalty |W|^2 / 2.
        iterations: largest number of iterations of L-BFGS for each C.
        standardize: whether each feature is first scaled to standard deviation 1 over the training images.
    """

    strengths: list[float] = field(default_factory=lambda: list(STRENGTHS))
    iterations: int = 300
    standardize: bool = False

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        strengths = list(self.strengths)
        check_values(
            where,
            ("strengths", strengths, are_positive(strengths), "one or more positive numbers"),
            ("iterations", self.iterations, self.iterations > 0, "a positive number"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of softmax regression with the selected C.

    The selected C has the highest accuracy on held-out 10 % of the training images. Of equal values,
    the smallest is selected. The final classifier is trained on all training images.

    Raises:
        UserError: there are too few training images for a selection.

    Source: DINOv2 (2304.07193), `dinov2/eval/log_regression.py`: 45 values of C from 1e-6 to 1e5, features
    as the encoder returns them, 10 % of the training images for the selection. Differences: the solver is our
    own, and each C starts from the solution of the previous one. It has at most 300 iterations instead of
    1,000, and usually needs about 10.
    """
    train, test = inputs.train, inputs.test
    device = float64_device(inputs.device)
    rows, labels = train.features.to(device), train.labels.to(device)
    queries = test.features.to(device)
    if config.standardize:
        rows, queries = standardized(rows, queries, center=False)
    kept, chosen = (index.to(device) for index in hold_out(len(train), inputs.seed))
    if len(labels[kept].unique()) < 2:
        raise UserError(
            f"logistic regression: expected at least 2 classes in {len(kept)} training images without the "
            "held-out images, got 1; add images"
        )
    problem = Problem(rows, labels, inputs.classes)
    strengths = sorted(set(config.strengths))
    with inputs.progress("logistic regression", len(strengths) + 1, "fit") as bar:
        solutions = problem.subset(kept).solve(strengths, iterations=config.iterations, advance=bar.update)
        validation = [
            int(is_right(problem.scores(solution, rows[chosen]), labels[chosen]).sum()) / len(chosen)
            for solution in solutions
        ]
        best = max(range(len(strengths)), key=lambda number: validation[number])
        (final,) = problem.solve(
            [strengths[best]],
            iterations=config.iterations,
            start=solutions[best].weights,
            advance=bar.update,
        )
    state = "standardized" if config.standardize else "not standardized"
    return [
        swept_result(
            inputs,
            "logistic_regression",
            VERSION,
            asdict(config) | {"seed": inputs.seed},
            problem.scores(final, queries),
            key="logistic_regression",
            title="Logistic regression accuracy",
            column="logistic regression",
            method=f"softmax regression on frozen features, {state}, by L-BFGS with the penalty "
            "|W|^2 / (2 C)",
            setting="C",
            values=strengths,
            validation=validation,
            best=best,
            selection={"C": final.strength},
            details={"converged": final.converged, "loss": final.loss},
        )
    ]
