# SPDX-License-Identifier: Apache-2.0
"""Mean average precision, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import datasets
import evaluate

from hf_ssl.evaluation.average_precision import VOC_POINTS, mean_average_precision
from hf_ssl.evaluation.knn import as_features
from hf_ssl.metrics.options import NUMBER, ROW, WithOptions

_DESCRIPTION = """\
Mean average precision for images with several labels: the mean over the classes of the precision at 11 levels
of recall, as in the classification task of PASCAL VOC 2007.
"""

_INPUTS = """\
Args:
    predictions: scores (N, K), higher for images that show the class.
    references: labels (N, K): 1 yes, 0 no, -1 ignored for this class.
    points: number of levels of recall (default: 11); None: the area below the curve, as in scikit-learn.
Returns:
    mean_average_precision: in [0, 1], over the classes with an image.
Examples:
    >>> metric = hf_ssl.load_metric("mean_average_precision")
    >>> metric.compute(predictions=[[0.9], [0.8], [0.1]], references=[[1], [0], [1]])
    {'mean_average_precision': 0.8484848484848485}
"""

_CITATION = """\
@article{everingham2010pascal,
  title = {The PASCAL Visual Object Classes (VOC) Challenge},
  author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and
            Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  year = {2010}
}
"""


class MeanAveragePrecision(WithOptions, evaluate.Metric):
    """Mean average precision; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "http://host.robots.ox.ac.uk/pascal/VOC/pubs/everingham10.pdf")
    layouts = ({"predictions": ROW, "references": datasets.Sequence(NUMBER)},)

    def measure(
        self, predictions: Any, references: Any, *, points: int | None = VOC_POINTS
    ) -> dict[str, float]:
        scores = as_features(predictions, "mean_average_precision: predictions")
        labels = as_features(references, "mean_average_precision: references")
        return {"mean_average_precision": mean_average_precision(scores, labels, points)}
