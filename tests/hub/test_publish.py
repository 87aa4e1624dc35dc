# SPDX-License-Identifier: Apache-2.0
"""Tests of publishing with the real client: uploaded files, kept files, and errors."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from messages import missing
from tiers import in_tiers

from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish, run_files
from hf_ssl.hub.remote import UNCHANGED

REPO = "someone/digits"
FILES = {
    "README.md", "config.json", "curves.png", "facts.json", "knn_curve.png", "model.safetensors",
    "preprocessor_config.json", "pretraining/config.json", "pretraining/model.safetensors",
    "probe_epochs.png", "results/smoke/simclr.json", "views.png",
}  # fmt: skip
# These files contain the name of the repository, which differs from that of the folder.
RENAMED = {"README.md", "facts.json"}


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A writable copy of the run."""
    return Path(shutil.copytree(finished_run, tmp_path / "digits"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def error_of(folder: Path, repo_id: str = REPO, **options) -> str:
    with pytest.raises(UserError) as caught:
        publish(folder, repo_id, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_repository_equals_the_run(online: HubServer, finished_run: Path) -> None:
    before = contents(finished_run)
    done = publish(finished_run, REPO)
    repo = online.store.model(REPO)
    assert set(repo.head.files) == FILES | {".gitattributes"}
    assert set(done.uploaded) == FILES and (done.deleted, done.commit) == ((), repo.head.oid)
    assert done.url == f"{online.endpoint}/{REPO}"
    assert len(repo.commits) == 2, "one commit after the initial one"
    assert all(repo.head.files[name].data == before[name] for name in FILES - RENAMED)
    card = repo.head.files["README.md"].data.decode()
    assert f'repo = "{REPO}"' in card and f"name: {REPO}" in card
    assert json.loads(repo.head.files["facts.json"].data)["repo_id"] == REPO
    assert contents(finished_run) == before, "publish only reads the folder"
    assert not repo.private


def test_a_second_publication_uploads_only_changes(
    online: HubServer, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(run, REPO)
    repo = online.store.model(REPO)
    own = {"NOTES.md": b"mine", "pretraining/plot.json": b"{}", "other.safetensors": b"0"}
    repo.commit("main", "by hand", online.store.blobs(own))
    puts = online.count("PUT /lfs/")
    capsys.readouterr()

    done = publish(run, REPO)
    assert (done.uploaded, done.deleted, done.commit) == ((), (), repo.head.oid)
    assert "no changes" in capsys.readouterr().out
    assert len(repo.commits) == 3 and online.count("PUT /lfs/") == puts

    (run / "curves.png").write_bytes(b"\x89PNG another")
    (run / "preprocessor_config.json").write_text('{"size": 8}')
    shutil.rmtree(run / "pretraining")
    done = publish(run, REPO)
    assert (
        set(repo.head.added) == set(done.uploaded) == {"README.md", "curves.png", "preprocessor_config.json"}
    )
    assert set(repo.head.deleted) == {"pretraining/config.json", "pretraining/model.safetensors"}
    assert online.count("PUT /lfs/") == puts + 1
    assert all(repo.head.files[name].data == data for name, data in own.items())
    assert "deleted: pretraining/config.json, pretraining/model.safetensors" in capsys.readouterr().out


def test_results_of_a_suite_are_published_without_its_checkpoints(run: Path) -> None:
    suite = run / "results" / "transfer"
    for name in ("color/frozen.json", "color/_checkpoints_fine_tuned/checkpoint-1/trainer_state.json"):
        (suite / name).parent.mkdir(parents=True, exist_ok=True)
        (suite / name).write_text("{}")
    new = set(run_files(run, REPO)) - FILES
    assert new == {"results/transfer/color/frozen.json"}


def test_sharded_weights_replace_a_single_file(online: HubServer, run: Path) -> None:
    publish(run, REPO)
    whole, part = run / "model.safetensors", run / "model-00001-of-00001.safetensors"
    whole.rename(part)
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": part.name}}))
    done = publish(run, REPO)
    assert set(done.uploaded) == {part.name, "model.safetensors.index.json"}
    assert done.deleted == ("model.safetensors",)
    part.unlink()
    assert missing(error_of(run), run, part.name) == []


def test_a_dry_run_needs_no_token_and_no_network(
    hub: HubServer, finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HOME", str(finished_run.parent))
    assert publish(f"~/{finished_run.name}", "name", private=True, dry_run=True) is None
    *listed, total = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} == FILES and all(line.endswith("B") for line in listed)
    assert f"{len(FILES)} files, " in total and "to name (private)" in total
    assert hub.requests == []


def test_private(online: HubServer, run: Path) -> None:
    done = publish(run, "hidden", private=True)
    repo = online.store.model("someone/hidden")
    assert (done.repo_id, repo.private) == ("someone/hidden", True)
    (run / "curves.png").write_bytes(b"\x89PNG another")
    publish(run, "someone/hidden")
    assert repo.private and len(repo.commits) == 3, "the visibility stays"
    repo.private = False
    (run / "curves.png").write_bytes(b"\x89PNG a third")
    assert missing(error_of(run, "someone/hidden", private=True), "someone/hidden", "public", "private") == []
    assert len(repo.commits) == 3

    facts = json.loads((run / "facts.json").read_text())
    facts["recipe"]["sections"]["publish"]["private"] = True
    (run / "facts.json").write_text(json.dumps(facts))
    publish(run, "lab/by-recipe")
    assert online.store.model("lab/by-recipe").private


ALWAYS = 1000
FAULTS = {
    "an upload is interrupted": ("PUT /lfs/", {"after": 1000}),
    "an upload meets a broken server": ("PUT /lfs/", {"status": 500}),
    "the commit is interrupted": ("POST .*/commit/", {"after": 200}),
    "the commit meets a busy server": ("POST .*/commit/", {"status": 503}),
    "the list of files meets a busy server": (r"GET .*blobs", {"status": 502}),
}


@pytest.mark.parametrize("name", in_tiers(zip(FAULTS), list(zip(FAULTS))[1::2]))
def test_after_an_error_the_repository_is_unchanged(online: HubServer, run: Path, name: str) -> None:
    publish(run, REPO)
    repo = online.store.model(REPO)
    before = repo.head
    for path in (run / "model.safetensors", run / "pretraining" / "model.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-4] + b"\0\0\0\1")
    pattern, fault = FAULTS[name]
    inject = online.fail if "status" in fault else online.cut
    inject(pattern, **fault, times=ALWAYS)
    sentence = error_of(run)
    assert UNCHANGED in sentence and online.endpoint in sentence
    assert repo.head is before and len(repo.commits) == 2

    online.heal()
    assert set(publish(run, REPO).uploaded) == {"model.safetensors", "pretraining/model.safetensors"}
    assert repo.head.files["model.safetensors"].data == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "pattern", ["whoami", "repos/create", "blobs", "validate-yaml", "preupload", "batch", "PUT", "commit"]
)
def test_short_failures_are_retried(online: HubServer, finished_run: Path, pattern: str) -> None:
    online.fail(pattern, status=503, times=2)
    assert set(publish(finished_run, REPO).uploaded) == FILES
    assert len(online.store.model(REPO).commits) == 2


def test_a_commit_with_a_lost_answer_is_not_repeated(online: HubServer, finished_run: Path) -> None:
    online.cut("POST .*/commit/", unanswered=True)
    done = publish(finished_run, REPO)
    repo = online.store.model(REPO)
    assert (set(done.uploaded), done.commit) == (FILES, repo.head.oid)
    assert len(repo.commits) == 2


def test_a_concurrent_commit_is_kept(
    online: HubServer, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = huggingface_hub.HfApi.create_commit, []

    def late(api, *arguments, **options):
        calls.append(options["parent_commit"])
        if len(calls) == 1:
            repo = online.store.model(REPO)
            repo.commit("main", "by hand", online.store.blobs({"README.md": b"theirs", "NOTES.md": b"mine"}))
        return original(api, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    publish(finished_run, REPO)
    files = online.store.model(REPO).head.files
    assert len(set(calls)) == 2 and files["NOTES.md"].data == b"mine" and files["README.md"].data != b"theirs"


ERRORS = {
    "no token": (REPO, {"token": None}, ["token", "hf auth login"]),
    "a read token": (REPO, {"token": "read"}, ["token", "someone", "read", REPO]),
    "an unknown token": (REPO, {"token": "hf_unknown"}, ["token", "HF_TOKEN", "hf auth login"]),
    "a foreign namespace": ("other-user/digits", {}, ["other-user/digits", "someone", "lab", "other-user"]),
    "an invalid name": ("some one/digits", {}, ["some one/digits"]),
    "too many parts": ("a/b/c", {}, ["a/b/c"]),
    "offline": (REPO, {"offline": True}, ["HF_HUB_OFFLINE"]),
    "no server": (REPO, {"endpoint": "http://127.0.0.1:9"}, ["http://127.0.0.1:9"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(online: HubServer, finished_run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repo_id, change, parts = ERRORS[name]
    constants = huggingface_hub.constants
    if "token" in change:
        token = {"read": online.read_token}.get(change["token"], change["token"])
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "offline" in change)
    monkeypatch.setattr(constants, "ENDPOINT", change.get("endpoint", online.endpoint))
    assert missing(error_of(finished_run, repo_id), *parts) == []
    assert online.store.repos == {}, "no repository was created"


def test_a_token_without_access_to_the_namespace(online: HubServer, finished_run: Path) -> None:
    online.store.add_repo("models", "other-user/open")
    assert missing(error_of(finished_run, "other-user/open"), "token", "other-user/open") == []
    online.store.add_repo("models", "other-user/closed", private=True)
    assert missing(error_of(finished_run, "other-user/closed"), "token", "other-user") == []


def test_folders_that_are_not_finished_runs(run: Path, tmp_path: Path) -> None:
    assert missing(error_of(tmp_path / "none"), tmp_path / "none") == []
    (run / "facts.json").unlink()
    (run / "README.md").unlink()
    sentence = error_of(run)
    assert missing(sentence, run, "README.md", "facts.json") == [] and "preprocessor" not in sentence
    unfinished = error_of(run / "checkpoint-8")
    assert missing(unfinished, "checkpoint-8", "preprocessor_config.json", "README.md", "facts.json") == []


@pytest.mark.parametrize("name", ["model.safetensors", "pretraining/model.safetensors"])
def test_damaged_weights(run: Path, name: str) -> None:
    whole = (run / name).read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"nothing like it" * 10):
        (run / name).write_bytes(damaged)
        assert missing(error_of(run, dry_run=True), run / name) == []


def test_a_missing_picture(run: Path) -> None:
    (run / "views.png").unlink()
    assert missing(error_of(run, dry_run=True), run, "views.png") == []


@pytest.mark.parametrize("name", ["../secret.png", "_run.json"])
def test_pictures_outside_the_folder_or_of_another_type_are_errors(run: Path, name: str) -> None:
    (run.parent / "secret.png").write_bytes(b"")
    facts = json.loads((run / "facts.json").read_text())
    facts["pictures"][name] = "x"
    (run / "facts.json").write_text(json.dumps(facts))
    assert missing(error_of(run, dry_run=True), run, name) == []


def test_an_edited_card_is_kept(online: HubServer, run: Path) -> None:
    card = run / "README.md"
    card.write_text(card.read_text() + "\nMore about it.\n")
    publish(run, REPO)
    assert online.store.model(REPO).head.files["README.md"].data == card.read_bytes()
    card.write_text("---\nlicense: [\n---\n")
    assert missing(error_of(run), "README.md") == []
