# SPDX-License-Identifier: Apache-2.0
"""Data sets on a Hub: the real clients, in a process of their own, against a small server that only reads."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
import datasets
datasets.disable_progress_bars()
from hf_ssl.data import DataConfig, labelled_images, open_source, train_loader
from hf_ssl.errors import UserError
from hf_ssl.views import ViewPreset

def look(path, streaming, **options):
    config = DataConfig(path=path, streaming=streaming, **options)
    try:
        source = open_source(config)
    except UserError as error:
        return str(error)
    loader = train_loader(source, ViewPreset(size=8), config=config, seed=0, batch_size=10, num_workers=0)
    batches = [next(iter(loader)) for _ in range(2)]
    return [source.revision, source.num_rows, [text for batch in batches for text in batch.broken]]

found = {f"{name} {streaming}": look(f"someone/{name}", streaming)
         for name in ("parquet", "folder") for streaming in (False, True)}
found["unknown"] = look("someone/nothing", False)
found["revision"] = look("someone/parquet", False, revision="nowhere")
found["split"] = look("someone/parquet", False, split="validation")
config = DataConfig(path="someone/parquet", max_broken_fraction=0.1)
found["labels"] = labelled_images(config, "train").labels.tolist()
print(json.dumps(found))
"""


def handler_for(root: Path):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def send(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            url = urlsplit(self.path)
            api = re.fullmatch(
                r"/api/datasets/(\w+/\w+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", unquote(url.path)
            )
            file = re.fullmatch(r"/datasets/(\w+/\w+)/resolve/([^/]+)/(.*)", unquote(url.path))
            found = api or file
            if found is None:
                return self.send(404)
            if not (root / found[1]).is_dir():
                return self.send(404, X_Error_Code="RepoNotFound")
            revision = (api[3] if api else file[2]) or "main"
            if revision not in ("main", SHA):
                return self.send(404, X_Error_Code="RevisionNotFound")
            return self.api(root / api[1], api, url) if api else self.file(root / file[1] / file[3])

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            repo = root / re.match(r"/api/datasets/(\w+/\w+)/paths-info/", self.path)[1]
            self.json([entry(repo, repo / path) for path in wanted if (repo / path).exists()])

        def api(self, repo, match, url):
            if match[2] == "tree":
                folder = repo / (match[4] or "")
                if not folder.is_dir():
                    return self.send(404, X_Error_Code="EntryNotFound")
                deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                return self.json(
                    [entry(repo, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]
                )
            files = [
                {"rfilename": str(path.relative_to(repo))}
                for path in sorted(repo.rglob("*"))
                if path.is_file()
            ]
            return self.json({
                "id": match[1], "sha": SHA, "author": "someone", "private": False, "gated": False, "tags": [],
                "disabled": False, "siblings": files, "downloads": 0, "likes": 0,
            })  # fmt: skip

        def json(self, content):
            self.send(200, json.dumps(content).encode(), Content_Type="application/json")

        def file(self, path):
            if not path.is_file():
                return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            data = path.read_bytes()
            headers = {
                "X_Repo_Commit": SHA,
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "Accept_Ranges": "bytes",
            }
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if part is None:
                return self.send(200, data, **headers)
            start, end = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.send(206, data[start : end + 1], **headers)

    return Handler


def entry(repo, path):
    kind = {"type": "directory", "oid": SHA, "size": 0}
    if path.is_file():
        data = path.read_bytes()
        kind = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
    return {"path": str(path.relative_to(repo)), **kind}


@pytest.fixture
def hub(tmp_path, write_parquet, encode, picture):
    root = tmp_path / "hub"
    images = [b"no image" if number == 3 else encode(picture(number)) for number in range(40)]
    write_parquet(
        root / "someone/parquet/data/train-00000-of-00001.parquet",
        images,
        [number % 3 for number in range(40)],
    )
    for number in range(20):
        file = root / "someone/folder/train" / ("ant", "bee")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(picture(number)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_data_sets_on_the_hub(hub, tmp_path):
    hidden = ("HF_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment |= {
        "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    broken = "someone/parquet (train) row 3 (3.png): not an image that Pillow can read"
    assert found["parquet False"][:2] == [SHA, 40] and broken in found["parquet False"][2]
    assert found["parquet True"][0] == SHA
    assert found["folder False"] == found["folder True"] == [SHA, 20, []]
    assert found["labels"] == [number % 3 for number in range(40) if number != 3]
    nowhere = "is neither a folder here nor a data set that can be opened on the Hub"
    assert found["unknown"].startswith(f"'someone/nothing' {nowhere}: ") and "\n" not in found["unknown"]
    assert found["revision"].startswith(f"'someone/parquet' {nowhere}: Revision 'nowhere' doesn't exist")
    assert found["split"] == "someone/parquet has no split 'validation'; its splits are train"
