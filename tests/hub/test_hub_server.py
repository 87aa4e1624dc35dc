# SPDX-License-Identifier: Apache-2.0
"""Tests of the Hub of the test suite with the real clients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

# This program reports what the real clients find, with one key per check.
SCRIPT = """
import json, sys
from pathlib import Path
from huggingface_hub import (
    CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, ModelCard, get_hf_file_metadata,
    hf_hub_url,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

here = Path(sys.argv[1])
api = HfApi()
found = {}

def status(call):
    try:
        call()
    except HfHubHTTPError as error:
        return error.response.status_code
    except EntryNotFoundError:
        return "no such file"

found["who"] = [api.whoami()["name"], status(lambda: api.whoami(token="hf_unknown"))]
url = api.create_repo("encoder", private=True)
repo = url.repo_id
found["repo"] = [
    repo, api.create_repo("encoder", exist_ok=True).repo_id, status(lambda: api.create_repo("encoder")),
]
found["hidden"] = [
    status(lambda: api.model_info(repo, token=False)), status(lambda: api.model_info("someone/nothing")),
]
api.upload_folder(repo_id=repo, folder_path=here / "upload", commit_message="all of it")
found["files"] = sorted(api.list_repo_files(repo))
info = api.model_info(repo, files_metadata=True)
found["info"] = [info.private, {item.rfilename: [item.size, item.lfs is not None] for item in info.siblings}]
found["equal"] = [
    Path(api.hf_hub_download(repo, name)).read_bytes() == (here / "upload" / name).read_bytes()
    for name in ("text.md", "small.bin", "large.safetensors", "deep/er/file.json")
]
found["snapshot"] = len(list(Path(api.snapshot_download(repo)).rglob("*.*")))
found["missing file"] = status(lambda: api.hf_hub_download(repo, "nothing.txt"))
first = info.sha
changes = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("deep/", is_folder=True)]
api.create_commit(repo, changes, commit_message="second", parent_commit=first)
found["changed"] = sorted(api.list_repo_files(repo))

def commit(*operations, **options):
    return lambda: api.create_commit(repo, operations, commit_message="x", **options)

one_more = CommitOperationAdd("x", b"x")
found["stale"] = status(commit(one_more, parent_commit=first))
found["old"] = api.file_exists(repo, "deep/er/file.json", revision=first)
found["bad delete"] = status(commit(CommitOperationDelete("nothing")))
found["tree"] = [entry.path for entry in api.list_repo_tree(repo, recursive=True)]
found["commits"] = [commit.title for commit in api.list_repo_commits(repo)]
api.create_tag(repo, tag="v1", revision=first)
api.create_branch(repo, branch="side")
refs = api.list_repo_refs(repo)
names = [[ref.name for ref in kind] for kind in (refs.branches, refs.tags)]
found["refs"] = [*names, api.model_info(repo, revision="v1").sha == first]
with HfFileSystem().open(f"{repo}/large.safetensors", block_size=1000) as file:
    file.seek(123456)
    found["range"] = file.read(10).hex()
meta = get_hf_file_metadata(hf_hub_url(repo, "small.bin"))
found["meta"] = [meta.size, len(meta.etag)]
api.upload_file(repo_id=repo, path_or_fileobj=b"[1]", path_in_repo="text.md")
space = api.create_repo("lab/show", repo_type="space", space_sdk="gradio").repo_id
found["space"] = [space, api.space_info(space).sdk]
found["foreign"] = status(lambda: api.create_repo("other-user/encoder"))
found["reader"] = [
    status(lambda: api.create_repo("other", token=sys.argv[2])),
    status(commit(one_more, token=sys.argv[2])),
    api.model_info(repo, token=sys.argv[2]).id,
    status(lambda: api.create_repo("other", token=False)),
]
try:
    ModelCard("---\\nlicense: mit\\n---\\n").push_to_hub(repo)
    commit(CommitOperationAdd("README.md", b"---\\nno end"))()
except ValueError as error:
    found["card"] = str(error)
