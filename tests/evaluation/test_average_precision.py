# SPDX-License-Identifier: Apache-2.0
"""Mean average precision: the definition of VOC2007 as a loop, scikit-learn, ties, and ignored images."""

import numpy as np
import pytest
import torch
from messages import mentions
from sklearn.metrics import average_precision_score

from hf_ssl.errors import UserError
from hf_ssl.evaluation import average_precisions, mean_average_precision


def voc_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The loop of VOCevalcls.m: sort, cumulate, and take the best precision at each of 11 levels."""
    order = np.argsort(-scores, kind="stable")
    order = order[labels[order] >= 0]
    true_positives = np.cumsum(labels[order] > 0)
    false_positives = np.cumsum(labels[order] == 0)
    recall = true_positives / (labels > 0).sum()
    precision = true_positives / (true_positives + false_positives)
    result = 0.0
    for level in np.arange(11) / 10:
        reached = precision[recall >= level - 1e-12]
        result += (reached.max() if len(reached) else 0) / 11
    return result


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = (random.random((300, 7)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.4]).astype(int)
    return labels + random.normal(size=labels.shape), labels


def test_eleven_points_equal_the_loop_of_voc(data) -> None:
    scores, labels = data
    labels[:, 6][np.random.default_rng(1).random(300) < 0.3] = -1
    expected = [voc_average_precision(scores[:, k], labels[:, k]) for k in range(7)]
    assert average_precisions(scores, labels).tolist() == pytest.approx(expected, abs=1e-12)
    assert mean_average_precision(scores, labels) == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("positives", range(1, 31))
def test_levels_of_recall_are_compared_without_rounding(positives: int) -> None:
    """With 10 or 20 positives, recall 0.3 is one of the levels, and in floating point 0.1 * 3 > 0.3."""
    random = np.random.default_rng(positives)
    labels = np.zeros(60, int)
    labels[:positives] = 1
    scores = random.normal(size=60)
    expected = voc_average_precision(scores, labels)
    assert average_precisions(scores[:, None], labels[:, None]).item() == pytest.approx(expected, abs=1e-12)


def test_the_area_equals_scikit_learn_also_with_ties(data) -> None:
    scores, labels = data
    for rounded in (scores, scores.round(1), np.zeros_like(scores)):
        expected = average_precision_score(labels, rounded, average=None)
        assert average_precisions(rounded, labels, points=None).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_order_of_images_does_not_matter(data) -> None:
    scores, labels = data
    order = np.random.default_rng(2).permutation(300)
    before = average_precisions(scores.round(1), labels)
    assert torch.equal(average_precisions(scores.round(1)[order], labels[order]), before)


def test_closed_forms() -> None:
    right = torch.tensor([[1, 0], [1, 0], [0, 1]])
    assert mean_average_precision(right.float(), right) == 1.0
    # One of two positives on place 1, the other on place 3: 6 levels with precision 1, 5 with 2/3.
    assert average_precisions([[3.0], [2.0], [1.0]], [[1], [0], [1]]).item() == pytest.approx(
        (6 + 5 * 2 / 3) / 11
    )
    # A class without a positive image has no value and does not count.
    values = average_precisions([[3.0, 1.0], [2.0, 0.0]], [[1, 0], [0, -1]])
    assert values[0] == 1 and values[1].isnan()
    assert mean_average_precision([[3.0, 1.0], [2.0, 0.0]], [[1, 0], [0, -1]]) == 1


@pytest.mark.parametrize(
    ("scores", "labels", "points", "parts"),
    [
        ([[1.0], [0.0]], [1, 0], 11, [(2, 1), (2,)]),
        ([[np.nan], [0.0]], [[1], [0]], 11, ["NaN"]),
        ([[1.0], [0.0]], [[2], [0]], 11, [-1]),
        ([[1.0], [0.0]], [[0], [0]], 11, ["label"]),
        ([[1.0], [0.0]], [[1], [0]], 1, [1, 11]),
    ],
)
def test_mistakes_end_in_one_sentence(scores, labels, points, parts) -> None:
    with pytest.raises(UserError, match=mentions("average precision", *parts)):
        mean_average_precision(scores, labels, points)
