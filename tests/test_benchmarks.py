# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic and its record; no test asserts a time."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last, so that an installed hf_ssl is the one that is tested

from training.benchmarks import pairs, report  # noqa: E402
from training.benchmarks.losses import memory_bank  # noqa: E402
from training.benchmarks.pairs import Pair, Timing, compare  # noqa: E402
from training.benchmarks.steps import cpc_step  # noqa: E402

RESULTS = ROOT / "training" / "benchmarks" / "results"
MACHINE = {"device": "a processor", "cores": 2, "packages": {"torch": "2.15"}}


def row(**changes):
    record = {
        "title": "a thing",
        "peer": "a peer",
        "aim": 3,
        "ratio": 4.0,
        "ratio_low": 3.5,
        "ratio_high": 168.2,
    }
    return {**record, **changes}


def test_both_sides_run_alternately_and_each_is_first_in_every_other_pair(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setitem(pairs.CLOCKS, "cpu", lambda: now[0])

    def program(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    pair = Pair(program("ours", 6.0), program("peer", 8.0), ours_units=3, peer_units=2)
    timing = compare(pair, repeats=3, clock="cpu", device=torch.device("cpu"))
    assert "".join(name[0] for name in calls) == "op" + "op" + "po" + "op"
    assert timing.ours == [2.0] * 3 and timing.peer == [4.0] * 3
    assert timing.summary()["ratio"] == 2.0


def test_the_ratio_is_the_median_of_ratios_of_pairs():
    """Not the ratio of medians: what slows a machine down falls on both sides of a pair."""
    summary = Timing(ours=[1.0, 10.0, 1.0], peer=[2.0, 20.0, 8.0]).summary()
    assert (summary["ratio"], summary["ratio_low"], summary["ratio_high"]) == (2.0, 2.0, 5.0)


def test_rows_that_are_measured_alone_replace_theirs_and_leave_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_peers", lambda: {})
    device = torch.device("cpu")
    report.draw({"rows": {"trainer": {"title": "overhead"}}}, tmp_path / "cpu.png")  # without ratios
    assert not list(tmp_path.glob("*.png"))
    report.write_report(tmp_path, device, MACHINE, {"one": row(), "two": row(title="another")})
    memory = {"memory_aim": 15, "memory_ratio": 20.8, "ours_mib": 52.0, "peer_mib": 1080.0}
    report.write_report(tmp_path, device, MACHINE, {"two": row(title="another", ratio=2.0, **memory)})
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert list(record["rows"]) == ["one", "two"] and record["rows"]["two"]["ratio"] == 2.0
    text = (tmp_path / "cpu.md").read_text()
    assert "| a thing | a peer | 4 (3.5 to 168) | 3 |" in text
    assert "| peak memory of the row above | a peer | 1/20.8 (52 against 1080 MiB) | 1/15 |" in text
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_the_readme_shows_the_recorded_table():
    """Numbers are written by the benchmark and never typed."""
    record = json.loads((RESULTS / "cpu.json").read_text())
    assert (RESULTS / "cpu.md").read_text() == report.table(record)
    assert report.table(record).rstrip() in (ROOT / "training/README.md").read_text()


def test_both_sides_of_the_memory_bank_compute_the_same_gradient():
    pair = memory_bank(5, 7, num_rows=20, dims=6)(torch.device("cpu"))
    assert pair.peer().abs().min() > 0
    torch.testing.assert_close(pair.ours(), pair.peer(), rtol=1e-4, atol=1e-5)


def test_both_sides_of_the_step_of_cpc_run():
    pair = cpc_step(batch=2)(torch.device("cpu"))
    pair.ours()
    pair.peer()


@pytest.mark.parametrize("name", ["cpu.png", "streaming.png"])
def test_its_pictures_are_there(name):
    assert (RESULTS / name).stat().st_size > 1000


SIZES = {"bank": 700, "queries": 60}


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        ("nearest_neighbors", SIZES),
        ("matrix_product", SIZES),
        ("flat_index", SIZES),
        ("probe_sweep", {"images": 300, "size": 8}),
    ],
)
def test_the_programs_of_the_evaluation_rows_do_the_same_work(build, sizes):
    """They end in SystemExit if the results of both sides differ."""
    from training.benchmarks import evaluating

    if build == "flat_index":
        pytest.importorskip("faiss")
    elif build == "nearest_neighbors":
        pytest.importorskip("lightly")
    pair = getattr(evaluating, build)(torch.device("cpu"), **sizes)
    pair.ours()
    pair.peer()
