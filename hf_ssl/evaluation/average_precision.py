# SPDX-License-Identifier: Apache-2.0
"""Mean average precision for images with several labels (layer 1).

Legend: N images, K classes.
"""

from typing import Any

import torch
from torch import Tensor

from hf_ssl.errors import UserError

VOC_POINTS = 11


def average_precisions(scores: Any, labels: Any, points: int | None = VOC_POINTS) -> Tensor:
    """Return the average precision of each class, float64 (K,); NaN for a class without a positive image.

    The images are ranked by the score of the class. Images with equal scores have one rank, so their order
    does not matter (the code of the VOC challenge keeps their order instead).

    Args:
        scores: (N, K), higher for images that show the class.
        labels: (N, K), 1: the image shows the class, 0: it does not, -1: the image is ignored for this class
            (the "difficult" objects of VOC).
        points: 11: the mean of the highest precision at a recall of at least 0, 0.1, ..., 1 (VOC until 2009).
            None: the sum of precision x increase of recall, as scikit-learn computes it.

    Raises:
        UserError: the shapes differ, a score is not finite, or a label is not one of the three numbers.

    Source: Everingham et al., The PASCAL VOC Challenge, 2010, section 4.2 (`VOCevalcls.m` of VOC2007).
    """
    scores, labels = torch.as_tensor(scores).detach().double(), torch.as_tensor(labels)
    if scores.ndim != 2 or labels.shape != scores.shape:
        raise UserError(
            f"average precision: expected scores and labels (N, K), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}; use one column for each class"
        )
    if not bool(torch.isfinite(scores).all()):
        raise UserError("average precision: expected finite scores, got NaN or infinite")
    if not bool(((labels == 0) | (labels == 1) | (labels == -1)).all()):
        raise UserError("average precision: expected labels 1, 0 or -1 (ignored), got other numbers")
    if points is not None and points < 2:
        raise UserError(f"average precision: expected at least 2 points, got {points}; use 11 or None")
    columns = [_average_precision(*pair, points) for pair in zip(scores.T, labels.T.long(), strict=True)]
    return torch.tensor(columns, dtype=torch.float64)


def mean_average_precision(scores: Any, labels: Any, points: int | None = VOC_POINTS) -> float:
    """Return the mean of `average_precisions` over the classes with a positive image.

    Raises:
        UserError: no class has a positive image, or `average_precisions` raises.
    """
    values = average_precisions(scores, labels, points)
    present = values[~values.isnan()]
    if not len(present):
        raise UserError("average precision: expected an image with a label, got none; use another split")
    return float(present.mean())


def _average_precision(scores_N: Tensor, labels_N: Tensor, points: int | None) -> float:
    counted = labels_N >= 0
    scores_N, labels_N = scores_N[counted], labels_N[counted]
    positives = int(labels_N.sum())
    if positives == 0:
        return float("nan")
    order = scores_N.argsort(descending=True, stable=True)
    ranked, hits = scores_N[order], labels_N[order].cumsum(0)
    # The last image of each group of equal scores: only there, a threshold can lie.
    ends = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool, device=ranked.device)])
    found = hits[ends]
    precision = found.double() / (torch.nonzero(ends)[:, 0] + 1)
    if points is None:
        gained = torch.diff(found, prepend=found.new_zeros(1)).double() / positives
        return float((gained * precision).sum())
    best = precision.flip(0).cummax(0).values.flip(0)  # highest precision at this or a higher recall
    # Recall >= i / (points - 1), in whole numbers, because 0.1 * 3 is larger than 0.3 in floating point.
    steps = torch.arange(points, device=found.device)
    first = torch.searchsorted(found * (points - 1), steps * positives)
    return float(best[first].mean())
