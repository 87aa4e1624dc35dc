# SPDX-License-Identifier: Apache-2.0
"""Mean per-class accuracy, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import evaluate
from torch.nn.functional import one_hot

from hf_ssl.evaluation.knn import as_features, as_labels
from hf_ssl.evaluation.scores import class_metrics
from hf_ssl.metrics.options import NUMBER, ROW, WithOptions

_DESCRIPTION = """\
Mean of the accuracies of the classes. Every class has the same weight, however many images it has. This is
the metric of Aircraft, Caltech101, Flowers and Pets.
"""

_INPUTS = """\
Args:
    predictions: predicted class numbers (N,), or scores of the classes (N, K), such as logits.
    references: class numbers (N,).
Returns:
    mean_per_class_accuracy: in [0, 1], over the classes with images.
    top_1, top_5: accuracy over the images; only if scores are given.
Examples:
    >>> metric = hf_ssl.load_metric("mean_per_class_accuracy")
    >>> metric.compute(predictions=[0, 0, 0, 1], references=[0, 0, 1, 1])
    {'mean_per_class_accuracy': 0.75}
"""

_CITATION = """\
@inproceedings{kornblith2019better,
  title = {Do Better ImageNet Models Transfer Better?},
  author = {Kornblith, Simon and Shlens, Jonathon and Le, Quoc V.},
  booktitle = {CVPR},
  year = {2019}
}
"""


class MeanPerClassAccuracy(WithOptions, evaluate.Metric):
    """Mean per-class accuracy; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "https://arxiv.org/abs/1805.08974")
    layouts = ({"predictions": NUMBER, "references": NUMBER}, {"predictions": ROW, "references": NUMBER})

    def measure(self, predictions: Any, references: Any) -> dict[str, float]:
        given = as_features(predictions, "mean_per_class_accuracy: predictions")
        if given.ndim == 1:
            given = as_labels(given, len(given), "mean_per_class_accuracy: predictions")
        labels = as_labels(references, len(given), "mean_per_class_accuracy: references")
        found = class_metrics(one_hot(given) if given.ndim == 1 else given, labels)
        value = {"mean_per_class_accuracy": found["mean_per_class"]}
        return value if given.ndim == 1 else value | {key: found[key] for key in ("top_1", "top_5")}
