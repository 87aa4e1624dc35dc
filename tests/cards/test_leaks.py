# SPDX-License-Identifier: Apache-2.0
"""Tests that no token, path or user name of this machine is published."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from hub_server import HubServer
from messages import mentions

from hf_ssl.cards.privacy import Secrets, check_leaks, leaks, local_secrets
from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish

TOKEN = "hf_" + "Zz9" * 10
KEY = "5f2d-not-for-you"
HOME, USER = "/home/mallory_q", "mallory_q"


@pytest.fixture
def account_with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account with secrets in its environment."""
    for name, value in {"HOME": HOME, "LOGNAME": USER, "USER": USER, "WANDB_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)


SECRETS = Secrets({"the value of the environment variable WANDB_API_KEY": KEY}, USER)
LEAKING = {
    "a token": ("facts.json", json.dumps({"note": TOKEN}), "a text that looks like a token of the Hub"),
    "a checkpoint": ("optimizer.pt", TOKEN, "a text that looks like a token of the Hub"),
    "a secret": ("README.md", f"made with {KEY}.", "the environment variable WANDB_API_KEY"),
    "a home": ("README.md", "images of /home/jane/photos", "'/home/jane'"),
    "another home": ("README.md", r"images of C:\Users\jane\photos", r"C:\\Users\\jane"),
    "a third home": ("README.md", "[here](file:///srv/photos)", "file:///srv/photos"),
    "a path": ("config.json", json.dumps({"a": [{"_name_or_path": "/srv/models/x"}]}), "'/srv/models/x'"),
    "a key": ("config.json", json.dumps({"/srv/models/x": 1}), "'/srv/models/x'"),
    "an account": ("README.md", f"ask {USER}@example.org", "the name of your account, 'mallory_q'"),
    "an account in a path": ("README.md", f"in /scratch/{USER}/photos", "the name of your account"),
    "a picture": ("views.png", f"\x89PNG\n tEXt {HOME}/photos", f"'{HOME}'"),
    "code": ("hf_ssl/app.py", f"key = {KEY!r}", "the environment variable WANDB_API_KEY"),
}


@pytest.mark.parametrize("name", LEAKING)
def test_private_information_is_found(name: str, tmp_path: Path) -> None:
    path, text, sentence = LEAKING[name]
    (tmp_path / "file").write_bytes(text.encode())
    for source in (text.encode(), tmp_path / "file"):
        with pytest.raises(UserError) as caught:
            check_leaks({"innocent.json": b"{}", path: source}, SECRETS)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and sentence in message
        assert KEY not in message and TOKEN not in message, "a secret is not repeated"


def test_the_header_of_weights_is_checked(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"source": f"{HOME}/x"}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 100)
    assert list(leaks("model.safetensors", tmp_path / "x", SECRETS)) == [
        f"the path {HOME!r} of a home folder"
    ]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("README.md", "https://example.org/home/page, n/a, 3/4, and/or, /etc, ~ 5"),
        ("README.md", f"https://huggingface.co/datasets/{USER}/photos and {USER}/photos, by {USER}"),
        (
            "config.json",
            json.dumps({"pattern": "/", "token_size": 3, "architectures": ["hf_ssl"], "a": "~x"}),
        ),
        ("hf_ssl/x.py", 'r"(?<!x)(?:/home/|/Users/)[^/]+"'),
    ],
)
def test_allowed_texts(path: str, text: str) -> None:
    check_leaks({path: text.encode()}, SECRETS)


def test_folders_of_one_name_are_both_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in ("first", "second"):
        (tmp_path / parent / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "first" / "photos")
    found = set(local_secrets(tmp_path / "second" / "photos").literal.values())
    assert {str(tmp_path / parent / "photos") for parent in ("first", "second")} <= found


def test_local_secrets(account_with_secrets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    secrets = local_secrets(tmp_path)
    assert {TOKEN, KEY, f"{HOME}/", str(tmp_path), str(Path.cwd())} <= set(secrets.literal.values())
    assert secrets.user == USER


@pytest.mark.parametrize("name", ["README.md", "results/smoke/simclr.json", "pretraining/config.json"])
def test_private_information_prevents_the_publication(
    online: HubServer, finished_run: Path, tmp_path: Path, name: str, account_with_secrets: None
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "digits"))
    if name.endswith(".json"):
        content = json.loads((run / name).read_text())
        (content[0] if isinstance(content, list) else content)["note"] = f"{HOME}/photos"
        (run / name).write_text(json.dumps(content))
    else:
        (run / name).write_text((run / name).read_text() + f"\n{HOME}/photos\n")
    with pytest.raises(UserError, match=mentions(name, "path")):
        publish(run, "someone/digits")
    assert online.requests == []


def test_the_hub_receives_no_private_information(
    online: HubServer, finished_run: Path, tmp_path: Path, account_with_secrets: None
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "digits"))
    for name in (
        "_run.json",
        "notes.txt",
        "checkpoint-8/more.json",
        "train.log",
        ".env",
        "pretraining/training_args.bin",
    ):
        (run / name).write_text(f"{TOKEN} {KEY} {HOME}")
    publish(run, "someone/digits")
    received = online.received()
    here = [TOKEN, KEY, HOME, USER, str(tmp_path), str(finished_run), str(Path.cwd()), online.write_token]
    assert [text for text in here if text.encode() in received] == []
    assert b"model-index" in received
