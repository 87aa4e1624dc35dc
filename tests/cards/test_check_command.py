# SPDX-License-Identifier: Apache-2.0
"""Tests that the command on a card repeats the evaluation."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_ssl import run
from hf_ssl.cards.privacy import public_facts
from hf_ssl.cards.text import check_command
from hf_ssl.data import DataConfig
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.recipe import read_sections
from hf_ssl.recording import public_name


def read(facts: dict[str, Any]) -> tuple[DataConfig, EvaluationConfig]:
    """Return the settings of the command for public facts."""
    return read_sections(shlex.split(check_command(public_facts(facts)))[3:])


def test_a_local_folder_with_the_name_of_the_built_in_data(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "digits"
    folder.mkdir()
    for path, expected in (("digits", "digits"), (str(folder), "./digits"), ("./digits", "./digits")):
        name, hub_id = public_name(DataConfig(path=path))
        facts["evaluation"] |= {"name": name, "hub_id": hub_id}
        assert read(facts)[0].path == expected


def test_the_command_on_the_card_repeats_the_evaluation(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    command = re.search(r"```sh\n(hf-ssl evaluate .*)\n```", card)
    assert command is not None
    verb, model, *overrides = shlex.split(command[1])[1:]
    assert verb == "evaluate"
    monkeypatch.chdir(finished_run.parent)  # the folder that contains the encoder
    again = run.evaluate(model, *read_sections(overrides))
    facts = json.loads((finished_run / "facts.json").read_text(encoding="utf-8"))
    for name, before in (("encoder", "trained"), ("raw_pixels", "raw_pixels")):
        for key in ("protocols", "images", "features", "revision"):
            assert again[name][key] == facts["results"][before][key], (name, key)
    assert f"revision of the images: {facts['evaluation']['revision']}\n" in capsys.readouterr().out


def test_the_command_contains_settings_that_change_the_results(facts: dict[str, Any]) -> None:
    measured = {
        "data.name": "fine",
        "data.label_column": "fine label",
        "data.channels": 1,
        "data.box_format": "xyxy",
        "data.max_broken_fraction": 0.5,
        "evaluation.precision": "bfloat16",
        "evaluation.test_split": "train[90%:]",
        "evaluation.protocols": ["knn", "linear"],
        "evaluation.settings": {"linear": {"standardize": True}},
        "evaluation.max_test_images": 100,
    }
    others = {
        "data.cache": "memory",
        "data.split": "unlabeled",
        "training.monitor_steps": 7,
        "evaluation.results_dir": "tables",
        "evaluation.cache_dir": "features",
        "evaluation.batch_size": 32,
    }
    facts["recipe"]["differences"] |= measured | others
    data, evaluation = read(facts)
    assert data.path == "./cifar10"  # not a data set with this name on the Hub
    sections = {"data": data, "evaluation": evaluation}
    for setting, value in measured.items():
        section, key = setting.split(".")
        assert getattr(sections[section], key) == value
    assert (data.cache, data.split, evaluation.results_dir) == ("auto", "train", None)
    assert (evaluation.cache_dir, evaluation.batch_size) == (None, 256)


@pytest.mark.parametrize(
    "text",
    ["1.10", "2019_2020", "010", "yes", "Null", "a: b", "a:", "x #1", "*.parquet", "été", "'", '"', "[a"],
)
def test_texts_are_quoted(facts: dict[str, Any], text: str) -> None:
    facts["recipe"]["differences"] |= {"data.name": text, "data.label_column": text}
    facts["evaluation"]["name"] = text
    data, _ = read(facts)
    assert (data.path, data.name, data.label_column) == (f"./{text}", text, text)


def test_further_image_columns_are_no_candidates_for_the_image(facts: dict[str, Any]) -> None:
    columns = {"depth": "gray", "parts.png": "classes"}
    facts["recipe"]["differences"] = {"data.further_image_columns": columns}
    assert read(facts)[0].further_image_columns == columns


def test_data_of_the_hub_have_the_evaluated_revision(facts: dict[str, Any]) -> None:
    assert "revision" not in check_command(facts)  # a fingerprint of local files is not a revision to load
    facts["evaluation"] |= {"hub_id": "open/cifar10", "name": "open/cifar10"}
    facts["recipe"]["differences"]["data.revision"] = "main"
    data, _ = read(facts)
    assert (data.path, data.revision) == ("open/cifar10", "0123456789abcdef")


def test_separate_evaluation_images(facts: dict[str, Any]) -> None:
    """The card does not contain their location; the columns of the training data do not apply to them."""
    facts["recipe"]["sections"]["evaluation"]["path"] = "clients/acme/labeled"
    facts["recipe"]["differences"] |= {
        "evaluation.path": "clients/acme/labeled",
        "data.name": "fine",
        "data.label_column": "fine",
        "data.channels": 1,
    }
    facts["evaluation"] |= {"name": "labeled"}
    public = public_facts(facts)
    assert "acme" not in json.dumps(public) and "acme" not in check_command(public)
    data, evaluation = read(facts)
    assert (data.path, data.name, data.label_column) == ("./labeled", None, None)
    assert (data.channels, evaluation.path) == (1, None)


def test_no_command_without_an_evaluation(facts: dict[str, Any]) -> None:
    assert check_command(facts | {"evaluation": None, "results": {}, "unmeasured": "no labels"}) == ""
