# SPDX-License-Identifier: Apache-2.0
"""The correlation of measurements without labels with accuracies, over records of both layouts."""

import math
import sys
from pathlib import Path

import pytest
from example_facts import new_facts

from hf_ssl.files import read_json

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from training import correlations, quality_of_runs  # noqa: E402


def record(method: str, rank: float, knn: float) -> dict:
    history = [{"step": 0, "rank_me": 1.0}, {"step": 9, "rank_me": rank}]
    trained = {"knn": knn, "linear": 1 - knn}
    return {"method": {"name": method}, "monitor": {"history": history}, "results": {"trained": trained}}


def test_ranks_are_correlated_over_runs_and_over_methods() -> None:
    """Within each method the order is reversed, so that the runs correlate less than the methods."""
    runs = [record(m, 10 * n + k, 0.1 * n - 0.01 * k) for n, m in enumerate("abc") for k in range(2)]
    lines = correlations.table(runs).splitlines()
    # Ranks 0..5 against 1,0,3,2,5,4: 1 - 6 * 6 / (6 * 35).
    assert lines[2] == "| RankMe of the encoder | +0.83 | +1.00 | -0.83 | -1.00 | 6 (a, b, c) |"
    assert len(lines) == 3


def test_results_files_contain_further_measurements() -> None:
    facts = new_facts()
    trained = facts["results"]["trained"] | {"quality": {"lidar": 7.5, "alignment": 0.5}}
    row = correlations.row_of({"method": "simclr", "results": {"trained": trained}})
    assert row["quality.lidar"] == 7.5 and row["method"] == "simclr"
    assert row["statistics.alpha_req"] == trained["statistics"]["alpha_req"]
    assert row["knn"] == trained["protocols"][0]["value"] and 0 < row["linear"] <= 1


def test_few_or_equal_values_have_no_correlation() -> None:
    assert math.isnan(correlations.rank_correlation([(1, 2), (2, 3)]))
    assert math.isnan(correlations.rank_correlation([(1, 2), (1, 3), (1, 4)]))
    assert correlations.rank_correlation([(1, 3), (2, 3), (3, 4)]) == pytest.approx(0.866, abs=1e-3)


def test_many_methods_are_counted() -> None:
    lines = correlations.table([record(name, 1.0 + ord(name), 0.5) for name in "abcdef"]).splitlines()
    assert lines[2].endswith("| 6 (6 methods) |")


def test_the_stored_table_has_a_row_for_each_measurement() -> None:
    files = [ROOT / f"training/results/{name}.json" for name in ("compare", "quality")]
    text = correlations.table([each for file in files for each in read_json(file)])
    stored = (ROOT / "training/results/correlations.md").read_text()
    assert text == stored, "run python -m training.correlations training/results/{compare,quality}.json ..."
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [
        f"| {name}" for name in correlations.MEASUREMENTS.values()
    ]


def test_finished_runs_keep_their_accuracies_beside_new_measurements() -> None:
    measured = {"statistics": {"alpha_req": 1.5}, "quality": {"lidar": 9.0}, "protocols": []}
    facts = new_facts()
    row = correlations.row_of(quality_of_runs.record(facts, measured))
    assert (row["statistics.alpha_req"], row["quality.lidar"]) == (1.5, 9.0)
    assert row["knn"] == facts["results"]["trained"]["protocols"][0]["value"]
    old = {"knn": {"accuracy": 0.4}, "linear": {"accuracy": 0.5}}
    old_facts = {"method": "byol", "date": "", "results": {"trained": old}}
    row = correlations.row_of(quality_of_runs.record(old_facts, measured))
    assert (row["method"], row["knn"], row["linear"]) == ("byol", 0.4, 0.5)
