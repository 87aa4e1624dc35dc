# SPDX-License-Identifier: Apache-2.0
"""What all modules share: options that are given when a module is loaded, and the call by a Trainer."""

import inspect
from collections.abc import Callable
from typing import Any

import evaluate

from hf_ssl.errors import UserError, check_keys


class WithOptions:
    """Base of the modules, beside a class of the `evaluate` library. It is not a module itself.

    A subclass defines `measure(predictions, references, *, option=default, ...)`, which returns a dict of
    numbers.
    """

    measure: Callable[..., dict[str, float]]

    def __init__(self, *args: Any, **arguments: Any) -> None:
        """Keep the options of `measure`. The other arguments are those of `evaluate.EvaluationModule`."""
        own = inspect.signature(evaluate.EvaluationModule.__init__).parameters
        self.options = {key: value for key, value in arguments.items() if key not in own}
        self._check(self.options)
        super().__init__(*args, **{key: value for key, value in arguments.items() if key in own})

    def _check(self, options: dict[str, Any]) -> None:
        parameters = inspect.signature(self.measure).parameters.values()
        known = [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]
        check_keys(options, known, type(self).__name__)

    def _compute(self, predictions: Any, references: Any = None, **options: Any) -> dict[str, float]:
        """Return the numbers for all collected rows; the library calls this method."""
        self._check(options)
        inputs = {"predictions": predictions} | ({} if references is None else {"references": references})
        return self.measure(**inputs, **(self.options | options))

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Return the numbers for the predictions of a Trainer, an `EvalPrediction`.

        If the model returns several outputs, the first one is evaluated: logits or features.

        Raises:
            UserError: the metric needs labels, and the Trainer found none.
        """
        module: Any = self
        outputs = prediction.predictions
        inputs = {"predictions": outputs[0] if isinstance(outputs, tuple) else outputs}
        if "references" in module._feature_names():
            if prediction.label_ids is None:
                raise UserError(
                    f"{type(self).__name__}: expected labels, got none from the Trainer; set label_names"
                )
            inputs["references"] = prediction.label_ids
        return module.compute(**inputs)
