# SPDX-License-Identifier: Apache-2.0
"""k-NN accuracy, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import evaluate

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MAIN_KNN
from hf_ssl.evaluation.knn import check_features, knn_accuracy, leave_one_out_knn
from hf_ssl.metrics.options import WithOptions

_DESCRIPTION = """\
Accuracy of weighted k-NN classification. Each of the k training images with the largest cosine votes for its
class with exp(cosine / temperature). Without training images, every image is classified by all others.
"""

_INPUTS = """\
Args:
    predictions: features (N, D) of the images to classify.
    references: their class numbers (N,).
    train_features, train_labels: the images that vote, (M, D) and (M,). Default: leave one out.
    neighbors: k (default: 20).
    temperature: (default: 0.07).
Returns:
    knn_accuracy: in [0, 1].
Examples:
    >>> metric = hf_ssl.load_metric("knn_accuracy", neighbors=1)
    >>> metric.compute(predictions=[[1, 0], [1, 0.1], [0, 1], [0.1, 1]], references=[0, 0, 1, 1])
    {'knn_accuracy': 1.0}
"""

_CITATION = """\
@inproceedings{wu2018unsupervised,
  title = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle = {CVPR},
  year = {2018}
}
"""


class KnnAccuracy(WithOptions, evaluate.Metric):
    """k-NN accuracy; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "https://arxiv.org/abs/1805.01978")

    def measure(
        self,
        predictions: Any,
        references: Any,
        *,
        train_features: Any = None,
        train_labels: Any = None,
        neighbors: int = MAIN_KNN[0],
        temperature: float = MAIN_KNN[1],
    ) -> dict[str, float]:
        rows = check_features(predictions, "knn_accuracy: predictions")
        if (train_features is None) != (train_labels is None):
            given = "train_labels" if train_features is None else "train_features"
            raise UserError(
                f"knn_accuracy: expected train_features and train_labels, got only {given}; give both, or "
                "neither of them to classify each image by all other images"
            )
        if train_features is None:
            value = leave_one_out_knn(rows, references, neighbors=neighbors, temperature=temperature)
        else:
            value = knn_accuracy(
                train_features,
                train_labels,
                rows,
                references,
                neighbors=[neighbors],
                temperatures=[temperature],
            )[neighbors, temperature]
        return {"knn_accuracy": value}
