# SPDX-License-Identifier: Apache-2.0
"""Linear probe, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import evaluate

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import LEARNING_RATES
from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.protocols.linear import linear_probe
from hf_ssl.metrics.options import WithOptions

_DESCRIPTION = """\
Accuracy of a linear classifier (softmax regression) that SGD trains on frozen features. The learning rate
with the best accuracy on 10 % of the training images is used; the classifier is then trained on all of them.
"""

_INPUTS = """\
Args:
    predictions: features (N, D) of the test images.
    references: their class numbers (N,).
    train_features, train_labels: the training images, (M, D) and (M,). Required.
    learning_rates: tested learning rates (default: 13 rates, 0.0001 to 100).
    epochs, batch_size: of the training (default: 100 and 256).
    standardize: whether each feature is first scaled to mean 0 and deviation 1 (default: no).
    seed: of the held-out images and of the order (default: 0).
Returns:
    linear_probe_accuracy: in [0, 1].
    learning_rate: the selected one.
Examples:
    >>> train = {"train_features": [[0.0, 1.0], [1.0, 0.0]] * 8, "train_labels": [0, 1] * 8}
    >>> metric = hf_ssl.load_metric("linear_probe", learning_rates=[1.0], epochs=5, **train)
    >>> metric.compute(predictions=[[0, 2], [2, 0]], references=[0, 1])
    {'linear_probe_accuracy': 1.0, 'learning_rate': 1.0}
"""

_CITATION = """\
@inproceedings{kolesnikov2019revisiting,
  title = {Revisiting Self-Supervised Visual Representation Learning},
  author = {Kolesnikov, Alexander and Zhai, Xiaohua and Beyer, Lucas},
  booktitle = {CVPR},
  year = {2019}
}
"""


class LinearProbe(WithOptions, evaluate.Metric):
    """Linear probe; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "https://arxiv.org/abs/1901.09005")

    def measure(
        self,
        predictions: Any,
        references: Any,
        *,
        train_features: Any = None,
        train_labels: Any = None,
        learning_rates: Any = LEARNING_RATES,
        epochs: int = 100,
        batch_size: int = 256,
        standardize: bool = False,
        seed: int = 0,
    ) -> dict[str, float]:
        if train_features is None or train_labels is None:
            missing = " and ".join(
                name
                for name, value in (("train_features", train_features), ("train_labels", train_labels))
                if value is None
            )
            raise UserError(
                f"linear_probe: expected train_features and train_labels, got no {missing}; give them to "
                "load_metric or to compute"
            )
        found = linear_probe(
            train_features,
            train_labels,
            check_features(predictions, "linear_probe: predictions"),
            references,
            learning_rates=learning_rates,
            epochs=epochs,
            batch_size=batch_size,
            standardize=standardize,
            seed=seed,
        )
        return {"linear_probe_accuracy": found.accuracy, "learning_rate": found.learning_rate}
