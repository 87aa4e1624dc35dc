# SPDX-License-Identifier: Apache-2.0
"""A watch over runs that begin with a trained encoder: is it still as good as it was?"""

import logging
import math
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

KNN = "eval_knn"


class FeatureGuard(TrainerCallback):
    """Compares the monitor's k-NN accuracy with that before the first step.

    Heads are new and disturb the features at first, so that one low measurement says little: two in a row
    count, each more than twice the standard error of both below the start, the second not above the first.

    Args:
        queries: images that the accuracy is measured on.

    Attributes:
        message: what was said last; None while all is well.
    """

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.message: str | None = None

    def on_evaluate(self, args, state, control, metrics: dict[str, Any] | None = None, **kwargs) -> None:
        measured = [(record["step"], record[KNN]) for record in state.log_history if KNN in record]
        self.message = self._judge(measured)
        if self.message is None:
            return
        logger.warning("%s", self.message)
        if args.on_worse == "stop":
            control.should_save = control.should_training_stop = True

    def _judge(self, measured: list[tuple[int, float]]) -> str | None:
        if len(measured) < 3:
            return None
        (_, start), (_, before), (step, now) = measured[0], *measured[-2:]
        error = math.sqrt((start * (1 - start) + now * (1 - now)) / self.queries)
        if max(before, now) >= start - 2 * error or now > before:
            return None
        return (
            f"features have become worse: k-NN accuracy is {now:.3f} at step {step}, it was {start:.3f} "
            "before the first step; lower training.learning_rate, or set training.head_warmup_epochs or "
            "training.layer_decay"
        )
