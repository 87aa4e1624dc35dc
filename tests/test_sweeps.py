# SPDX-License-Identifier: Apache-2.0
"""Sweeps: the grid, baselines that are measured once, missing runs, mistakes, and the page of the results."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from messages import mentions
from tiers import in_tiers

from hf_ssl import sweeps
from hf_ssl.cards.sweep_plots import _are_geometric, draw
from hf_ssl.cards.sweep_text import Measured, csv_text, page
from hf_ssl.cli import main
from hf_ssl.comparing import compare_runs
from hf_ssl.errors import UserError
from hf_ssl.files import write_json
from hf_ssl.recipe import load_recipe
from hf_ssl.resources import recipe_files, study_files
from hf_ssl.signals import SWEEP as SWEEP_VARIABLE
from hf_ssl.study import Run
from hf_ssl.sweep_file import load_sweep, needed_keys, takes_list
from hf_ssl.sweep_results import Finished
from hf_ssl.sweeps import Command, list_jobs, run_sweep

SMALL = [
    "training.max_steps=2", "training.disable_tqdm=true", "training.monitor_steps=0",
    "evaluation.protocols=[knn]", "evaluation.max_train_images=100", "evaluation.max_test_images=50",
    "training.batch_size=[32,64]",
]  # fmt: skip
STUDY = """
study: {title: Two methods, question: Which one?, recipe: smoke/simclr, seeds: 1}
settings: {training.max_steps: 2}
grid: {method.temperature: [0.1, 0.5]}
arms:
  flip: {}
  no flip: {settings: {views.flip: 0.0}}
