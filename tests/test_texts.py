# SPDX-License-Identifier: Apache-2.0
"""Fields that hold texts take the text as it is typed, on the command line and in files."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from messages import mentions

from hf_ssl.errors import UserError
from hf_ssl.recipe import load_recipe, read_sections
from hf_ssl.recipe.source import apply_overrides, read_yaml
from hf_ssl.recipe.texts import holds_texts
from hf_ssl.suite_file import load_suite
from hf_ssl.sweep_file import load_sweep

# What YAML 1.1 reads as something else: numbers, base 60, base 16, infinity, true and false, aliases, ...
CHANGED = (
    "2024_05_01", "007", "12:30", "1.10", "1e3", "0x1F", ".inf", ".nan", "on", "no", "Yes", "off", "true",
    "*.tar", "&a", "a: b", "a #b", "!x", "%x", "@x", "|", ">", "- a", "2024-01-01", "1_000.5", "? a",
)  # fmt: skip


@pytest.mark.parametrize("text", CHANGED)
def test_a_text_on_the_command_line_is_the_typed_one(text: str) -> None:
    keys = ("data.name", "data.revision", "data.path", "evaluation.test_split", "evaluation.results_dir")
    data, evaluation = read_sections([f"{key}={text}" for key in keys])
    found = (data.name, data.revision, data.path, evaluation.test_split, evaluation.results_dir)
    assert found == (text,) * len(keys)


def test_texts_of_a_recipe_are_the_typed_ones(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    lines = (
        Path(load_recipe("smoke/simclr").path)
        .read_text(encoding="utf-8")
        .replace("path: digits", "path: 007")
    )
    file.write_text(lines + 'publish: {tags: [on, 1.10, "a", null_], title: 12:30}\n', encoding="utf-8")
    overrides = ["training.output_dir=2024_05_01", "training.run_name=007", "training.logging_steps=1_0"]
    recipe = load_recipe(file, overrides)
    assert recipe.data.path == "007"
    assert (recipe.publish.tags, recipe.publish.title) == (["on", "1.10", "a", "null_"], "12:30")
    assert (recipe.training["output_dir"], recipe.training["run_name"]) == ("2024_05_01", "007")
    assert recipe.training["logging_steps"] == 10, "a field for numbers keeps the number"
    assert load_recipe(file, ["publish.tags=[007,on]"]).publish.tags == ["007", "on"]
    assert load_recipe(file, ["publish={tags: [no]}"]).publish.tags == ["no"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ('data.name="007"', "007"),
        ("data.name='a b'", "a b"),
        ("data.name=null", None),
        ("data.name=~", None),
        ("data.name=", None),
        ("data.max_images=1_000", 1000),
        ("data.streaming=on", True),
        ("data.max_broken_fraction=1e-1", 0.1),
        ("data.further_image_columns={007: gray}", {"007": "gray"}),
        ("evaluation.protocols=[knn,007]", ["knn", "007"]),
        ("evaluation.settings.fine_tune.folder=007", "007"),
        ("evaluation.settings.knn.neighbors=[007, 0x10]", [7, 16]),
    ],
)
def test_quotes_null_lists_and_numbers_are_yaml(override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".", 1)
    found: Any = apply_overrides({}, [override])[section]
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ("training", "max_steps", "0100"), ("training", "learning_rate", "1:30.5"),
        ("data", "max_images", "+010"), ("evaluation", "settings.knn.neighbors", "[1, 010]"),
        ("method", "projection_size", "1:30"),
    ],
)  # fmt: skip
def test_a_number_that_is_not_decimal_is_an_error(section: str, key: str, text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 0100 as 64 and 1:30 as 90. Before, a run with `training.max_steps=0100` had 64 steps."""
    parts = mentions(f"{section}.{key}", text.strip("[]").rpartition(" ")[2], "decimal")
    with pytest.raises(UserError, match=parts):
        apply_overrides({}, [f"{section}.{key}={text}"])
    file = tmp_path / "own.yaml"
    *groups, last = section, *key.split(".")
    indented = "".join("  " * depth + f"{name}:\n" for depth, name in enumerate(groups))
    file.write_text(f"{indented}{'  ' * len(groups)}{last}: {text}\n", encoding="utf-8")
    with pytest.raises(UserError, match=parts):
        read_yaml(file)


def test_texts_of_a_sweep_are_the_typed_ones(tmp_path: Path) -> None:
    sweep = load_sweep("smoke/simclr", ["data.revision=[007,1.10]", "data.name=on"])
    assert sweep.axes == {"data.revision": ["007", "1.10"]}
    assert [run.folder(Path()).parent.name for run in sweep.runs] == ["revision_007", "revision_1.10"]
    recipes = [load_recipe(run.recipe, run.overrides) for run in sweep.runs]
    assert [recipe.data.revision for recipe in recipes] == ["007", "1.10"]
    assert {recipe.data.name for recipe in recipes} == {"on"}
    study = tmp_path / "study.yaml"
    study.write_text(
        "study: {title: 12:30, question: 007, recipe: smoke/simclr}\n"
        "settings: {data.revision: 1.10}\n"
        "grid: {data.name: [007, no]}\n"
        "arms: {007: {settings: {evaluation.results_dir: 2024_05_01}}, on: {}}\n",
        encoding="utf-8",
    )
    sweep = load_sweep(str(study))
    assert (sweep.study.title, sweep.study.question) == ("12:30", "007")
    assert [(run.arm, run.values["data.name"]) for run in sweep.runs] == [
        ("007", "007"), ("007", "no"), ("on", "007"), ("on", "no"),
    ]  # fmt: skip
    first = load_recipe(sweep.runs[0].recipe, sweep.runs[0].overrides)
    assert (first.data.revision, first.evaluation.results_dir) == ("1.10", "2024_05_01")


def test_texts_of_a_suite_are_the_typed_ones(tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "suite: {title: 1.10, root: 007}\n"
        "groups: {on: {protocols: [knn]}}\n"
        "entries: {12:30: {data: {path: 2024_05_01, name: no}}}\n".replace("12:30", "010"),
        encoding="utf-8",
    )
    found = load_suite(str(suite), ["entries.010.data.revision=007"])
    [job] = found.jobs
    assert (found.title, job.entry, job.group) == ("1.10", "010", "on")
    assert (job.data.name, job.data.revision) == ("no", "007")
    assert Path(job.data.path).parts[-2:] == ("007", "2024_05_01")


def test_a_text_is_never_an_interpolation() -> None:
    with pytest.raises(UserError):
        read_sections(["data.name=${oc.env:HOME}"])


def test_fields_that_hold_texts() -> None:
    from hf_ssl.trainer.arguments import SSLTrainingArguments

    names = {item.name for item in dataclasses.fields(SSLTrainingArguments)}
    texts = {name for name in names if holds_texts(f"training.{name}")}
    assert {"output_dir", "run_name", "hub_model_id", "report_to", "optimizer", "precision"} <= texts
    others = {
        "learning_rate",
        "eval_strategy",
        "bf16",
        "save_steps",
        "lr_scheduler_kwargs",
        "max_steps",
        "lars",
    }
    assert not others & texts and others <= names
    assert holds_texts("training.lars.variant") and not holds_texts("training.lars.clip")
    assert not holds_texts("training") and not holds_texts("data.unknown") and not holds_texts("data.path.x")
