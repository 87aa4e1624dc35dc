# SPDX-License-Identifier: Apache-2.0
"""LiDAR, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import evaluate

from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.knn import as_labels, check_features
from hf_ssl.evaluation.statistics import lidar
from hf_ssl.metrics.options import WithOptions

_DESCRIPTION = """\
Effective number of dimensions that distinguish images from each other, from the features of several augmented
views of each image. It needs no labels.
"""

_INPUTS = """\
Args:
    predictions: features (N, D) of views.
    references: number of the image (N,) that each view shows. All images have the same number of views.
    delta: number that is added to the diagonal of the covariance of the views (default: 0.0001).
Returns:
    lidar: from 1 to about min(number of images - 1, D).
Examples:
    >>> views = [[0.0, 1.1], [0.0, 0.9], [1.1, 0.0], [0.9, 0.0]]
    >>> hf_ssl.load_metric("lidar").compute(predictions=views, references=[0, 0, 1, 1])
    {'lidar': 1.0}  # nearly: two images differ in one direction
"""

_CITATION = """\
@inproceedings{thilak2024lidar,
  title = {LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures},
  author = {Thilak, Vimal and Huang, Chen and Saremi, Omid and Dinh, Laurent and Goh, Hanlin and
            Nakkiran, Preetum and Susskind, Joshua M. and Littwin, Etai},
  booktitle = {ICLR},
  year = {2024}
}
"""


class Lidar(WithOptions, evaluate.Metric):
    """LiDAR; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "https://arxiv.org/abs/2312.04000")

    def measure(self, predictions: Any, references: Any, *, delta: float = 1e-4) -> dict[str, float]:
        rows = check_features(predictions, "lidar: predictions")
        images = as_labels(references, len(rows), "lidar: references", limit=None)
        if not 1e-10 <= delta <= 1e10:
            raise UserError(f"lidar: expected delta from 1e-10 to 1e10, got {delta}; use 0.0001")
        counts = images.unique(return_counts=True)[1]
        if len(counts) < 2 or int(counts.min()) < 2 or int(counts.min()) != int(counts.max()):
            raise UserError(
                "lidar: expected 2 or more images with the same number of views, at least 2, got "
                f"{counted(len(counts), 'image')} with {int(counts.min())} to {int(counts.max())} views"
            )
        views = rows[images.argsort(stable=True)].view(len(counts), int(counts[0]), -1)
        return {"lidar": lidar(views, delta=delta)}