"""


def test_a_grid_has_all_combinations_with_all_seeds() -> None:
    sweep = load_sweep("smoke/simclr", [*SMALL, "method.temperature=[0.1, 0.5]"], seeds=2)
    assert [(run.name, run.seed) for run in sweep.runs] == [
        (f"batch_size {size}, temperature {temperature}", seed)
        for size in (32, 64) for temperature in (0.1, 0.5) for seed in (0, 1)
    ]  # fmt: skip
    for run in sweep.runs:
        recipe = load_recipe(run.recipe, run.overrides)
        assert recipe.training["batch_size"] == run.values["training.batch_size"]
        assert recipe.method["temperature"] == run.values["method.temperature"]
        assert recipe.training["seed"] == run.seed
    baselines = [load_recipe(run.recipe, run.overrides).evaluation.baselines for run in sweep.runs]
    assert baselines == [True] + [False] * 7, "random weights and raw pixels are those of the first run"
    other = load_sweep("smoke/simclr", ["backbone.hidden_sizes=[[8, 16], [16, 32]]"], seeds=1)
    assert [run.values["backbone.hidden_sizes"] for run in other.runs] == [[8, 16], [16, 32]]
    assert all("evaluation.baselines=false" not in run.overrides for run in other.runs), "other networks"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("training.batch_size", False), ("method.temperature", False), ("views.scale", True),
        ("evaluation.protocols", True), ("backbone.hidden_sizes", True), ("training.precision", False),
        ("data.max_images", False), ("evaluation.patch_grid", True),
        ("evaluation.settings.knn.neighbors", True),
    ],
)  # fmt: skip
def test_keys_that_take_a_list(key: str, expected: bool) -> None:
    recipe = load_recipe("smoke/simclr", ["evaluation.settings.knn.neighbors=[3]"])
    assert takes_list(recipe, key) == expected


def test_a_study_has_arms(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(STUDY)
    sweep = load_sweep(str(tmp_path / "two.yaml"), [], seeds=None)
    assert sweep.study.title == "Two methods" and len(sweep.runs) == 4
    assert sweep.runs[-1].name == "no flip, temperature 0.5"
    recipe = load_recipe(sweep.runs[-1].recipe, sweep.runs[-1].overrides)
    assert (recipe.views.flip, recipe.method["temperature"], recipe.training["max_steps"]) == (0.0, 0.5, 2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("smoke/simclr", ["training.max_steps=2"]), ["sweep", "training.batch_size=[64,128,256]"]),
        (("smoke/simclr", ["training.batch_size=[]"]), ["training.batch_size", "different values"]),
        (("smoke/simclr", ["training.batch_size=[32, 32]"]), ["training.batch_size", "different"]),
        (("smoke/simclr", ["training.batch_sise=[32, 64]"]), ["training.batch_sise", "batch_size"]),
        (("smoke/simclr", ["training.batch_size=[32, 1]"]), ["training.batch_size", "at least 2"]),
        (("smoke/simclr", ["training.seed=[0, 1]"]), ["training.seed", "--seeds"]),
        (("smoke/simclr", [*SMALL, "training.output_dir=x"]), ["training.output_dir", "--output"]),
        (("smoke/simclr", SMALL, 0), ["--seeds", 0]),
        (("smoke/simcl", SMALL), ["sweep", "smoke/simclr"]),
    ],
)
def test_mistakes_are_named_before_the_first_run(arguments: Any, parts: list) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        load_sweep(*arguments)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("recipe: smoke/simclr, ", "", ["study.recipe", "flip"]),
        (
            "{method.temperature: [0.1, 0.5]}",
            "{method.temperature: 0.1}",
            ["grid.method.temperature", "list"],
        ),
        ("views.flip: 0.0", "views.flop: 0.0", ["views.flop", "flip"]),
        ("title: Two", "titel: Two", ["study.titel"]),
        ("arms:", "arm:", ["arm", "arms"]),
        ("flip: {}", "flip: hello", ["arms.flip", "hello", "{}"]),
        ("flip: {}", "flip: [views]", ["arms.flip", "['views']"]),
        ("title: Two methods, ", "", ["study.title", "bad.yaml"]),
        ("seeds: 1", "seeds: 0", ["study.seeds", 0]),
        ("[0.1, 0.5]", "[]", ["method.temperature", "method.temperature=[VALUE,VALUE]"]),
        ("flip: {}", "flip: {start: no flip}", ["arms.flip.start", "move no flip before flip"]),
        ("flip: {}", "flip: {start: flip}", ["arms.flip.start", "another arm"]),
    ],
)
def test_mistakes_in_a_study_are_named(old: str, new: str, parts: list, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(STUDY.replace(old, new))
    with pytest.raises(UserError, match=mentions(*parts)):
        load_sweep(str(tmp_path / "bad.yaml"))


def test_the_study_of_the_readme_can_be_read(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "training/README.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.partition("`mine.yaml`")[2].split("```")[1].removeprefix("yaml"))
    sweep = load_sweep(str(tmp_path / "mine.yaml"), ["data.path=digits"])
    assert [(run.arm, run.command) for run in sweep.runs] == [
        ("mine", "pretrain"), ("continued", "pretrain"), ("released", "evaluate")
    ]  # fmt: skip
    assert sweep.runs[1].start is sweep.runs[0] and "learning_rate" in sweep.runs[1].settings[0]


STUDIES = sorted(study_files())


@pytest.mark.parametrize("name", in_tiers(zip(STUDIES), list(zip(STUDIES[::4]))))
def test_the_studies_can_be_read(name: str) -> None:
    sweep = load_sweep(name, ["data.path=digits", *(f"{key}=digits" for key in needed_keys(name))])
    assert sweep.study.question and len(sweep.runs) > 1
    assert len({run.folder(Path("x")) for run in sweep.runs}) == len(sweep.runs)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs start in this process, which is faster. The fixture records their commands."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            commands.append(command)
            self.status = main(command[3:])

        def wait(self) -> int:
            return self.status

    monkeypatch.setattr(sweeps, "subprocess", SimpleNamespace(Popen=Process))
    return commands


def test_a_sweep_writes_a_page_and_runs_only_what_is_missing(
    tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "smoke/simclr", *SMALL, "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert len(in_this_process) == 2
    text, shown = (tmp_path / "README.md").read_text(), capsys.readouterr()
    assert text in shown.out
    first, second = [line for line in shown.err.splitlines() if line.startswith("run ")]
    assert "left" not in first and second.endswith(" left") and "; about " in second
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    trained = [row for row in rows if row["encoder"] == "trained" and row["column"].startswith("20-NN")]
    assert [row["training.batch_size"] for row in trained] == ["32", "64"]
    assert {row["protocol"] for row in trained} == {"knn"}
    for row in trained:
        value, error = (f"{100 * float(row[key]):.1f}" for key in ("value", "standard_error"))
        assert f"| batch_size {row['training.batch_size']} | {value} ± {error} |" in text
    assert text.count("the same network without training") == text.count("| raw pixels |") == 1
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert "- Recipe: `smoke/simclr`." in text and "- Seeds: 0." in text and "- Made with hf_ssl " in text
    assert "- Precision of the trainings: " in text and " in each run. All times are longer" in text
    [shared] = [line for line in text.splitlines() if line.startswith("- Settings of all runs: ")]
    assert "`training.max_steps=2`" in shared
    assert not any(key in shared for key in ("batch_size", "output_dir", "seed", "path"))
    assert len(compare_runs([str(tmp_path / "runs.json")], None).rows) == 2
    for folder in filter(Path.is_dir, list(tmp_path.iterdir())):
        shutil.rmtree(folder)  # the results of these runs remain
    assert main([*arguments, "--seeds", "2"]) == 0, "seeds may be added"
    assert [command[-3] for command in in_this_process[2:]] == ["2", "4"], "the second seeds"
    assert " ± " in (tmp_path / "README.md").read_text()
    states = [line.split()[-1] for line in list_jobs(load_sweep("smoke/simclr", SMALL, 2), tmp_path)]
    assert states == ["finished"] * 4
    assert main(arguments) == 0 and len(json.loads((tmp_path / "runs.json").read_text())) == 4, "none is lost"
    assert main([*arguments, "method.temperature=0.3"]) == 2
    assert "method.temperature" in capsys.readouterr().err


def test_the_remaining_time_counts_runs_that_train_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four runs, two at once, the first one ended after a minute, as the second one does soon."""
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: 160.0)
    assert sweeps._left(100.0, made=1, running=0, runs=4) == "about 3 min 0 s left"
    assert sweeps._left(100.0, made=1, running=1, runs=4) == "about 1 min 40 s left"


