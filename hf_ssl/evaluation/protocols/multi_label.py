# SPDX-License-Identifier: Apache-2.0
"""Mean average precision of one logistic regression for each class, for images with several labels.

Legend: N images, D features, K classes.
"""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation.average_precision import mean_average_precision
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs, hold_out
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import by_setting, metric_words, precision_result
from hf_ssl.evaluation.statistics import standardized

VERSION = 1
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001, 0.00001)


@dataclass
class Config:
    """Settings.

    Attributes:
        penalties: factors of half the squared norm of the weights, added to the mean cross entropy.
        iterations: largest number of steps of L-BFGS for each penalty.
    """

    penalties: list[float] = field(default_factory=lambda: list(PENALTIES))
    iterations: int = 200

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        penalties = list(self.penalties)
        check_values(
            where,
            ("penalties", penalties, are_positive(penalties), "one or more positive numbers"),
            ("iterations", self.iterations, self.iterations > 0, "a positive number"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the 11-point mean average precision on the test images.

    The penalty has the highest precision on held-out training images. The standard error is that of a
    bootstrap over test images.
    """
    train, test = inputs.train, inputs.test
    both = standardized(train.features, test.features)
    features, queries = (rows.to(inputs.device, torch.float32) for rows in both)
    labels = train.labels.to(inputs.device)
    kept, chosen = (rows.to(inputs.device) for rows in hold_out(len(train), inputs.seed))
    if not bool((labels[chosen] == 1).any()) or not bool((labels[kept] == 1).any()):
        raise UserError("multi_label: expected labels in both parts of the training images; add images")
    penalties = sorted(set(config.penalties), reverse=True)
    with inputs.progress("multi-label probe", len(penalties) + 1, "penalty") as bar:
        validation = {}
        heads = features.new_zeros(features.shape[1] + 1, labels.shape[1])
        for penalty in penalties:  # from strong to weak: each solution is the start of the next one
            heads = fit(features[kept], labels[kept], penalty, config.iterations, heads)
            scores = features[chosen] @ heads[:-1] + heads[-1]
            validation[penalty] = mean_average_precision(scores, labels[chosen])
            bar.update(1)
        best = max(penalties, key=lambda penalty: validation[penalty])
        heads = fit(features, labels, best, config.iterations)
        bar.update(1)
    scores = (queries @ heads[:-1] + heads[-1]).cpu()
    return [
        precision_result(
            "multi_label",
            VERSION,
            asdict(config) | {"seed": inputs.seed},
            scores,
            test.labels,
            seed=inputs.seed,
            key="mean_average_precision",
            title="Mean average precision",
            column="mAP, several labels",
            text=f"{metric_words(test.labels)} of one logistic regression for each class on frozen, "
            f"standardized features, trained with L-BFGS. The penalty {best:g} was the best of "
            f"{len(penalties)} on a held-out {SELECTED_ON}. The final classifiers were trained on {train} "
            f"and tested on {test}",
            selection={"penalty": best},
            selected_on=SELECTED_ON,
            details={"validation": by_setting(validation)},
        )
    ]


def fit(
    features: Tensor, labels: Tensor, penalty: float, iterations: int, start: Tensor | None = None
) -> Tensor:
    """Return logistic regressions, one for each class (D + 1, K). The last row holds the biases.

    Args:
        features: (N, D) float32.
        labels: (N, K), 1 or 0; -1: the image does not count for this class.
        penalty: factor of half the squared norm of the weights, without the biases.
        iterations: largest number of steps.
        start: initial weights; None: zeros.
    """
    size = (features.shape[1] + 1, labels.shape[1])
    with torch.enable_grad():
        heads = (features.new_zeros(size) if start is None else start.clone()).requires_grad_()
        counted, targets = (labels >= 0).to(features.dtype), labels.clamp_min(0).to(features.dtype)
        optimizer = torch.optim.LBFGS([heads], max_iter=iterations, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = features @ heads[:-1] + heads[-1]
            entropy = F.binary_cross_entropy_with_logits(logits, targets, weight=counted, reduction="sum")
            value = entropy / len(features) + penalty / 2 * heads[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    return heads.detach()
