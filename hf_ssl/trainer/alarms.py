# SPDX-License-Identifier: Apache-2.0
"""Alarms: read the measurements of the monitor, and detect collapsed or worse features (layer 4)."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from hf_ssl.evaluation.results import standard_error
from hf_ssl.modeling.gather import any_process
from hf_ssl.trainer.arguments import SSLTrainingArguments

logger = logging.getLogger(__name__)

_KNN, _MONITORED = "eval_knn", "eval_embedding_std"


def monitor_records(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the log records of the monitor."""
    return [record for record in log_history if _MONITORED in record]


class Alarm(TrainerCallback):
    """Checks the measurements of the monitor. Warns, or stops the run in all processes.

    Attributes:
        argument: name of the training argument whose value is `warn` or `stop`.
        message: the last message; None if there was none.
    """

    argument: str

    def __init__(self) -> None:
        self.message: str | None = None

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        """Return a message if the last measurements are bad, else None.

        Args:
            history: the log records of the monitor, with `step` and the measurements.
        """
        raise NotImplementedError(f"{type(self).__name__} must define find_problem")

    def on_evaluate(self, args, state, control, metrics: dict[str, Any] | None = None, **kwargs) -> None:
        if _MONITORED not in (metrics or {}):
            return  # `evaluate` measured other images
        message = self.find_problem(monitor_records(state.log_history))
        if any_process(message is not None, args.device):
            self.message = message or "another process reports bad measurements"
            logger.warning("%s", self.message)
            if getattr(args, self.argument) == "stop":
                control.should_save = control.should_training_stop = True

    def last_message(self, log_history: list[dict[str, float]]) -> str | None:
        """Return the last message of the whole run, also of its parts before it resumed; None: no message."""
        history = monitor_records(log_history)
        messages = (self.find_problem(history[:count]) for count in range(len(history), 0, -1))
        return next(filter(None, messages), self.message)

    def stop_reason(self, args: SSLTrainingArguments) -> str | None:
        """Return why the alarm stopped the run, as a sentence; None if it did not."""
        if self.message is None or getattr(args, self.argument) != "stop":
            return None
        return f"{self.message}; the run was stopped (training.{self.argument}=stop)"


class CollapseAlarm(Alarm):
    """Detects collapsed embeddings by a low standard deviation, rank or measurement of the method.

    The embeddings of a new network may be nearly collapsed and recover during training. The alarm is raised
    when two consecutive measurements after the start are low and the second is at most 1.2 times the first.
    A NaN raises the alarm immediately.

    Args:
        minimum: the value below which a measurement is low, by name (`SSLPreTrainedModel.collapsed_below`).
    """

    argument = "on_collapse"

    def __init__(self, minimum: Mapping[str, float]) -> None:
        super().__init__()
        self.minimum = minimum

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        *earlier, last = history
        trained = [record for record in earlier if record["step"] > 0]
        message = None
        for name, minimum in self.minimum.items():
            value, before = last[f"eval_{name}"], trained[-1][f"eval_{name}"] if trained else math.inf
            stays_low = value < minimum and before < minimum and value <= 1.2 * before
            if stays_low or math.isnan(value):
                message = (
                    f"embeddings have collapsed at step {last['step']}: {name} is {value:.3g}, "
                    f"expected at least {minimum:g}"
                )
        return message


class FeatureGuard(Alarm):
    """Compares the k-NN accuracy of a continued run with the accuracy before the first step.

    New heads make the features worse at first, so one low measurement is not evidence. The guard fires when
    two consecutive measurements are more than two standard errors below the initial one. The second must also
    not be better than the first.

    Args:
        queries: number of images on which the accuracy is measured.
        name: name of the k-NN classifier; "" for a single one.
    """

    argument = "on_worse"

    def __init__(self, queries: int, name: str = "") -> None:
        super().__init__()
        self.queries, self.key = queries, f"eval_{name}_knn" if name else _KNN

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        measured = [(record["step"], record[self.key]) for record in history if self.key in record]
        if len(measured) < 3:
            return None
        (_, start), (_, before), (step, now) = measured[0], *measured[-2:]
        error = math.hypot(standard_error(start, self.queries), standard_error(now, self.queries))
        if max(before, now) >= start - 2 * error or now > before:
            return None
        return (
            f"the features are worse than before the first step: k-NN accuracy ({self.key}) is {now:.3f} "
            f"at step {step}, and was {start:.3f}; lower training.learning_rate, or set "
            "training.head_warmup_epochs or training.layer_decay"
        )
