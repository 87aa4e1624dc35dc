# SPDX-License-Identifier: Apache-2.0
"""Tests the generator of mutations by default, and many mutants of the numeric code with -m weekly."""

import json
import os
from pathlib import Path

import pytest
from forks import Forks
from weekly import mutations
from weekly.mutants import Mutant, mutants, mutated

SOURCE = '''
def f(x, y: int = 1):
    """A text."""
    if x < y and not x:
        raise ValueError("text" + str(1))
    x.add_(2.0)
    return max(x - y, -3)
'''


def test_each_kind_of_change_is_made_once() -> None:
    found = [mutant.change for mutant in mutants("f.py", SOURCE)]
    assert sorted(found) == sorted([
        "1 -> 2", "x < y -> x <= y", "not x -> x", "x < y and (not x) -> x < y or not x",
        "if x < y and (not x): -> if not (x < y and (not x)):", "x.add_(2.0) -> pass", "2.0 -> 4.0",
        "max -> min", "x - y -> x + y", "-3 -> 3", "3 -> 4",
    ])  # fmt: skip


def test_a_mutant_differs_from_its_source_in_one_place() -> None:
    (first, *_), lines = mutants("f.py", SOURCE), SOURCE.splitlines()
    assert first.key == "f.py:2:18 1 -> 2" and lines[1][18] == "1"
    changed = mutated(SOURCE, first.number)
    assert "y: int=2" in changed and "x < y and (not x)" in changed


def test_every_folder_has_files_and_tests() -> None:
    files = mutations.candidates()
    for folder, tests in mutations.TESTS.items():
        assert any(name.startswith(f"{folder}/") for name in files)
        assert all((mutations.ROOT / test).exists() for test in tests)
    assert all((mutations.ROOT / test).exists() for tests in mutations.ALSO.values() for test in tests)
    assert mutations.ALSO.keys() <= files.keys()
    for folder, names in mutations.FILES.items():
        assert {f"{folder}/{name}.py" for name in names} <= files.keys()


def test_the_record_counts_what_it_lists() -> None:
    record = json.loads(mutations.RECORD.read_text(encoding="utf-8"))
    assert record["survived"] == len(record["survivors"]) <= record["tried"] <= record["mutants"]
    for name in ("mutants", "tried", "survived"):
        assert record[name] == sum(counts[name] for counts in record["files"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("hf_ssl/losses/contrastive.py", "temperature <= 0", "temperature < 0"),
        ("hf_ssl/modeling/batch_norm.py", "x.ndim - 2", "x.ndim + 2"),  # seen by several processes
    ],
)
def test_a_mutant_is_found(file: str, before: str, after: str) -> None:
    source = (mutations.ROOT / file).read_text(encoding="utf-8")
    assert before in source
    with Forks() as forks:
        changed = source.replace(before, after)
        assert mutations.run_tests(forks, file, changed, cpu_seconds=300) == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_the_source_itself_passes() -> None:
    file = "hf_ssl/losses/contrastive.py"
    source = (mutations.ROOT / file).read_text(encoding="utf-8")
    with Forks() as forks:
        assert mutations.run_tests(forks, file, source, cpu_seconds=300) == pytest.ExitCode.OK


def test_the_summary_counts_survivors_of_todays_files() -> None:
    one, two, *_ = mutations.sample(seed=0, only="hf_ssl/losses/contrastive.py")
    entries = {
        one.key: {"survived": True}, two.key: {"survived": False}, "gone.py:1:0 a -> b": {"survived": True},
    }  # fmt: skip
    record = mutations.summary(0, entries)
    assert (record["tried"], record["survived"]) == (2, 1)
    assert record["survivors"] == [{"file": one.file, "line": one.line, "change": one.change}]


@pytest.mark.weekly
def test_every_surviving_mutant_is_recorded(tmp_path: Path) -> None:
    """HF_SSL_MUTATIONS sets the number of mutants, HF_SSL_MUTATIONS_SEED sets their order."""
    count = os.environ.get("HF_SSL_MUTATIONS", "2000")
    seed = os.environ.get("HF_SSL_MUTATIONS_SEED", "0")
    files = ["--log", str(tmp_path / "log.jsonl"), "--record", str(tmp_path / "record.json")]
    arguments = mutations.parser().parse_args(["--mutations", count, "--seed", seed, *files])
    record = json.loads(mutations.RECORD.read_text(encoding="utf-8"))
    known = {(survivor["file"], survivor["change"]) for survivor in record["survivors"]}

    def new(mutant: Mutant) -> bool:
        return (mutant.file, mutant.change) not in known

    assert [mutant.key for mutant in mutations.run(arguments) if new(mutant)] == []
