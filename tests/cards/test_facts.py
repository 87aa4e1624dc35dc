# SPDX-License-Identifier: Apache-2.0
"""Tests of facts.json, results files, the environment, and the removal of private information."""

import copy
import json
import os
import platform
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from example_facts import new_facts
from messages import mentions

import hf_ssl
from hf_ssl import cards, hub
from hf_ssl.cards import (
    append_result,
    environment,
    last_part,
    read_facts,
    remove_private,
    write_facts,
)
from hf_ssl.cards.facts import check_facts
from hf_ssl.cards.privacy import encoder_name, folder_name, public_facts
from hf_ssl.errors import UserError
from hf_ssl.files import local_folder


def test_facts_are_read_as_they_were_written(facts: dict, tmp_path: Path) -> None:
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == public_facts(facts)
    text = (tmp_path / "facts.json").read_text()
    assert "jane" not in text and "hf_aaa" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    # Facts that were read are written without a change.
    write_facts(tmp_path, read_facts(tmp_path))
    assert (tmp_path / "facts.json").read_text() == text


def test_the_facts_of_the_caller_are_not_changed(facts: dict) -> None:
    path = facts["recipe"]["sections"]["data"]["path"]
    public_facts(facts)
    assert facts["recipe"]["sections"]["data"]["path"] == path
    assert facts["recipe"]["overrides"][0] == f"data.path={path}"


def test_the_path_in_an_override_of_a_whole_section(facts: dict) -> None:
    facts["recipe"]["overrides"] = ["data={path: /home/jane/cifar10, channels: 3}"]
    (override,) = public_facts(facts)["recipe"]["overrides"]
    assert override == 'data={"path": "./cifar10", "channels": 3}'
    assert public_facts(public_facts(facts))["recipe"]["overrides"] == [override]


def test_facts_that_cannot_be_read(facts: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("facts.json", "No such file")):
        read_facts(tmp_path)
    (tmp_path / "facts.json").write_text("{half")
    with pytest.raises(UserError, match=mentions("JSON", "facts.json")):
        read_facts(tmp_path)
    del facts["seed" if "seed" in facts else "date"]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=mentions("date")):
        read_facts(tmp_path)


def test_numbers_that_json_cannot_store(facts: dict, tmp_path: Path) -> None:
    facts["training"]["final_loss"] = float("inf")
    facts["training"]["images_per_second"] = np.float32(2.5)
    facts["training"]["steps"] = torch.tensor(7)
    facts["recipe"]["sections"]["views"] = {"scale": (0.2, 1.0)}
    write_facts(tmp_path, facts)
    training = read_facts(tmp_path)["training"]
    assert (training["final_loss"], training["images_per_second"], training["steps"]) == (None, 2.5, 7)
    assert read_facts(tmp_path)["recipe"]["sections"]["views"] == {"scale": [0.2, 1.0]}
    facts["notes"] = [Path("x")]
    with pytest.raises(TypeError, match=mentions("plain")):
        write_facts(tmp_path, facts)


def test_facts_of_older_versions_get_the_defaults(facts: dict, tmp_path: Path) -> None:
    assert "notes" not in facts and "choices" not in facts["training"]
    before = copy.deepcopy(facts)
    checked = check_facts(facts)
    assert (checked["notes"], checked["training"]["choices"]) == ([], {})
    assert facts == before
    (tmp_path / "facts.json").write_text(json.dumps(public_facts(facts)))
    assert read_facts(tmp_path) == public_facts(facts)


def test_facts_with_old_names_get_the_current_ones(facts: dict, tmp_path: Path) -> None:
    text = json.dumps(public_facts(facts))
    assert text.count("neighbors") > 2
    (tmp_path / "facts.json").write_text(text.replace("neighbors", "neighbours"))
    assert read_facts(tmp_path) == public_facts(facts)


def test_sections_are_dicts(facts: dict) -> None:
    for section in ("results", "training"):
        with pytest.raises(UserError, match=mentions(f"facts.{section}", "dict", "list")):
            check_facts(facts | {section: []})
    with pytest.raises(UserError, match=mentions("facts", "dict", "list")):
        check_facts([])


def test_notes_are_texts(facts: dict) -> None:
    check_facts(facts | {"notes": ["a"]})
    with pytest.raises(UserError, match=mentions("facts.notes[0]", "None")):
        check_facts(facts | {"notes": [None]})