api.update_repo_settings(repo, private=False)
found["public"] = api.model_info(repo, token=False).private
api.delete_repo(repo)
found["deleted"] = status(lambda: api.model_info(repo))
print(json.dumps(found))
"""

SIZES = {"text.md": 300, "small.bin": 2000, "large.safetensors": 2_500_000, "deep/er/file.json": 20}


def client(hub: HubServer, home: Path, code: str, *arguments: str, token: str | None = None) -> str:
    """Return the standard output of a process with the real client."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_real_client(hub: HubServer, tmp_path: Path) -> None:
    contents = {}
    for name, size in SIZES.items():
        path = tmp_path / "upload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        contents[name] = os.urandom(size) if name.endswith(("bin", "safetensors")) else b"a" * size
        path.write_bytes(contents[name])
    output = client(hub, tmp_path / "home", SCRIPT, str(tmp_path), hub.read_token, token=hub.write_token)
    found = json.loads(output.splitlines()[-1])
    assert found["who"] == ["someone", 401]
    assert found["repo"] == ["someone/encoder", "someone/encoder", 409]
    assert found["hidden"] == [401, 404]
    assert found["files"] == sorted([".gitattributes", *SIZES])
    private, files = found["info"]
    assert private
    assert {name: files[name] for name in SIZES} == {
        name: [size, name.endswith(("bin", "safetensors"))] for name, size in SIZES.items()
    }
    assert found["equal"] == [True] * 4 and found["snapshot"] == 5
    assert found["missing file"] == 404
    assert found["changed"] == sorted(
        [".gitattributes", "new.txt", "text.md", "small.bin", "large.safetensors"]
    )
    assert (found["stale"], found["old"], found["bad delete"]) == (412, True, 404)
    assert found["tree"] == found["changed"]
    assert found["commits"] == ["second", "all of it", "initial commit"]
    assert found["refs"] == [["main", "side"], ["v1"], True]
    assert found["range"] == contents["large.safetensors"][123456:123466].hex()
    assert found["meta"] == [2000, 64]
    assert found["space"] == ["lab/show", "gradio"]
    assert (found["foreign"], found["reader"]) == (403, [403, 403, "someone/encoder", 401])
    assert "the metadata has no end" in found["card"]
    assert (found["public"], found["deleted"]) == (False, 404)


def test_parts_and_requests_are_recorded(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('a')\n"
        "for _ in range(2):\n"
        "    api.upload_file(repo_id='someone/a', path_or_fileobj=b'0' * 2_500_000, path_in_repo='x.bin')"
    )
    client(hub, tmp_path, code, token=hub.write_token)
    assert hub.count(r"PUT /lfs/\w+/\d$") == 3, "three parts, each uploaded once"
    assert hub.store.model("someone/a").head.files["x.bin"].data == b"0" * 2_500_000
    assert [commit.added for commit in hub.store.model("someone/a").commits] == [
        (".gitattributes",),
        ("x.bin",),
    ]
    assert hub.requests[0].user == "someone" and b"2500000" in hub.received()


FAULTY = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
import httpx2
api = HfApi()
try:
    api.create_commit("someone/a", [CommitOperationAdd("x.bin", b"0" * 5000)], commit_message="x")
    print("done")
except HfHubHTTPError as error:
    print(error.response.status_code)
except httpx2.HTTPError as error:
    print("cut")
"""


@pytest.mark.parametrize(
    ("pattern", "fault", "outcome", "there"),
    [
        ("POST .*/commit/", {"status": 500}, "500", False),
        ("POST .*/commit/", {"after": 100}, "cut", False),
        ("POST .*/commit/", {"unanswered": True}, "cut", True),
        ("PUT /lfs/", {"after": 100}, "done", True),  # the client retries
    ],
)
def test_faults(hub: HubServer, tmp_path: Path, pattern: str, fault: dict, outcome: str, there: bool) -> None:
    repo = hub.store.add_repo("models", "someone/a")
    (hub.fail if "status" in fault else hub.cut)(pattern, **fault)
    assert client(hub, tmp_path, FAULTY, token=hub.write_token).split() == [outcome]
    assert ("x.bin" in repo.head.files) == there
    if outcome == "done":
        cut, whole = [request for request in hub.requests if request.method == "PUT"]
        assert (cut.status, len(cut.body), whole.status, len(whole.body)) == (0, 100, 200, 5000)


def test_an_interrupted_download(hub: HubServer, tmp_path: Path) -> None:
    hub.store.add_repo("models", "someone/a", {"x.bin": b"0123456789" * 1000})
    hub.cut("GET /someone/a/resolve/", after=7000)
    code = (
        "from huggingface_hub import hf_hub_download; import httpx2\n"
        "for _ in range(2):\n"
        "    try: print(len(open(hf_hub_download('someone/a', 'x.bin')).read()))\n"
        "    except httpx2.HTTPError: print('cut')"
    )
    assert client(hub, tmp_path, code).split() == ["cut", "10000"]
