# SPDX-License-Identifier: Apache-2.0
"""k-NN: closed forms, an independent loop version, lightly's, and what must be refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from messages import mentions
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.evaluation import few_label_knn, knn_accuracy, neighbor_search
from hf_ssl.evaluation.knn import as_labels, leave_one_out_knn, vote
from hf_ssl.evaluation.neighbor_search import nearest


def clustered(images: int, seed: int, classes: int = 5, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (images,), generator=generator)
    return centers[labels] + 1.5 * torch.randn(images, width, generator=generator), labels


def at_cosine(cosine: float) -> list[float]:
    return [cosine, math.sqrt(1 - cosine**2)]


def test_closed_form_of_k_and_temperature() -> None:
    # The query is (1, 0). Nearest is class 0 (0.9); two of class 1 follow (0.8); three of class 0 lie far off
    # (-0.5).
    bank = torch.tensor([at_cosine(0.9), at_cosine(0.8), at_cosine(0.8)] + [at_cosine(-0.5)] * 3)
    labels = torch.tensor([0, 1, 1, 0, 0, 0])
    query, answer = torch.tensor([[3.0, 0.0]]), torch.tensor([1])
    result = knn_accuracy(bank, labels, query, answer, neighbors=[1, 3, 6], temperatures=[0.01, 1.0, 100.0])
    assert result[1, 1.0] == 0.0
    # At T 1: exp(0.9) = 2.46 against 2 exp(0.8) = 4.45.
    assert result[3, 1.0] == 1.0
    # At T 0.01: exp(90) against 2 exp(80); only the ratio e^10 > 2 counts.
    assert result[3, 0.01] == 0.0
    # At T 1 the far three add 3 exp(-0.5) = 1.82: 4.28 against 4.45. At T 100 it is a plain vote of four
    # against two.
    assert result[6, 1.0] == 1.0
    assert result[6, 100.0] == 0.0


def loop_accuracy(bank, labels, queries, answers, k, temperature) -> float:
    """The definition, one query, one neighbor at a time, in float64."""
    right = 0
    for query, answer in zip(queries, answers, strict=True):
        cosines = [float(np.dot(query, row) / np.linalg.norm(query) / np.linalg.norm(row)) for row in bank]
        votes: dict[int, float] = {}
        for row in sorted(range(len(bank)), key=lambda row: -cosines[row])[:k]:
            votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + math.exp(cosines[row] / temperature)
        right += max(sorted(votes), key=lambda number: votes[number]) == int(answer)
    return right / len(queries)


def test_equals_the_loop_version() -> None:
    bank, labels = clustered(150, seed=0)
    queries, answers = clustered(60, seed=1)
    counts, temperatures = (1, 2, 7, 20, 150), (0.07, 0.1, 0.5)
    result = knn_accuracy(bank, labels, queries, answers, neighbors=counts, temperatures=temperatures)
    assert set(result) == {(k, t) for k in counts for t in temperatures}
    assert len(set(result.values())) > 3, "the example must tell the settings apart"
    for (k, temperature), accuracy in result.items():
        expected = loop_accuracy(
            bank.double().numpy(), labels, queries.double().numpy(), answers, k, temperature
        )
        assert accuracy == pytest.approx(expected, abs=1e-12), (k, temperature)


def test_agrees_with_lightly() -> None:
    knn = pytest.importorskip("lightly.utils.benchmarking.knn")
    bank, labels = clustered(400, seed=2)
    queries, answers = clustered(300, seed=3)
    result = knn_accuracy(bank, labels, queries, answers, neighbors=[5, 20, 200], temperatures=[0.07, 0.1])
    for (k, temperature), accuracy in result.items():
        predicted = knn.knn_predict(
            F.normalize(queries, dim=1), F.normalize(bank, dim=1).T, labels, 5, knn_k=k, knn_t=temperature
        )[:, 0]
        assert accuracy == pytest.approx(float((predicted == answers).double().mean()), abs=1e-12)


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1, 1), (7, 13), (64, 40), (1000, 1000)])
def test_chunks_change_nothing(query_chunk: int, bank_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_ssl.evaluation.neighbor_search.QUERY_CHUNK", query_chunk)
    monkeypatch.setattr("hf_ssl.evaluation.neighbor_search.BANK_CHUNK", bank_chunk)
    bank, queries = (
        F.normalize(clustered(101, seed=4)[0], dim=1),
        F.normalize(clustered(30, seed=5)[0], dim=1),
    )
    cosines, rows = nearest(bank, queries, 17)
    expected = (queries.double() @ bank.double().T).sort(dim=1, descending=True)
    torch.testing.assert_close(cosines.double(), expected.values[:, :17], atol=1e-6, rtol=0)
    assert torch.equal(rows, expected.indices[:, :17])


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_product_of_any_processor_finds_the_neighbors(
    vendor: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy multiplies on processors of AMD, with a thread for each part of the bank."""
    products: list[int] = []

    def product(*args: Any, **kwargs: Any) -> np.ndarray:
        products.append(1)
        return matmul(*args, **kwargs)

    matmul = np.matmul
    monkeypatch.setattr(neighbor_search, "processor_field", lambda name: vendor)
    monkeypatch.setattr(neighbor_search, "_FEWEST_IN_NUMPY", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(np, "matmul", product)
    bank, queries = (F.normalize(clustered(rows, seed=rows)[0], dim=1) for rows in (1003, 30))
    cosines, rows = nearest(bank, queries, 17)
    expected = (queries.double() @ bank.double().T).sort(dim=1, descending=True)
    torch.testing.assert_close(cosines.double(), expected.values[:, :17], atol=1e-6, rtol=0)
    assert torch.equal(rows, expected.indices[:, :17])
    assert len(products) == (threads if vendor == "AuthenticAMD" else 0)


def with_exact_cosines(images: int, seed: int) -> torch.Tensor:
    """Rows of 16 signs: all cosines are multiples of 1 / 8, so that most neighbors tie, without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (images, 16), generator=generator).float() * 2 - 1


@pytest.mark.parametrize("bank_chunk", [7, 64, 1000])
@pytest.mark.parametrize("copies", [1, 10, 300])
def test_neighbors_equal_brute_force_also_if_most_cosines_tie(
    bank_chunk: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_ssl.evaluation.neighbor_search.QUERY_CHUNK", 11)
    monkeypatch.setattr("hf_ssl.evaluation.neighbor_search.BANK_CHUNK", bank_chunk)
    monkeypatch.setattr("hf_ssl.evaluation.neighbor_search._TIED_ROWS", 3)
    bank = with_exact_cosines(-(-300 // copies), seed=0).repeat(copies, 1)[:300]
    queries = with_exact_cosines(40, seed=1)
    exact = queries.double() @ bank.double().T
    expected = [sorted(range(300), key=lambda row: (-line[row], row)) for line in exact.tolist()]
    assert sum(len(set(line)) for line in exact.tolist()) < 40 * 17 + 1 < 40 * 300
    for k in (1, 2, 20, 299, 300):
        cosines, rows = nearest(F.normalize(bank, dim=1), F.normalize(queries, dim=1), k)
        assert rows.tolist() == [line[:k] for line in expected]
        torch.testing.assert_close(cosines.double(), exact.gather(1, rows) / 16, rtol=0, atol=0)


@pytest.mark.parametrize(("bank_chunk", "width"), [(65536, 192), (700, 192), (65536, 77)])
@pytest.mark.parametrize("queries", [1, 40])
def test_copies_tie_wherever_they_are(
    bank_chunk: int, width: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix product can round equal rows differently, for example in the last, incomplete columns."""
    monkeypatch.setattr(neighbor_search, "BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(neighbor_search, "_multiply", multiply_with_an_error_in_the_last_rows)
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(1027, width, generator=generator), dim=1)
    copies = [3, 500, 699, 1024, 1026]
    bank[copies] = bank[3].clone()
    bank[[10, 1025]] = bank[10].clone()
    near = F.normalize(bank[3] + 0.3 * torch.randn(queries, width, generator=generator) / width**0.5, dim=1)
    cosines, rows = nearest(bank, near, 6)
    assert rows[:, :5].tolist() == [copies] * queries
    assert all(len(set(line)) == 1 for line in cosines[:, :5].tolist())
    assert not set(copies) & set(rows[:, 5].tolist())
    for k in (1, 3):
        assert nearest(bank, near, k)[1].tolist() == [copies[:k]] * queries


def multiply_with_an_error_in_the_last_rows(
    queries: torch.Tensor, bank: torch.Tensor, out: torch.Tensor
) -> None:
    torch.mm(queries, bank.T, out=out)
    out[:, -4:] += 2e-6


@pytest.fixture
def with_candidates(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether candidates sufficed, for each search by products in bfloat16, which all searches try first."""
    found: list[bool] = []

    def search(*args: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        result = original(*args)
        found.append(result is not None)
        return result

    original = neighbor_search._largest_of_candidates
    monkeypatch.setattr(neighbor_search, "_rounds", lambda *_: True)
    monkeypatch.setattr(neighbor_search, "_largest_of_candidates", search)
    return found


@pytest.mark.parametrize("bank_chunk", [2003, 20_000])
def test_candidates_in_bfloat16_miss_no_neighbor(
    bank_chunk: int, with_candidates: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query has 20 neighbors whose cosines bfloat16 does not separate."""
    monkeypatch.setattr(neighbor_search, "BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(neighbor_search, "QUERY_CHUNK", 30)
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(70, 24, generator=generator), dim=1)
    near = queries.repeat_interleave(20, dim=0)
    beside = torch.randn(near.shape, generator=generator)
    beside = F.normalize(beside - (beside * near).sum(1, keepdim=True) * near, dim=1)
    cosines = (0.9 + 1e-4 * torch.arange(20)).repeat(70)[:, None]
    others = F.normalize(torch.randn(14_600, 24, generator=generator), dim=1)
    bank = torch.cat([F.normalize(cosines * near + (1 - cosines**2).sqrt() * beside, dim=1), others])
    bank = bank[torch.randperm(len(bank), generator=generator)]
    exact = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    rounded = (queries.bfloat16() @ bank.bfloat16().T).sort(dim=1, descending=True, stable=True)
    for k in (1, 3, 10):
        found, rows = nearest(bank, queries, k)
        torch.testing.assert_close(found.double(), exact.values[:, :k], atol=1e-6, rtol=0)
        assert torch.equal(rows, exact.indices[:, :k])
        assert (rounded.indices[:, :k] != rows).double().mean() > 0.3
    assert with_candidates and all(with_candidates)


def test_the_bound_covers_errors_that_all_have_one_direction(with_candidates: list[bool]) -> None:
    """All products of the nearest row round down, and those of 20 other rows round up."""
    unit = 2.0**-7  # the distance of numbers above 1 in bfloat16
    up, down, zero = (torch.full((1, 32), value) for value in (1 + 0.51 * unit, 1 + 0.49 * unit, 0.0))
    query = torch.cat([up, down, torch.ones(1, 1)], dim=1)
    nearest_row = torch.cat([zero, down, torch.tensor([[0.02]])], dim=1)
    others = torch.cat([up, zero, torch.zeros(1, 1)], dim=1).repeat(20, 1)
    far = 0.1 * torch.randn(3000, 65, generator=torch.Generator().manual_seed(5))
    rows = torch.cat([others, nearest_row, far])
    bank = torch.cat([rows, -rows])  # its mean is 0, so that nothing is subtracted
    assert (query @ bank.T).argmax() == 20
    assert (query.bfloat16() @ bank.bfloat16().T).argmax() != 20
    _, found = nearest(bank, query, 1)
    assert found.tolist() == [[20]] and with_candidates == [True]


def test_rounding_to_bfloat16_changes_a_number_by_at_most_half_a_unit() -> None:
    numbers = torch.linspace(1, 2, 100_001)
    errors = (numbers.bfloat16().float() - numbers).abs() / numbers
    assert 0.9 * neighbor_search._HALF_UNIT < float(errors.max()) <= neighbor_search._HALF_UNIT


def test_a_small_rest_of_the_bank_does_not_end_the_search_by_candidates(
    with_candidates: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbor_search, "BANK_CHUNK", 2000)
    rows = F.normalize(torch.randn(4100, 24, generator=torch.Generator().manual_seed(3)), dim=1)
    nearest(rows, rows[:50], 10)
    assert with_candidates == [True, True, True]


def test_one_query_with_many_candidates_does_not_widen_the_table_of_all(with_candidates: list[bool]) -> None:
    """All cosines with a feature of zeros tie, so every image of the bank is a candidate."""
    generator = torch.Generator().manual_seed(4)
    bank, queries = (F.normalize(torch.randn(rows, 24, generator=generator), dim=1) for rows in (4000, 90))
    queries[7] = 0
    exact = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    _, rows = nearest(bank, queries, 5)
    assert torch.equal(rows, exact.indices[:, :5])
    assert with_candidates == [False]


def test_similar_features_need_the_float32_product(with_candidates: list[bool]) -> None:
    """Here bfloat16 does not separate the images; rounding must not change the neighbors."""
    generator = torch.Generator().manual_seed(1)
    bank = F.normalize(1 + 0.02 * torch.randn(1000, 24, generator=generator), dim=1)
    queries = F.normalize(1 + 0.02 * torch.randn(9, 24, generator=generator), dim=1)
    exact = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    cosines, _ = nearest(bank, queries, 5)
    torch.testing.assert_close(cosines.double(), exact.values[:, :5], atol=1e-6, rtol=0)
    assert with_candidates == [False]


@pytest.mark.parametrize("bank_chunk", [513, 5000])
def test_candidates_in_bfloat16_keep_the_order_of_ties(
    bank_chunk: int, with_candidates: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of an image tie; the lower row comes first."""
    monkeypatch.setattr(neighbor_search, "BANK_CHUNK", bank_chunk)
    rows = F.normalize(torch.randn(1500, 67, generator=torch.Generator().manual_seed(2)), dim=1)
    bank = torch.cat([rows, rows, rows])
    _, found = nearest(bank, rows[:9], 3)
    assert torch.equal(found, torch.arange(9)[:, None] + 1500 * torch.arange(3))
    assert with_candidates and all(with_candidates)


def test_copies_of_any_image_have_equal_cosines() -> None:
    """The place of a copy in the bank does not change its cosine, so the lower row comes first."""
    rows = F.normalize(clustered(20, seed=12, width=67)[0], dim=1)
    bank = rows.repeat(153, 1)
    _, found = nearest(bank, rows[:9], 153)
    assert torch.equal(found, torch.arange(9)[:, None] + 20 * torch.arange(153))


def test_classes_equal_brute_force_also_if_votes_tie() -> None:
    bank, queries = with_exact_cosines(300, seed=2), with_exact_cosines(80, seed=3)
    generator = torch.Generator().manual_seed(4)
    labels, answers = (torch.randint(6, (count,), generator=generator) for count in (300, 80))
    arrays = bank.double().numpy(), labels, queries.double().numpy(), answers
    result = knn_accuracy(bank, labels, queries, answers, neighbors=[1, 2, 5, 20, 77], temperatures=[0.5])
    for (k, temperature), accuracy in result.items():
        assert accuracy == pytest.approx(loop_accuracy(*arrays, k, temperature), abs=1e-12), k
    # Two votes of equal weight: the prediction is the lower class, whatever the order in the bank.
    for first, second in ((3, 1), (1, 3)):
        pair = torch.ones(2, 4), [first, second], torch.ones(1, 4), [1]
        assert knn_accuracy(*pair, neighbors=[2], temperatures=[0.1]) == {(2, 0.1): 1.0}


def test_sums_of_votes_are_kept_for_settings() -> None:
    bank, labels = clustered(90, seed=13)
    queries, answers = clustered(50, seed=14)
    found = vote(
        bank, labels, queries, answers, neighbors=[3, 9], temperatures=[0.1, 0.5], keep=[(9, 0.5), (3, 0.1)]
    )
    assert list(found.scores) == [(9, 0.5), (3, 0.1)]
    for setting, scores in found.scores.items():
        assert scores.shape == (50, 5)
        assert float((scores.argmax(1) == answers).double().mean()) == found.accuracies[setting]
    cosines = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    top = cosines.topk(9)
    weights = ((top.values - top.values[:, :1]) / 0.5).exp()
    expected = torch.zeros(50, 5).scatter_add_(1, labels[top.indices], weights)
    torch.testing.assert_close(found.scores[9, 0.5].float(), expected)


def test_small_temperature_does_not_overflow() -> None:
    bank, labels = clustered(50, seed=6)
    result = knn_accuracy(bank, labels, bank, labels, neighbors=[1, 20], temperatures=[0.001])
    assert result[1, 0.001] == 1.0
    assert result[20, 0.001] == 1.0, "an image's own vote outweighs all others at a small temperature"


def test_half_precision_and_arrays_are_taken() -> None:
    bank, labels = clustered(60, seed=7)
    as_float = knn_accuracy(bank.bfloat16().float(), labels, bank, labels, neighbors=[5])
    assert knn_accuracy(bank.bfloat16(), labels.numpy(), bank, labels.tolist(), neighbors=[5]) == as_float


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"neighbors": [61]}, [60, 61]),
        ({"neighbors": [0]}, [1, 0]),
        ({"temperatures": [0.0]}, ["temperatures", "0.0"]),
        ({"train_labels": torch.zeros(59)}, [60, "(59,)"]),
        ({"test_labels": -torch.ones(60)}, [0, "-1"]),
        ({"train_features": torch.full((60, 16), torch.nan)}, ["60 of 60"]),
        ({"test_features": torch.ones(60)}, ["(N, D)", "(60,)"]),
        ({"train_features": torch.ones(60, 0), "test_features": torch.ones(60, 0)}, ["D > 0", "(60, 0)"]),
        ({"train_features": torch.full((60, 16), 1e25)}, ["finite norm", "60 of 60"]),
        ({"train_labels": torch.arange(60) + 10**7}, ["below 1,048,576", 10000059, "number the classes"]),
    ],
)
def test_bad_input_is_refused_in_words(change: dict, parts: list) -> None:
    features, labels = clustered(60, seed=8)
    arguments = {
        "train_features": features, "train_labels": labels, "test_features": features, "test_labels": labels,
        "neighbors": [5], "temperatures": [0.1],
    } | change  # fmt: skip
    with pytest.raises(UserError, match=mentions(*parts)):
        knn_accuracy(**arguments)


def test_unsigned_class_numbers_are_taken() -> None:
    labels = np.array([0, 1, 2], np.uint64)
    assert as_labels(labels, 3, "test").tolist() == [0, 1, 2]


def test_few_labels_closed_forms() -> None:
    features = F.one_hot(torch.arange(4)).float().repeat(6, 1)
    labels = torch.arange(4).repeat(6)
    perfect = few_label_knn(features, labels, features, labels, labels_per_class=1, draws=5)
    assert (perfect.mean, perfect.std, perfect.draws, perfect.labels_per_class) == (1.0, 0.0, 5, 1)
    chance = few_label_knn(torch.ones(24, 4), labels, features, labels, labels_per_class=2, draws=5)
    assert chance.mean == 0.25, "equal cosines go to one row, so one class of four is right"


def test_few_labels_draws_are_balanced() -> None:
    # 50 rows of class 0 at right angles to each other, and 5 of class 1 that are a little like each of them:
    # a row of class 0 is known if it was drawn itself, and taken for class 1 if not.
    bank, labels = torch.cat([torch.eye(50), torch.ones(5, 50)]), [0] * 50 + [1] * 5
    for labels_per_class in (1, 5):
        result = few_label_knn(
            bank, labels, torch.eye(50), [0] * 50, labels_per_class=labels_per_class, draws=3
        )
        assert result.mean == pytest.approx(labels_per_class / 50)
        assert result.std == pytest.approx(0)


def test_few_labels_draws_depend_on_the_seed_alone() -> None:
    features, labels = clustered(200, seed=9)
    state = torch.random.get_rng_state()
    one, again, other = (
        few_label_knn(scale * features, labels, features, labels, labels_per_class=2, draws=3, seed=seed)
        for scale, seed in ((1, 0), (8, 0), (1, 1))
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert one == again, "another encoder meets the same draws"
    assert one.mean != other.mean


def test_few_labels_mean_and_spread_over_draws() -> None:
    features, labels = clustered(200, seed=10)
    queries, answers = clustered(100, seed=11)
    single = [
        few_label_knn(features, labels, queries, answers, labels_per_class=1, draws=draws, seed=5)
        for draws in (1, 2)
    ]
    assert single[0].std == 0.0
    # The first of two draws is the one draw, so the second follows from the mean.
    second = 2 * single[1].mean - single[0].mean
    assert single[1].std == pytest.approx(abs(single[0].mean - second) / math.sqrt(2), abs=1e-9)
    assert single[1].std > 0


def test_few_labels_refuses_a_class_that_is_too_small() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    with pytest.raises(UserError, match=mentions(2, 1)):
        few_label_knn(torch.eye(4), labels, torch.eye(4), labels, labels_per_class=2)


@pytest.mark.parametrize("copies", [1, 8])
def test_leave_one_out_removes_each_image_from_its_own_bank(copies: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator).repeat_interleave(copies, 0)[:60]
    labels = torch.randint(0, 3, (len(features),), generator=generator)
    right = 0
    for row in range(len(features)):
        rest = torch.arange(len(features)) != row
        one = knn_accuracy(
            features[rest], labels[rest], features[[row]], labels[[row]], neighbors=[5], temperatures=[0.07]
        )
        right += one[5, 0.07]
    found = leave_one_out_knn(features, labels, neighbors=5, temperature=0.07)
    assert abs(found - right / len(features)) < (1e-9 if copies == 1 else 0.2)  # copies tie
    with pytest.raises(UserError, match=mentions("k < 60" if copies == 8 else "k < 40")):
        leave_one_out_knn(features, labels, neighbors=len(features), temperature=0.07)
