# SPDX-License-Identifier: Apache-2.0
"""Tests of publishing a Space with its model."""

import json
import shutil
from pathlib import Path

import pytest
from hub_server import HubServer
from messages import mentions, missing

from hf_ssl.cli import main
from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish_space

FILES = {
    "README.md": "---\ntitle: Digits\nsdk: gradio\napp_file: app.py\n---\n",
    "app.py": "import gradio\n",
    "requirements.txt": "gradio\n",
    "gallery.npz": "\0\0",
    "examples/0.png": "\x89PNG",
}


def build(folder: Path, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "space.json").write_text(json.dumps({"files": sorted(files)}))
    return folder


def test_a_space_is_published_and_updated(online: HubServer, tmp_path: Path) -> None:
    folder = build(tmp_path / "space")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "app.pyc").write_text("")
    done = publish_space(folder, "someone/digits")
    repo = online.store.repos["spaces", "someone/digits"]
    assert set(repo.head.files) == {*FILES, "space.json", ".gitattributes"} and repo.sdk == "gradio"
    assert done.url == f"{online.endpoint}/spaces/someone/digits"

    repo.commit("main", "by hand", online.store.blobs({"examples/own.png": b"mine"}))
    (folder / "examples" / "0.png").unlink()
    build(folder, {name: text for name, text in FILES.items() if name != "examples/0.png"})
    done = publish_space(folder, "someone/digits")
    assert (done.uploaded, done.deleted) == (("space.json",), ("examples/0.png",))
    assert repo.head.files["examples/own.png"].data == b"mine"


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        (None, ["space.json"]),
        ({"title": "x"}, ["space.json", "files"]),
        ({"files": [*FILES, "../x"]}, ["space.json", "../x"]),
        ({"files": [*FILES, "/etc/passwd"]}, ["space.json", "/etc/passwd"]),
        ({"files": [*FILES, "index.faiss"]}, ["index.faiss"]),
        ({"files": ["README.md", "app.py"]}, ["requirements.txt"]),
    ],
)
def test_folders_that_are_not_spaces(tmp_path: Path, listed: object, parts: list) -> None:
    folder = build(tmp_path / "space")
    (folder / "space.json").unlink() if listed is None else (folder / "space.json").write_text(
        json.dumps(listed)
    )
    with pytest.raises(UserError) as caught:
        publish_space(folder, "someone/digits", dry_run=True)
    assert missing(str(caught.value), folder, *parts) == []


def test_a_readme_without_metadata(tmp_path: Path) -> None:
    folder = build(tmp_path / "space", FILES | {"README.md": "# Digits\n"})
    with pytest.raises(UserError, match=mentions("README.md", "sdk: gradio")):
        publish_space(folder, "someone/digits", dry_run=True)


def test_the_space_of_a_private_run_is_private(
    online: HubServer, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    facts = json.loads((run / "facts.json").read_text())
    facts["recipe"]["sections"].setdefault("publish", {})["private"] = True
    (run / "facts.json").write_text(json.dumps(facts))
    space = build(tmp_path / "space")
    assert main(["publish", str(run), "someone/digits", "--space", str(space), "--dry-run"]) == 0
    assert "to Space someone/digits (private)" in capsys.readouterr().out
    assert main(["publish", str(run), "someone/digits", "--space", str(space)]) == 0
    assert [repo.private for repo in online.store.repos.values()] == [True, True]


def test_the_command_publishes_both(
    online: HubServer, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = build(tmp_path / "space")
    command = ["publish", str(finished_run), "someone/digits", "--private", "--space", str(space)]
    assert main([*command, "--dry-run"]) == 0
    assert online.requests == [] and "to Space someone/digits (private)" in capsys.readouterr().out
    assert main(command) == 0
    assert {kind: repo.private for (kind, _), repo in online.store.repos.items()} == {
        "models": True,
        "spaces": True,
    }
    assert main(["publish", str(finished_run)]) == 2
    assert missing(capsys.readouterr().err, "hf-ssl:", finished_run, "user/name") == []
    (space / "app.py").unlink()
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-ssl: ") and "app.py" in error