FOUR = """
study:
  title: Four ways
  question: Which one?
  recipe: smoke/simclr
  columns: [memory, queue_age, evaluation_seconds]
  curves: [knn, embedding_rank]
  k_curve: true
settings:
  training.max_steps: 2
  training.disable_tqdm: true
  training.monitor_steps: 1
  evaluation.protocols: [knn]
  evaluation.max_train_images: 100
  evaluation.max_test_images: 50
grid:
  training.batch_size: [16]
arms:
  first: {}
  second: {start: first, settings: {training.max_steps: 1, evaluation.baselines: true}}
  labels: {command: supervise, settings: {training.num_train_epochs: 1, training.warmup_epochs: 0}}
  published: {command: evaluate, encoder: ENCODER}
"""


@pytest.mark.slow
def test_arms_continue_others_or_learn_from_labels_or_are_only_evaluated(
    tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    import torch
    from transformers import AutoModel

    encoder, output = tmp_path / "own" / "seed-0", tmp_path / "out"
    assert main(["pretrain", "smoke/simclr", "training.max_steps=1", "training.disable_tqdm=true",
                 "evaluation.protocols=[knn]", f"training.output_dir={encoder}"]) == 0  # fmt: skip
    study = tmp_path / "four.yaml"
    study.write_text(FOUR.replace("ENCODER", str(encoder)))
    sweep = load_sweep(str(study), [], seeds=2)
    assert [(run.name, run.seed) for run in sweep.runs] == [
        ("first, batch_size 16", 0), ("first, batch_size 16", 1), ("second, batch_size 16", 0),
        ("second, batch_size 16", 1), ("labels, batch_size 16", 0), ("labels, batch_size 16", 1),
        ("published", 0),
    ]  # fmt: skip
    assert [run.start for run in sweep.runs] == [None, None, *sweep.runs[:2], None, None, None]
    with pytest.raises(UserError, match=mentions("second", "first", "seed 1", "make that run first")):
        sweeps.run_job(sweep, output, 4)
    command = Command(str(study), [], 2, output)
    measured = run_sweep(sweep, command)
    assert [run.name for run in measured] == [run.name for run in sweep.runs]
    start, end = (AutoModel.from_pretrained(sweep.runs[number].folder(output)) for number in (1, 3))
    weights = json.loads((sweep.runs[3].folder(output) / "facts.json").read_text())["recipe"]
    assert f"backbone.init_from={sweep.runs[1].folder(output).name}" in " ".join(weights["overrides"])
    moved = [torch.equal(one, two) for one, two in zip(start.parameters(), end.parameters(), strict=True)]
    assert not all(moved)
    assert measured[3].results["start"] == {
        **measured[3].results["start"],
        "protocols": measured[1].results["trained"]["protocols"],
    }, "the second training starts where the first one ended"
    labels, published = measured[5], measured[6]
    assert labels.training["epochs"] == 1 and labels.seed == 1 and labels.history == []
    assert published.training["steps"] == 1 and published.numbers().keys() == measured[0].numbers().keys()
    text = (output / "README.md").read_text()
    assert text.count("| first, batch_size 16 |") == 2, "once in the table, once in the seconds"
    assert "- second, batch_size 16: `start: first, batch_size 16`, " in text
    assert "- published: `encoder: own/seed-0`" in text
    [shared] = [line for line in text.splitlines() if line.startswith("- Settings of all runs: ")]
    assert "`evaluation.max_train_images=100`" in shared, "also of the run with labels"
    assert "peak memory, GiB | number of steps that a key stays in the queue" in text
    assert "![Measurements during training, means over seeds](curves.png)" in text
    for picture in ("curves.png", "k_curve.png"):
        assert f"({picture})" in text and (output / picture).stat().st_size > 10_000
    assert len(compare_runs([str(output / "runs.json")], None).rows) >= 3
    commands = len(in_this_process)
    run_sweep(sweep, command)
    assert len(in_this_process) == commands, "nothing is missing"


def test_the_command_changes_single_arms(tmp_path: Path) -> None:
    (tmp_path / "four.yaml").write_text(FOUR)
    own = ["arms.second.views.size=9", "arms.published.encoder=other/encoder", "views.size=10"]
    runs = {run.arm: run for run in load_sweep(str(tmp_path / "four.yaml"), own).runs}
    sizes = {
        arm: load_recipe(runs[arm].recipe, runs[arm].overrides).views.size for arm in ("first", "second")
    }
    assert sizes == {"first": 10, "second": 9}, "an arm's own value counts more than that of all arms"
    assert runs["published"].encoder == "other/encoder"
    for text, parts in {
        "arms.secnd.views.size=9": ["arms", "secnd", "second"],
        "arms.second=9": ["arms.second=9", "section"],
        "arms.second.start=first": ["start", "file of the study"],
        "arms.second.training.max_step=9": ["arm second", "training.max_step", "training.max_steps"],
        "arms.second.training.seed=9": ["training.seed", "--seeds"],
        "arms.second.training.output_dir=there": ["training.output_dir", "--output"],
    }.items():
        with pytest.raises(UserError, match=mentions(*parts)):
            load_sweep(str(tmp_path / "four.yaml"), [text])
    with pytest.raises(UserError, match=mentions("arms.published", "views.size", "evaluate")):
        load_sweep(str(tmp_path / "four.yaml"), ["arms.published.views.size=9"])


def test_an_arm_may_need_its_own_values(tmp_path: Path) -> None:
    file = tmp_path / "four.yaml"
    file.write_text(FOUR.replace("{start: first,", "{start: first, needs: [data.path],"))
    assert needed_keys(str(file)) == ["arms.second.data.path"]
    with pytest.raises(UserError, match=mentions("arms.second.data.path", "add")):
        load_sweep(str(file), ["data.path=digits"])
    assert load_sweep(str(file), ["arms.second.data.path=digits"]).runs


def test_an_arm_with_a_start_has_its_encoder_and_measures_no_baselines(tmp_path: Path) -> None:
    file = tmp_path / "four.yaml"
    own = "{start: first, settings: {views.size: 10}}\n  third: {settings: {views.size: 10}}"
    file.write_text(
        FOUR.replace("{start: first, settings: {training.max_steps: 1, evaluation.baselines: true}}", own)
    )
    runs = {run.arm: run for run in load_sweep(str(file), ["backbone.hidden_sizes=[8, 32]"]).runs}
    assert "backbone.hidden_sizes=[8, 32]" in runs["first"].overrides
    assert not any(text.startswith("backbone") for text in runs["second"].overrides)
    measured = {arm: "evaluation.baselines=false" not in run.overrides for arm, run in runs.items()}
    assert measured == {"first": True, "second": False, "third": True, "labels": False, "published": False}


def begin(run: Run, output: Path) -> None:
    """Write a file of a run that was interrupted."""
    run.folder(output).mkdir(parents=True)
    (run.folder(output) / "_run.json").touch()


CHANGED = [
    ("second: {start: first,", "second: {", "start"),
    ("/models/one", "/models/two/one", "encoder"),
    ("  second: {start: first,", "  second: {command: evaluate, encoder: here}\n  third: {", "command"),
]


@pytest.mark.parametrize(("old", "new", "key"), in_tiers(CHANGED, CHANGED[:1]))
def test_results_of_a_changed_arm_are_not_accepted(old: str, new: str, key: str, tmp_path: Path) -> None:
    file, output = tmp_path / "four.yaml", tmp_path / "out"
    text = FOUR if old in FOUR else FOUR.replace("ENCODER", old)
    for before, after in ((text, text.replace(old, new)), (text.replace(old, new), text)):
        file.write_text(before)
        sweep = load_sweep(str(file))
        sweeps._check_plan(sweep, output)
        for run in sweep.runs:
            begin(run, output)
        assert list_jobs(sweep, output)
        file.write_text(after)
        for check in (sweeps._check_plan, list_jobs):
            with pytest.raises(UserError, match=mentions(key, "another folder")):
                check(load_sweep(str(file)), output)
        shutil.rmtree(output)


def test_results_of_another_axis_are_not_accepted(tmp_path: Path) -> None:
    """The name of a run contains only the last word of a key, so the runs of both sweeps have equal names."""
    file, output, values = tmp_path / "own.yaml", tmp_path / "out", "momentum=[0.9,0.99]"
    file.write_text(
        recipe_files()["smoke/byol"].read_text().replace("training:", "training:\n  optimizer: sgd")
    )
    sweep, other = (load_sweep(str(file), [f"{section}.{values}"]) for section in ("training", "method"))
    assert [run.name for run in sweep.runs] == [run.name for run in other.runs]
    sweeps._check_plan(sweep, output)
    begin(sweep.runs[0], output)
    sweeps._check_plan(load_sweep(str(file), ["training.momentum=[0.9,0.8]"], 2), output)
    for check in (sweeps._check_plan, list_jobs):
        with pytest.raises(
            UserError, match=mentions("training.momentum", "method.momentum", "another folder")
        ):
            check(other, output)
    stored = json.loads((output / "sweep.json").read_text())
    del stored[""]["grid"]  # an older version did not store it
    (output / "sweep.json").write_text(json.dumps(stored))
    sweeps._check_plan(sweep, output)
    [run] = load_sweep(str(file), ["training.momentum=[0.9]", "method.momentum=[0.99]"]).runs
    assert run.name == "training.momentum 0.9, method.momentum 0.99"


@pytest.mark.parametrize(
    ("axis", "fixed"),
    [
        ("training.learning_rate=[0.1,0.2]", "training.base_learning_rate=0.3"),
        ("training.max_steps=[10,20]", "training.num_train_epochs=3"),
    ],
)
def test_an_axis_without_effect_is_an_error(axis: str, fixed: str) -> None:
    key = axis.partition("=")[0]
    with pytest.raises(UserError, match=mentions(key, "equal", "remove")):
        load_sweep("smoke/simclr", [axis, fixed])
    assert len(load_sweep("smoke/simclr", [axis, "training.weight_decay=0.1"]).runs) == 2


def test_arms_of_an_older_version_had_no_start(tmp_path: Path) -> None:
    file, output = tmp_path / "four.yaml", tmp_path / "out"
    file.write_text(FOUR.replace("second: {start: first,", "second: {"))
    sweep = load_sweep(str(file))
    sweeps._check_plan(sweep, output)
    for run in sweep.runs[:2]:
        begin(run, output)
    stored = json.loads((output / "sweep.json").read_text())
    for key in ("command", "encoder", "start"):
        del stored["second"][key]
    (output / "sweep.json").write_text(json.dumps(stored))
    sweeps._check_plan(sweep, output)
    file.write_text(FOUR)
    with pytest.raises(UserError, match=mentions("start", "first", "another folder")):
        sweeps._check_plan(load_sweep(str(file)), output)


def test_settings_may_change_before_the_first_run(tmp_path: Path) -> None:
    """For example, after a mistake in data.path, which the first run reports."""
    for path in ("digits", str(tmp_path / "photos")):
        sweeps._check_plan(load_sweep("smoke/simclr", [*SMALL, f"data.path={path}"]), tmp_path / "out")
    stored = json.loads((tmp_path / "out/sweep.json").read_text())
    assert stored[""]["data.path"].startswith("photos (")


def test_the_settings_of_an_arm_may_change_until_one_of_its_runs_has_begun(tmp_path: Path) -> None:
    """A run with a wrong `data.path` or `encoder` leaves a file of its error and perhaps an empty folder."""
    file, output = tmp_path / "four.yaml", tmp_path / "out"
    file.write_text(FOUR)
    sweep = load_sweep(str(file), ["arms.published.encoder=wrong"])
    sweeps._check_plan(sweep, output)
    runs = {run.arm: run for run in sweep.runs}
    begin(runs["first"], output)
    failed = runs["published"].folder(output)
    failed.mkdir(parents=True)
    (failed.parent / f".{failed.name}.lock").touch()
    with pytest.raises(UserError, match=mentions("encoder", "another folder")):  # the run may be running
        sweeps._check_plan(load_sweep(str(file), ["arms.published.encoder=right"]), output)
    failed.with_name(f"{failed.name}-error.txt").write_text("encoder: expected an encoder, got wrong")
    sweeps._check_plan(load_sweep(str(file), ["arms.published.encoder=right"]), output)
    stored = json.loads((output / "sweep.json").read_text())
    assert stored["published"]["encoder"].startswith("right (") and stored.keys() >= {"first", "labels"}
    with pytest.raises(UserError, match=mentions("views.size", "another folder")):
        sweeps._check_plan(load_sweep(str(file), ["arms.first.views.size=12"]), output)


def test_a_wrong_number_of_a_job_claims_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("--job", "from 1 to 2")):
        sweeps.run_job(load_sweep("smoke/simclr", SMALL), tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=mentions("--at-once", 0)):
        run_sweep(load_sweep("smoke/simclr", SMALL), Command("smoke/simclr", SMALL, 1, tmp_path), at_once=0)


