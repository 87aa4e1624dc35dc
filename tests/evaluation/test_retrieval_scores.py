# SPDX-License-Identifier: Apache-2.0
"""Retrieval: average precision and recall at k against a loop and scikit-learn, with ties."""

import numpy as np
import pytest
import torch
from messages import mentions
from sklearn.metrics import average_precision_score

from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_features
from hf_ssl.evaluation import retrieval_scores as module
from hf_ssl.evaluation.retrieval_scores import retrieval_scores


def data(count: int, classes: int, seed: int, tied: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose class is visible, with noise. Tied ones have few different directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    features = torch.eye(classes, 8)[labels] + torch.randn(count, 8, generator=generator)
    # Whole powers of two as norms, so that equal directions have equal cosines in floating point.
    return (torch.eye(8)[features.argmax(1)] if tied else features), labels


def loop(gallery, classes, queries, targets, leave_one_out: bool = False) -> tuple[list[float], list[int]]:
    """Average precision and first rank, one gallery image after the other, as the docstrings define them."""
    gallery, queries = (torch.nn.functional.normalize(each) for each in (gallery, queries))
    precisions, ranks, cosines = [], [], (queries @ gallery.T).tolist()
    for number, cosine in enumerate(cosines):
        others = [row for row in range(len(gallery)) if not (leave_one_out and row == number)]
        relevant = [row for row in others if classes[row] == targets[number]]
        at = [[row for row in others if cosine[row] >= cosine[hit]] for hit in relevant]
        shares = [sum(row in relevant for row in rows) / len(rows) for rows in at]
        precisions.append(sum(shares) / len(shares) if shares else float("nan"))
        best = max((cosine[hit] for hit in relevant), default=0.0)
        wrong = [row for row in others if row not in relevant and cosine[row] >= best]
        ranks.append(1 + len(wrong) if relevant else 0)
    return precisions, ranks


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [40, 2**24])
def test_scores_equal_a_loop_and_scikit_learn(tied: bool, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    gallery, classes = data(60, 4, 0, tied)
    queries, targets = data(21, 5, 1, tied)  # class 4 is not in the gallery
    found = retrieval_scores(gallery, classes, queries, targets)
    precisions, ranks = loop(gallery, classes, queries, targets)
    assert found.average_precision.tolist() == pytest.approx(precisions, nan_ok=True)
    assert found.first_rank.tolist() == ranks and 0 in ranks and max(ranks) > 1
    known = targets < 4
    cosines = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    expected = [
        average_precision_score(classes == target, row)
        for row, target in zip(cosines[known], targets[known], strict=True)
    ]
    assert found.average_precision[known].numpy() == pytest.approx(expected)
    assert found.mean_average_precision() == pytest.approx(np.mean(expected))
    assert found.recall(3) == np.mean([rank <= 3 for rank in ranks if rank])


@pytest.mark.parametrize("tied", [False, True])
def test_an_image_does_not_find_itself(tied: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 70)
    features, labels = data(30, 3, 2, tied)
    labels[7] = 9  # the only image of its class
    found = retrieval_scores(features, labels)
    precisions, ranks = loop(features, labels, features, labels, leave_one_out=True)
    assert found.average_precision.tolist() == pytest.approx(precisions, nan_ok=True)
    assert found.first_rank.tolist() == ranks and ranks[7] == 0


def test_equal_features_find_nothing() -> None:
    """The precision is the share of relevant images, and the other images come first."""
    found = retrieval_scores(torch.ones(10, 4), [0] * 3 + [1] * 7, torch.ones(2, 4), [0, 1])
    assert found.average_precision.tolist() == pytest.approx([0.3, 0.7])
    assert found.first_rank.tolist() == [8, 4]


def test_copies_have_equal_cosines_at_all_places() -> None:
    """A matrix product can round equal rows differently (MKL 2024.2). A collapsed encoder would have hits."""
    generator = torch.Generator().manual_seed(0)
    for images, width in ((7, 513), (33, 37), (257, 513), (1001, 128), (2049, 37)):
        features = torch.randn(1, width, generator=generator).repeat(images, 1)
        labels = torch.arange(images) % 5
        others = images - labels.bincount()[labels]
        found = retrieval_scores(features, labels, features[:11], labels[:11])
        assert found.first_rank.tolist() == (others[:11] + 1).tolist()
        leave_one_out = retrieval_scores(features, labels)
        known = labels.bincount()[labels] > 1  # an image of the same class exists
        assert leave_one_out.first_rank[known].tolist() == (others[known] + 1).tolist()
    pairs = torch.randn(257, 37, generator=generator).repeat(2, 1)  # each image with two classes
    found = retrieval_scores(pairs, [0] * 257 + [1] * 257, pairs[:40], [0] * 40)
    assert set(found.first_rank.tolist()) == {2}


def test_known_values() -> None:
    """Relevant images at ranks 1, 3 and 4 of 5: (1 + 2/3 + 3/4) / 3; and a first hit at rank 2."""
    gallery = torch.tensor([[1, 0.1 * row] for row in range(5)])
    found = retrieval_scores(gallery, [0, 1, 0, 0, 1], torch.tensor([[1.0, 0]]).repeat(2, 1), [0, 1])
    assert found.average_precision.tolist() == pytest.approx([(1 + 2 / 3 + 3 / 4) / 3, (1 / 2 + 2 / 5) / 2])
    assert [found.recall(k) for k in (1, 2)] == [0.5, 1]


def test_the_protocol_has_two_galleries() -> None:
    values = (*data(60, 3, 3), *data(40, 3, 4))
    results = {
        gallery: evaluate_features(
            {"protocols": ["retrieval"], "settings": {"retrieval": {"gallery": gallery, "recall": [50, 2]}}},
            *values,
        )["protocols"][0]
        for gallery in ("train", "test")
    }
    assert results["train"]["value"] == retrieval_scores(*values).mean_average_precision()
    assert results["test"]["value"] == retrieval_scores(*values[2:]).mean_average_precision()
    assert list(results["train"]["metrics"]) == ["recall_2", "recall_50"]
    assert list(results["test"]["metrics"]) == ["recall_2"], "the gallery has 39 images"
    assert results["train"]["id"] != results["test"]["id"]
    assert results["train"]["key"] != results["test"]["key"]


def test_mistakes_are_one_sentence() -> None:
    features, labels = data(20, 3, 5)
    with pytest.raises(UserError, match=mentions("retrieval")):
        retrieval_scores(features, labels, features, labels + 10)
    with pytest.raises(UserError, match=mentions("retrieval", 8, 7)):
        retrieval_scores(features, labels, features[:, :7], labels)
    for settings in ({"gallery": "tests"}, {"recall": [0]}, {"recall": []}):
        with pytest.raises(
            UserError, match=mentions(f"evaluation.settings.retrieval.{next(iter(settings))}")
        ):
            evaluate_features(
                {"protocols": ["retrieval"], "settings": {"retrieval": settings}}, *(features, labels) * 2
            )
