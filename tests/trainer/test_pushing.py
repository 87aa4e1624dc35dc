# SPDX-License-Identifier: Apache-2.0
"""`training.push_to_hub`: what is sent when, that the root is always the native encoder, and that training
does not notice."""

import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
from hub_server import HubServer
from messages import mentions, missing

from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer, pretrain, train
from hf_ssl.trainer.pushing import _linked

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
    assert set(first.files) == ENCODER | {".gitattributes", "NOTES.md"}, "old results are not of this encoder"
    for commit in (first, second, last):
        assert (
            kind(commit.files) == "resnet" and kind(commit.files, "pretraining/config.json") == "ssl_simclr"
        )
        assert commit.files["NOTES.md"].data == b"mine"
    assert b"step 4 of 8" in first.files["README.md"].data
    assert first.files["model.safetensors"].data != second.files["model.safetensors"].data
    assert "model.safetensors" not in last.added and b"model-index" in last.files["README.md"].data
    assert publish(folder, REPO).uploaded == (), "as hf-ssl publish sends it"
    for name in ("model.safetensors", "pretraining/model.safetensors"):
        assert (folder / name).read_bytes() == (finished_run / name).read_bytes(), "pushing changes no weight"
    assert not [name for name in os.listdir(folder) if name.startswith("_writing")]


def test_all_checkpoints_and_push_to_hub_itself(online: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    options = ("training.save_total_limit=1", "training.save_steps=2", "training.hub_private_repo=true")
    trainer = train(recipe(folder, "all_checkpoints", *options))
    repo = online.store.model(REPO)
    sent = {name.split("/")[0] for name in repo.head.files if name.startswith("checkpoint-")}
    assert sent == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"}, (
        "rotated away here, whole there"
    )
    assert kind(repo.head.files, "checkpoint-2/config.json") == "ssl_simclr" and repo.private
    assert {"checkpoint-8/optimizer.pt", "checkpoint-8/trainer_state.json"} <= set(repo.head.files)
    assert not (folder / "config.json").exists()

    repo.commit("main", "by hand", online.store.blobs({"config.json": b"{}", "NOTES.md": b"mine"}))
    done = trainer.push_to_hub("Once more")
    assert (done.repo_id, done.uploaded, repo.head.summary) == (REPO, ("config.json",), "Once more")
    assert kind(repo.head.files) == "resnet" and repo.head.files["NOTES.md"].data == b"mine"


def test_the_end_alone_and_a_last_push_that_fails(online: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    online.fail("POST .*/commit/", status=400, times=1000)
    with pytest.raises(UserError) as caught:
        pretrain(recipe(folder, "end"))
    assert missing(str(caught.value), f"hf-ssl publish {folder} {REPO}") == []
    assert online.count("POST .*/commit/") == 1 and (folder / "README.md").is_file()
    online.heal()
    pretrain(recipe(folder, "every_save"))  # the same run: how it is pushed changes no weight
    assert [commit.summary for commit in online.store.model(REPO).commits[1:]] == ["End of training"]


def test_no_token_is_told_before_training(
    online: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=mentions("token", "hf auth login")):
        pretrain(recipe(tmp_path / "digits", "end"))
    assert not (tmp_path / "digits").exists()


def test_a_checkpoint_that_is_sent_names_no_folder_and_stays(tmp_path: Path) -> None:
    source, target = tmp_path / "checkpoint-4", tmp_path / "_writing-push-4" / "last-checkpoint"
    source.mkdir()
    (source / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(source)}))
    (source / "optimizer.pt").write_bytes(b"state")
    files = _linked(source, target, "last-checkpoint")
    shutil.rmtree(source)
    assert set(files) == {"last-checkpoint/trainer_state.json", "last-checkpoint/optimizer.pt"}
    assert json.loads(files["last-checkpoint/trainer_state.json"]) == {
        "best_model_checkpoint": "checkpoint-4"
    }
    assert files["last-checkpoint/optimizer.pt"].read_bytes() == b"state"


def test_one_repo_by_either_name() -> None:
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


def test_one_push_at_a_time_unless_asked(online: HubServer, tmp_path: Path) -> None:
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