def test_a_second_attempt_forgets_the_error_of_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the page would show it for a run that another reason ended, such as too little memory."""
    sweep, states = load_sweep("smoke/simclr", SMALL), []
    error = sweeps.error_file(sweep.run(1).folder(tmp_path))

    def make(run: Any, output: Path) -> None:
        states.append(list_jobs(sweep, output)[0].split()[-1])
        run.folder(output).mkdir(parents=True, exist_ok=True)
        raise UserError("wrong") if len(states) == 1 else SystemExit(137)

    monkeypatch.setattr(sweeps, "_make", make)
    with pytest.raises(UserError, match="wrong"):
        sweeps.run_job(sweep, tmp_path, 1)
    assert error.read_text() == "wrong\n" and list_jobs(sweep, tmp_path)[0].endswith("failed")
    monkeypatch.setenv("RANK", "1")  # a further process of torchrun keeps the error of the first one
    with pytest.raises(SystemExit):
        sweeps.run_job(sweep, tmp_path, 1)
    assert error.exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        sweeps.run_job(sweep, tmp_path, 1)
    assert not error.exists() and states == ["do", "failed", "started"]


def test_two_commands_do_not_make_one_run_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = load_sweep("smoke/simclr", SMALL)
    made: list[str] = []

    def make(run: Any, output: Path) -> None:
        made.append(run.name)
        if len(made) < 3:
            sweeps.run_job(sweep, output, len(made))  # first the same run, then another one

    monkeypatch.setattr(sweeps, "_make", make)
    with pytest.raises(UserError, match=mentions("--job", "run 1")):
        sweeps.run_job(sweep, tmp_path, 1)
    sweeps.run_job(sweep, tmp_path, 1)
    assert len(set(made)) == 2 and made[0] == made[1]
    monkeypatch.setenv("RANK", "1")  # a further process of torchrun
    made.clear()
    with pytest.raises(UserError, match="--job"), sweeps._alone(sweep.run(1).folder(tmp_path), 1):
        monkeypatch.setenv("RANK", "0")
        sweeps.run_job(sweep, tmp_path, 1)


def test_runs_at_the_same_time_wait_for_the_encoder_from_which_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study.yaml"
    arms = "{a: {}, b: {start: a}, c: {start: b}, d: {}}"
    study.write_text(STUDY.partition("grid:")[0] + f"arms: {arms}\n")
    sweep, events = load_sweep(str(study), []), []
    other_ended = threading.Event()

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self.name = sweep.run(int(command[command.index("--job") + 1])).name
            events.append(f"{self.name} starts")

        def wait(self) -> int:
            if self.name == "d":
                other_ended.set()
            elif self.name == "a" and not other_ended.wait(20):
                events.append("d does not start")
            events.append(f"{self.name} ends")
            return 0

    def has_results(run: Any, output: Path) -> bool:
        return f"{run.name} ends" in events

    monkeypatch.setattr(sweeps, "subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setattr(sweeps, "has_results", has_results)
    monkeypatch.setattr(sweeps, "write_results", lambda *_: [])
    run_sweep(sweep, Command(str(study), [], None, tmp_path / "out"), at_once=2)
    assert [event for event in events if event[0] in "abc"] == [
        "a starts", "a ends", "b starts", "b ends", "c starts", "c ends",
    ]  # fmt: skip
    assert "d ends" in events and "d does not start" not in events


def test_a_run_that_was_killed_before_its_card_is_not_finished(tmp_path: Path) -> None:
    sweep = load_sweep("smoke/simclr", SMALL)
    folder = sweep.run(1).folder(tmp_path)
    folder.mkdir(parents=True)
    for name, state in (("facts.json", "started"), ("README.md", "finished")):
        (folder / name).touch()
        assert list_jobs(sweep, tmp_path)[0].endswith(state)


def test_results_of_deleted_runs_are_kept_but_not_their_encoders(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.partition("grid:")[0] + "arms: {a: {}, b: {start: a}, c: {}}\n")
    sweep, output = load_sweep(str(study), [], seeds=2), tmp_path / "out"
    output.mkdir()
    assert [sweep.run(number).name for number in Finished(output).missing(sweep)] == [
        "a",
        "a",
        "c",
        "c",
        "b",
        "b",
    ]

    def stored(*runs: tuple[str, int]) -> list[int]:
        empty = dict.fromkeys(("recipe", "evaluation", "results"))
        places = ({"arm": name, "name": name, "seed": seed, "history": []} for name, seed in runs)
        write_json(output / "runs.json", [empty | {"sweep": place} for place in places])
        return Finished(output).missing(sweep)

    names = [(run.name, run.seed) for run in sweep.runs]
    assert stored(*names) == []
    assert [names[number - 1] for number in stored(*names[:-1])] == [names[-1]]
    without = [name for name in names if name != ("b", 1)]
    assert [names[number - 1] for number in stored(*without)] == [("a", 1), ("b", 1)], "b starts from a"
    with pytest.raises(UserError, match=mentions("sweep.json", "runs.json")):
        run_sweep(sweep, Command(str(study), [], 2, output))


def test_an_arm_without_a_value_on_the_axis_is_a_line(tmp_path: Path) -> None:
    number = {
        "id": "a-1",
        "key": "a",
        "column": "accuracy",
        "text": "how",
        "standard_error": 0.1,
        "value": 0.5,
    }
    results: Any = {"trained": {"protocols": [number], "statistics": {"rank_me": 2.0}}}
    runs = [
        Measured(str(values), "", values, 0, {}, results, None, "photos")
        for values in ({"x": 1}, {"x": 2}, {})
    ]
    draw(runs, {"x": [1, 2]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_baselines_of_all_seeds_are_one_row() -> None:
    number = {"id": "a-1", "key": "a", "column": "accuracy", "text": "how", "standard_error": 0.1}

    def result(value: float) -> Any:
        return {"protocols": [number | {"value": value}], "statistics": {"rank_me": 2.0}}

    runs = [
        Measured(
            name,
            "",
            {},
            seed,
            {"seconds": 1.0},
            {"trained": result(0.9), "untrained": result(low)},
            None,
            "a",
        )
        for name, seed, low in (("one", 0, 0.1), ("one", 1, 0.3))
    ]
    text = page("title", "", runs, {})
    assert "| the same network without training | 20.0 ± 14.1 | 2.0 | - | 2 |" in text


def test_ranks_are_those_of_the_means() -> None:
    def run(name: str, seed: int, *values: float | None) -> Measured:
        numbers = [
            {
                "id": f"{key}-1",
                "key": key,
                "column": key,
                "text": "how",
                "standard_error": 0.1,
                "value": value,
            }
            for key, value in zip("ab", values, strict=True)
        ]
        result: Any = {"protocols": numbers, "statistics": {"rank_me": 2.0}}
        return Measured(name, "", {}, seed, {}, {"trained": result}, None, "photos")

    runs = [run("x", 0, 0.2, 0.9), run("x", 1, 0.4, 0.9), run("y", 0, 0.31, None), run("z", 0, 0.1, 0.9)]
    text = page("title", "", runs, {}, ranks=True)
    rows = text[text.index("Ranks") :].splitlines()[2:7]
    assert rows[2:] == ["| x | 2 | 1 |", "| y | 1 | - |", "| z | 3 | 1 |"]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("command: supervise", "command: train", ["arms.labels.command", "supervise"]),
        ("start: first", "start: labels", ["arms.second.start", "earlier"]),
        ("{command: supervise", "{start: first, command: supervise", ["arms.labels.start", "pretrain"]),
        (", encoder: ENCODER", "", ["arms.published.encoder", "none"]),
        ("first: {}", "first: {encoder: ENCODER}", ["arms.first.encoder", "evaluate"]),
        ("{command: evaluate,", "{settings: {views.size: 9}, command: evaluate,", ["views.size", "evaluate"]),
        ("training.warmup_epochs: 0", "method.temperature: 1", ["method.temperature", "supervise"]),
        ("[knn, embedding_rank]", "[knm]", ["study.curves", "knm", "knn"]),
        ("[memory,", "[memmory,", ["study.columns", "memmory", "memory"]),
    ],
)
def test_mistakes_in_arms_are_named(old: str, new: str, parts: list[str], tmp_path: Path) -> None:
    assert old in FOUR
    (tmp_path / "four.yaml").write_text(FOUR.replace(old, new))
    with pytest.raises(UserError, match=mentions(*parts)):
        load_sweep(str(tmp_path / "four.yaml"))


def test_a_run_that_fails_is_named_and_the_others_continue(
    tmp_path: Path, in_this_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep("smoke/simclr", SMALL)
    (sweep.runs[0].folder(tmp_path)).mkdir(parents=True)
    (sweep.runs[0].folder(tmp_path) / "notes.txt").write_text("something else")
    command = Command("smoke/simclr", SMALL, None, tmp_path)
    (measured,) = run_sweep(sweep, command)
    assert measured.name == "batch_size 64"
    text = (tmp_path / "README.md").read_text()
    assert "- Missing: batch_size 32, seed 0: training.output_dir: expected" in text
    assert [line.split()[-1] for line in list_jobs(sweep, tmp_path)] == ["failed", "finished"]
    assert main(["sweep", "smoke/simclr", *SMALL, "--output", str(tmp_path)]) == 2
    assert "got those of 1;" in capsys.readouterr().err
    (sweep.runs[0].folder(tmp_path) / "notes.txt").unlink()
    assert len(run_sweep(sweep, command)) == 2
    assert "Missing" not in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "sweep.json").read_text())[""]["method.temperature"] == 0.5


@pytest.mark.slow
def test_runs_of_a_changed_recipe_do_not_join_the_finished_ones(
    tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    recipe, output = tmp_path / "mine.yaml", tmp_path / "out"
    text = recipe_files()["smoke/simclr"].read_text()
    recipe.write_text(text)
    run_sweep(load_sweep(str(recipe), SMALL), Command(str(recipe), SMALL, None, output))
    recipe.write_text(text.replace("temperature: 0.5", "temperature: 0.4"))
    with pytest.raises(UserError, match=mentions("method.temperature", 0.5, 0.4, "another folder")):
        run_sweep(load_sweep(str(recipe), SMALL), Command(str(recipe), SMALL, None, output))


@pytest.mark.slow
def test_a_sweep_of_a_version_without_a_setting_of_some_views_continues(
    tmp_path: Path, in_this_process: list[list[str]]
) -> None:
    given = [*SMALL, "views.second={blur: 0.1}"]
    sweep, command = load_sweep("smoke/simclr", given), Command("smoke/simclr", given, None, tmp_path)
    run_sweep(sweep, command)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    del plan[""]["views.second"]["rotation"], plan[""]["views.rotation"]
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert len(run_sweep(sweep, command)) == 2 == len(in_this_process)


@pytest.mark.parametrize(
    ("places", "geometric"),
    [
        ([64, 128, 256], True), ([1, 4, 16], True), ([0.001, 0.01, 0.1], True), ([1, 10], True),
        ([0.1, 0.3, 0.5, 0.75, 0.9], False), ([0, 1, 10], False), ([10, 20, 30], False),
    ],
)  # fmt: skip
def test_an_axis_is_logarithmic_if_its_values_are(places: list, geometric: bool) -> None:
    assert _are_geometric(places) is geometric


def test_arms_with_the_same_folder_are_a_mistake(tmp_path: Path) -> None:
    for first, second in (("A+B", "A/B"), ("byol", "BYOL"), ("..", "x")):
        names = {"  flip:": f"  {json.dumps(first)}:", "  no flip:": f"  {json.dumps(second)}:"}
        text = STUDY.replace("grid: {method.temperature: [0.1, 0.5]}\n", "")
        for old, new in names.items():
            text = text.replace(old, new)
        (tmp_path / "names.yaml").write_text(text)
        with pytest.raises(UserError, match=mentions("arms", "rename")):
            load_sweep(str(tmp_path / "names.yaml"))


def test_the_command_precedes_the_study(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(STUDY.replace("views.flip: 0.0", "training.batch_size: 16"))
    sweep = load_sweep(str(tmp_path / "two.yaml"), ["method.temperature=0.7", "training.batch_size=64"])
    recipes = [load_recipe(run.recipe, run.overrides) for run in sweep.runs]
    assert [each.method["temperature"] for each in recipes] == [0.7, 0.7]
    assert [each.training["batch_size"] for each in recipes] == [64, 64]
    other = load_sweep("smoke/simclr", ["training.batch_size=[32,64]", "method={name: byol, momentum: 0.9}"])
    assert {load_recipe(run.recipe, run.overrides).method["name"] for run in other.runs} == {"byol"}
    with pytest.raises(UserError, match=mentions("training.seed", "--seeds")):
        load_sweep("smoke/simclr", ["training={seed: 3}", "method.temperature=[0.1, 0.5]"])


@pytest.mark.parametrize("during", ["start", "wait"])
def test_runs_end_with_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    """SIGTERM reaches only the sweep, for example from a scheduler. Its run then saves a checkpoint.

    A run that is just being started also gets the signal.
    """
    ended = threading.Event()
    started: list[Any] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(self)
            assert env[SWEEP_VARIABLE] == str(os.getpid())
            if during == "start":
                os.kill(os.getpid(), signal.SIGTERM)
                ended.wait(0.5)  # without a lock, the sweep would look for running processes now

        def wait(self) -> int:
            if during == "wait":
                os.kill(os.getpid(), signal.SIGTERM)
            return 143 if ended.wait(60) else 0

        def terminate(self) -> None:
            ended.set()

    monkeypatch.setattr(sweeps, "subprocess", SimpleNamespace(Popen=Process))
    with pytest.raises(SystemExit) as error:
        main(["sweep", "smoke/simclr", *SMALL, "--output", str(tmp_path)])
    assert error.value.code == 143 and ended.is_set() and len(started) == 1


SWEEP = """import os, subprocess, sys
from hf_ssl.signals import SWEEP
run = [sys.executable, "-c", sys.argv[1], "sweep", "smoke/simclr", "--job", "1"]
subprocess.Popen(run, env=os.environ | {SWEEP: str(os.getpid())}).wait()"""
RUN = """import sys, time
from hf_ssl import cli, commands, signals

