# SPDX-License-Identifier: Apache-2.0
"""Whoever reads a card can measure its numbers again with the line that it gives."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from hf_ssl import run
from hf_ssl.hub.facts import public_facts
from hf_ssl.hub.wording import check_command
from hf_ssl.recipe import read_sections


def test_the_card_of_a_run_says_how_to_measure_it_again(finished_run: Path) -> None:
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    command = re.search(r"```sh\n(hf-ssl evaluate .*)\n```", card)
    assert command is not None
    verb, model, *overrides = shlex.split(command[1])[1:]
    assert (verb, model) == ("evaluate", finished_run.name)
    again = run.evaluate(str(finished_run), *read_sections(overrides))
    recorded = json.loads((finished_run / "facts.json").read_text(encoding="utf-8"))["results"]
    for name, before in (("encoder", "trained"), ("raw_pixels", "raw_pixels")):
        for key in ("protocol", "images", "knn", "linear", "few_labels"):
            assert again[name][key] == recorded[before][key], (name, key)


def test_settings_that_change_what_is_measured_are_given(facts: dict[str, Any]) -> None:
    measured = {
        "data.name": "fine",
        "data.label_column": "fine label",
        "data.channels": 1,
        "evaluation.precision": "bfloat16",
        "evaluation.test_split": "train[90%:]",
        "evaluation.few_labels": [1, 10],
        "evaluation.linear_standardize": True,
        "evaluation.max_test_images": 100,
    }
    others = {"data.cache": "memory", "data.split": "unlabelled", "evaluation.results_dir": "tables"}
    facts["recipe"]["differences"] |= measured | others
    overrides = shlex.split(check_command(public_facts(facts)))[3:]
    data, evaluation = read_sections(overrides)
    assert data.path == "cifar10"
    sections = {"data": data, "evaluation": evaluation}
    for setting, value in measured.items():
        section, key = setting.split(".")
        assert getattr(sections[section], key) == value
    assert (data.cache, data.split, evaluation.results_dir) == ("auto", "train", None)


def test_data_of_the_hub_are_those_of_that_day(facts: dict[str, Any]) -> None:
    assert "revision" not in check_command(facts)  # a fingerprint of local files is nothing to ask for
    facts["data"] |= {"hub_id": "open/cifar10", "name": "open/cifar10"}
    facts["recipe"]["sections"]["data"]["path"] = "open/cifar10"
    facts["recipe"]["differences"]["data.revision"] = "main"
    data, _ = read_sections(shlex.split(check_command(facts))[3:])
    assert (data.path, data.revision) == ("open/cifar10", "0123456789abcdef")
