# SPDX-License-Identifier: Apache-2.0
"""RankMe, as a module of the `evaluate` library.

The library copies this file, so it imports only installed packages, one in each line.
"""

from typing import Any

import evaluate

from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.statistics import rank_me
from hf_ssl.metrics.options import ROW, WithOptions

_DESCRIPTION = """\
Effective number of dimensions of features: exp of the entropy of the normalized singular values. It needs no
labels. 1 is a collapse.
"""

_INPUTS = """\
Args:
    predictions: features (N, D), neither centered nor normalized.
Returns:
    rank_me: from 1 to about min(N, D).
Examples:
    >>> hf_ssl.load_metric("rank_me").compute(predictions=[[1.0, 0.0], [0.0, 1.0]])
    {'rank_me': 2.0}  # nearly
"""

_CITATION = """\
@inproceedings{garrido2023rankme,
  title = {RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations
           by Their Rank},
  author = {Garrido, Quentin and Balestriero, Randall and Najman, Laurent and LeCun, Yann},
  booktitle = {ICML},
  year = {2023}
}
"""


class RankMe(WithOptions, evaluate.Metric):
    """RankMe; `_INPUTS` describes the arguments."""

    about = (_DESCRIPTION, _INPUTS, _CITATION, "https://arxiv.org/abs/2210.02885")
    layouts = ({"predictions": ROW},)

    def measure(self, predictions: Any) -> dict[str, float]:
        return {"rank_me": rank_me(check_features(predictions, "rank_me: predictions"))}