def loads_torch(text):
    print("started", flush=True)
    time.sleep(3 if signals.stopping.is_set() else 20)
    print("survived", flush=True)
    sys.exit()

commands.progress = loads_torch
cli.main()"""


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_run_ends_after_its_sweep_was_killed(is_stopping: bool) -> None:
    """`kill -9` reaches only the sweep, which then cannot end its runs.

    A run that is already stopping gets no second signal, which would prevent its checkpoint.
    """
    run = RUN.replace("cli.main()", "signals.stopping.set()\ncli.main()") if is_stopping else RUN
    command = [sys.executable, "-c", SWEEP, run]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        assert sweep.stdout is not None and sweep.stdout.readline() == "started\n"
        sweep.kill()
        output, errors = sweep.communicate()  # until the run has ended
    assert output == ("survived\n" if is_stopping else "")
    assert ("terminated; the same command continues" in errors) != is_stopping


def test_texts_stay_texts_and_axes_may_give_what_a_recipe_lacks(tmp_path: Path) -> None:
    text = STUDY.replace("views.flip: 0.0", 'training.run_name: "1", views.flip: 0.0')
    (tmp_path / "texts.yaml").write_text(text)
    (*_, last) = load_sweep(str(tmp_path / "texts.yaml")).runs
    assert load_recipe(last.recipe, last.overrides).training["run_name"] == "1"
    sweep = load_sweep("simclr_resnet10_imagenette", ["data.path=[digits, photos]"])
    assert [run.values["data.path"] for run in sweep.runs] == ["digits", "photos"]


def test_numbers_that_are_not_finite_are_shown_as_missing(tmp_path: Path) -> None:
    number = {
        "id": "a-1",
        "key": "a",
        "column": "accuracy",
        "text": "how",
        "value": None,
        "standard_error": None,
    }
    result: Any = {"protocols": [number], "statistics": {"rank_me": 2.0}}
    runs = [
        Measured(
            "size 1",
            "",
            {"x.size": size},
            0,
            {"seconds": 1.0},
            {"trained": result, "untrained": result},
            None,
            "photos",
        )
        for size in (1, 2)
    ]
    assert "| - |" in page("title", "", runs, {})
    draw(runs, {"x.size": [1, 2]}, tmp_path / "plot.png")
    assert csv_text(runs, ["x.size"]).count("accuracy,a-1,,,") == 4
    finite: Any = result | {"protocols": [number | {"value": 0.5, "standard_error": 0.1}]}
    more = [*runs, replace(runs[0], results={"trained": finite})]
    assert "| 50.0 ± 10.0 (1 of 3) |" in page("title", "", more, {})
    unlabeled = [replace(run, results={}) for run in runs]
    assert "no accuracy" in page("title", "", unlabeled, {})
    assert len(csv_text(unlabeled, ["x.size"]).splitlines()) == 3


def test_the_command_of_a_run_is_the_command_of_the_sweep(tmp_path: Path) -> None:
    command = Command("smoke/simclr", SMALL, 3, tmp_path).of_job(2)
    assert command[1:5] == ["-m", "hf_ssl", "sweep", "smoke/simclr"]
    assert command[5:] == [*SMALL, "--output", str(tmp_path), "--job", "2", "--seeds", "3"]
