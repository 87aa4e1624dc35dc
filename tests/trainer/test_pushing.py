# SPDX-License-Identifier: Apache-2.0
"""Tests of `training.push_to_hub`: the time and the content of each push, and that weights stay equal."""

import json
import os
import warnings
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from messages import mentions, missing
from safetensors.torch import load_file

from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer, pretrain, train

REPO = "someone/pushed"
ENCODER = {
    "README.md", "config.json", "model.safetensors", "preprocessor_config.json", "pretraining/config.json",
    "pretraining/model.safetensors",
}  # fmt: skip


def recipe(folder: Path, strategy: str, *overrides: str):
    return load_recipe(
        "smoke/simclr",
        [
            f"training.output_dir={folder}", "training.monitor_steps=0", "training.push_to_hub=true",
            f"training.hub_strategy={strategy}", f"publish.repo_id={REPO}",
            "training.hub_always_push=true", *overrides,
        ],
    )  # fmt: skip


def kind(files: dict, name: str = "config.json") -> str:
    return json.loads(files[name].data)["model_type"]


def test_every_save_and_the_end(online: HubServer, finished_run: Path, tmp_path: Path) -> None:
    old = {
        "facts.json": b"{}",
        ".eval_results/hf_ssl.yaml": b"[]",
        "README.md": b"# old",
        "NOTES.md": b"mine",
    }
    repo = online.store.add_repo("models", REPO, old)
    folder = tmp_path / "digits"
    pretrain(recipe(folder, "every_save"))
    *_, first, second, last = repo.commits
    assert [commit.summary for commit in repo.commits[2:]] == [
        "Training in progress, step 4", "Training in progress, step 8", "End of training",
    ]  # fmt: skip
    assert set(first.files) == ENCODER | {".gitattributes", "NOTES.md"}, (
        "results of another encoder are deleted"
    )
    for commit in (first, second, last):
        assert (
            kind(commit.files) == "resnet" and kind(commit.files, "pretraining/config.json") == "ssl_simclr"
        )
        assert commit.files["NOTES.md"].data == b"mine"
    unfinished = first.files["README.md"].data
    assert b"step 4 of 8" in unfinished and b"pipeline_tag: image-feature-extraction" in unfinished
    assert first.files["model.safetensors"].data != second.files["model.safetensors"].data
    assert "model.safetensors" not in last.added and b"model-index" in last.files["README.md"].data
    assert publish(folder, REPO).uploaded == (), "equal to the upload of hf-ssl publish"
    for name in ("model.safetensors", "pretraining/model.safetensors"):  # a push changes no weight
        ours, without = (load_file(each / name) for each in (folder, finished_run))
        # Not bit for bit: another process made the other run, and torch's kernels depend on addresses.
        torch.testing.assert_close(ours, without, rtol=0, atol=1e-3)
    assert not [name for name in os.listdir(folder) if name.startswith("_writing")]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_with_optimizer_state_are_deprecated(
    online: HubServer, tmp_path: Path, strategy: str
) -> None:
    chosen = recipe(tmp_path / "digits", strategy)
    with pytest.warns(FutureWarning, match=mentions("training.hub_strategy", strategy, "every_save")):
        trainer = build_trainer(chosen, chosen.training_arguments())
    trainer._push_from_checkpoint("checkpoint-0")
    trainer._finish_current_push()
    assert set(online.store.model(REPO).head.added) == ENCODER


def test_push_to_hub_itself(online: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    options = ("training.save_total_limit=1", "training.save_steps=2", "training.hub_private_repo=true")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = train(recipe(folder, "every_save", *options))
    repo = online.store.model(REPO)
    summaries = [commit.summary for commit in repo.commits[1:]]
    assert summaries == [f"Training in progress, step {step}" for step in (2, 4, 6, 8)]
    assert set(repo.head.files) == ENCODER | {".gitattributes"}, "no checkpoint and no optimizer state"
    assert kind(repo.head.files) == "resnet" and repo.private
    assert not (folder / "config.json").exists()

    repo.commit("main", "by hand", online.store.blobs({"config.json": b"{}", "NOTES.md": b"mine"}))
    done = trainer.push_to_hub("Once more")
    assert (done.repo_id, done.uploaded, repo.head.summary) == (REPO, ("config.json",), "Once more")
    assert kind(repo.head.files) == "resnet" and repo.head.files["NOTES.md"].data == b"mine"

    (folder / "README.md").write_text(f"# An encoder in {folder}")
    with pytest.raises(UserError, match=mentions("README.md", "path", "folder")):
        trainer.push_to_hub()


@pytest.mark.slow
def test_a_push_only_at_the_end_that_fails(online: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    online.fail("POST .*/commit/", status=400, times=1000)
    with pytest.raises(UserError) as caught:
        pretrain(recipe(folder, "end"))
    assert missing(str(caught.value), f"hf-ssl publish {folder} {REPO}") == []
    assert online.count("POST .*/commit/") == 1 and (folder / "README.md").is_file()
    online.heal()
    pretrain(recipe(folder, "every_save"))  # the same run, because the strategy changes no weight
    assert [commit.summary for commit in online.store.model(REPO).commits[1:]] == ["End of training"]


def test_a_missing_token_is_an_error_before_training(
    online: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=mentions("token", "hf auth login")):
        pretrain(recipe(tmp_path / "digits", "end"))
    assert not (tmp_path / "digits").exists()


def test_both_keys_of_the_repository() -> None:
    def load(*overrides: str):
        return load_recipe("smoke/simclr", ["training.output_dir=x", *overrides])

    by_training = load(
        "training.hub_model_id=a/b", "training.hub_private_repo=true", "training.hub_token=hf_x"
    )
    by_publish = load("publish.repo_id=a/b", "publish.private=true")
    assert by_training.publish == by_publish.publish
    for chosen in (by_training, by_publish):
        arguments = chosen.training_arguments()
        assert (arguments.hub_model_id, arguments.hub_private_repo) == ("a/b", True)
    assert by_training.training_arguments().hub_token == "hf_x" and "hf_x" not in str(by_training.to_dict())
    load("training.hub_model_id=a/b", "publish.repo_id=a/b")
    with pytest.raises(UserError, match=mentions("publish.repo_id", "c", "training.hub_model_id", "a/b")):
        load("training.hub_model_id=a/b", "publish.repo_id=c")


def test_one_push_at_a_time_by_default(online: HubServer, tmp_path: Path) -> None:
    chosen = recipe(tmp_path / "digits", "every_save", "training.hub_always_push=false")
    trainer = build_trainer(chosen, chosen.training_arguments())
    busy: Future = Future()
    trainer._pushes.append(busy)
    trainer._push_from_checkpoint("checkpoint-0")
    assert trainer._pushes == [busy]
    trainer.args.hub_always_push = True
    trainer._push_from_checkpoint("checkpoint-0")
    assert len(trainer._pushes) == 2
    busy.set_result(None)
    trainer._finish_current_push()
    assert set(online.store.model(REPO).head.added) == ENCODER