def test_runs_are_appended_to_their_recipe(facts: dict, tmp_path: Path) -> None:
    path = append_result(tmp_path, "smoke/simclr", facts)
    assert path == tmp_path / "smoke" / "simclr.json"
    facts["training"]["seed"] = 4
    append_result(tmp_path, "smoke/simclr", facts)
    entries = json.loads(path.read_text())
    assert [entry["seed"] for entry in entries] == [3, 4]
    entry = entries[0]
    assert entry["data"]["revision"] == "0123456789abcdef"
    assert entry["environment"]["device"] == "AMD EPYC"
    assert entry["results"] == json.loads(json.dumps(facts["results"]))
    assert list(entry["backbone"]) == ["class_name", "parameters", "feature_size", "image_size"]
    assert entry["overrides"] == ["data.path=./cifar10", "training.max_steps=400"]
    assert "jane" not in path.read_text()
    assert [item.name for item in path.parent.iterdir()] == ["simclr.json"]


def test_another_file_in_place_of_results_stays_unchanged(facts: dict, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for text, parts in (
        ("[{half", ["JSON", "recipe.json"]),
        ('{"a": 1}', ["list", "recipe.json"]),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=mentions(*parts)):
            append_result(tmp_path, "recipe", facts)
        assert path.read_text() == text


def test_runs_that_end_at_the_same_time_are_all_appended(tmp_path: Path) -> None:
    def one(seed: int) -> None:
        mine = new_facts()
        mine["training"]["seed"] = seed
        append_result(tmp_path, "recipe", mine)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = json.loads((tmp_path / "recipe.json").read_text())
    assert sorted(entry["seed"] for entry in entries) == list(range(8))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/jane/my photos/dogs/", "dogs"),
        ("~/photos", "photos"),
        ("../shared/cifar10", "cifar10"),
        ("./dogs", "./dogs"),
        ("./my/dogs", "dogs"),
        ("C:\\Users\\jane\\dogs", "dogs"),
        ("\\\\server\\jane\\dogs", "dogs"),
        ("/data/*.parquet", "*.parquet"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("data.path=/home/jane/my photos", "data.path=my photos"),
        ("data.path=uoft-cs/cifar10", "data.path=uoft-cs/cifar10"),
        ("training.hub_token=abc", "training.hub_token=(removed)"),
        ("cannot read /home/jane/a.png, row 3", "cannot read a.png, row 3"),
        ("'/home/jane/a.png'", "'a.png'"),
        ("images/s and BN/bias at 20-NN, T 0.07", "images/s and BN/bias at 20-NN, T 0.07"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("https://jane:pw@host.org/a?token=x#y", "https://host.org/a"),
        ("file:///home/jane/dogs", "dogs"),
        ("hf_" + "x" * 34, "(removed)"),
        ("hf_ssl and hf_hub_offline", "hf_ssl and hf_hub_offline"),
        (
            {"hub_token": "abc", "api_key": "x", "use_mask_token": True, "cls_token": None},
            {"use_mask_token": True, "cls_token": None},
        ),
        ([1, (2.5, float("nan")), True, None], [1, [2.5, None], True, None]),
        ({1: np.int64(3), "a": np.float64(0.5)}, {"1": 3, "a": 0.5}),
    ],
)  # fmt: skip
def test_private_information_is_removed(value, expected) -> None:
    assert remove_private(value) == expected
    assert remove_private(remove_private(value)) == expected


def test_the_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [folder_name(path) for path in (".", "photos", "a/b/..", Path("a"))]
    assert names == [tmp_path.name, "photos", "a", "a"]


def test_the_home_folder_is_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "enc").mkdir()
    assert local_folder("~/enc") == tmp_path / "enc" and local_folder("user/enc") is None
    assert [encoder_name(place) for place in ("~/enc", "user/enc")] == ["enc", "user/enc"]


def test_last_part() -> None:
    assert [last_part(path) for path in ("a/b/c", "c", "/", "..", "a\\b", "~")] == [
        "c",
        "c",
        ".",
        ".",
        "b",
        ".",
    ]


def test_environment_contains_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment()
    assert found["packages"]["hf_ssl"] == hf_ssl.__version__  # also if only its sources are on the path
    assert found["python"] == platform.python_version()
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0]
        or found["packages"]["torch"] == torch.__version__
    )
    assert "transformers" in found["packages"]
    assert found["device"] and found["cores"] >= 1 and found["devices"] == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert environment()["cores"] == 1  # as in a container
    assert platform.node() not in json.dumps(found)
    assert environment("cpu", processes=4)["devices"] == 4


@pytest.mark.parametrize("name", cards.__all__)
def test_names_that_moved_from_hub_are_deprecated(name: str) -> None:
    old = {"remove_private": "public"}.get(name, name)
    with pytest.warns(DeprecationWarning, match=mentions(f"hf_ssl.hub.{old}", f"hf_ssl.cards.{name}")):
        assert getattr(hub, old) is getattr(cards, name)


def test_the_old_name_of_remove_private_is_deprecated() -> None:
    with pytest.warns(
        DeprecationWarning, match=mentions("hf_ssl.cards.public", "hf_ssl.cards.remove_private")
    ):
        assert cards.public is remove_private
