# SPDX-License-Identifier: Apache-2.0
"""Several people use a Space at the same time: each upload is answered, then deleted, and nothing else is."""

import html
import importlib.util
import io
import json
import os
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from foreign_encoder import foreign
from messages import mentions
from PIL import Image

from hf_ssl.data import DataConfig
from hf_ssl.data.formats import READABLE
from hf_ssl.errors import UserError
from hf_ssl.evaluation import Neighbor
from hf_ssl.space import build_space
from hf_ssl.space.serve import free_port

httpx = pytest.importorskip("httpx")
networking = pytest.importorskip("gradio.networking")
CLIENTS = 8


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, save_encoder: Any) -> Iterator[ModuleType]:
    """The module `app.py` of a Space."""
    root = tmp_path_factory.mktemp("uploads")
    folder = root / "space"
    build_space(str(save_encoder("resnet", root / "encoder")), folder, DataConfig(path="digits"), images=30)
    before = dict(os.environ)
    spec = importlib.util.spec_from_file_location("space_app", folder / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def address(app: ModuleType) -> Iterator[str]:
    blocks = app.page(app.open_retriever())
    port = free_port("127.0.0.1", 17960)
    blocks.launch(server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close()


def picture(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


class Visitor:
    """Does what the page does in a browser: it uploads a photo, then sends a request with its path."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=f"{address}/gradio_api", timeout=300, trust_env=False)
        config = httpx.get(f"{address}/config", timeout=300, trust_env=False).json()
        kinds = {each["id"]: {kind for _, kind in each["targets"]} for each in config["dependencies"]}
        self.function = next(number for number, found in kinds.items() if "upload" in found)

    def answer(self, photo: bytes) -> str:
        path = self.client.post("/upload", files={"files": ("photo.png", photo, "image/png")}).json()[0]
        return self.request(path)

    def request(self, path: str) -> str:
        session = uuid.uuid4().hex
        file = {"path": path, "orig_name": "photo.png", "meta": {"_type": "gradio.FileData"}}
        order = {"data": [file], "fn_index": self.function, "session_hash": session}
        self.client.post("/queue/join", json=order).raise_for_status()
        with self.client.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return str(message["output"].get("data", [message["output"]])[0])
        raise AssertionError("the request has no answer")


def failed_requests(address: str, photos: list[bytes]) -> list[str]:
    """Send each photo, with several clients at the same time, and return the answers without neighbors."""
    visitors = [Visitor(address) for _ in range(CLIENTS)]
    shares = [photos[number::CLIENTS] for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = pool.map(
            lambda pair: [pair[0].answer(each) for each in pair[1]], zip(visitors, shares, strict=True)
        )
        given = [each for part in answers for each in part]
    assert len(given) == len(photos)
    return [each for each in given if 'class="neighbors"' not in each]


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_equal_photos_at_the_same_time_are_all_answered_and_deleted(app: ModuleType, address: str) -> None:
    assert failed_requests(address, [picture(0)] * 3 * CLIENTS) == []
    assert files_below(app.UPLOADS) == []


@pytest.mark.slow
def test_three_hundred_requests_of_eight_clients_are_answered(app: ModuleType, address: str) -> None:
    photos = [picture(0 if number % 3 == 0 else number) for number in range(300)]
    assert failed_requests(address, photos) == []
    assert files_below(app.UPLOADS) == []


def test_a_request_cannot_delete_other_files(app: ModuleType, address: str, tmp_path: Path) -> None:
    """Gradio accepts the folder of all uploads as the path of an upload."""
    other = app.UPLOADS / "someone" / "photo.png"
    other.parent.mkdir()
    other.write_bytes(picture(1))
    part = app.UPLOADS / "tmp_part"  # an upload that is not complete
    part.write_bytes(b"part")
    outside = tmp_path / "photo.png"
    outside.write_bytes(picture(2))
    for path in (app.UPLOADS, app.UPLOADS / "someone", app.UPLOADS.parent, part, outside):
        if path in (app.UPLOADS, part):
            assert "No file arrived" in Visitor(address).request(str(path))
        file = {"path": str(path)}
        assert "No file arrived" in app.uploaded(SimpleNamespace(), file)
    assert other.is_file() and part.is_file() and outside.is_file() and app.UPLOADS.parent.is_dir()
    app.shutil.rmtree(other.parent)
    part.unlink()


def test_a_waiting_upload_is_kept_for_minutes(app: ModuleType) -> None:
    """Requests wait for each other, and Gradio deletes old uploads every minute."""
    blocks = app.page(app.open_retriever())
    frequency, age = blocks.delete_cache
    assert frequency == 60 and age >= 600


def test_the_page_says_which_part_of_a_photo_the_encoder_sees(app: ModuleType) -> None:
    retriever = app.open_retriever()
    for size, is_cut in (((60, 60), False), ((60, 20), True), ((20, 60), True), ((1, 1), False)):
        file = io.BytesIO()
        Image.new("RGB", size, "red").save(file, "PNG")
        shown = app.answer(retriever, file.getvalue(), "Your picture")
        assert 'class="neighbors"' in shown and ("does not see" in shown) == is_cut


def test_names_of_classes_are_text_and_complete(app: ModuleType) -> None:
    name = "<b>" + "a name with many characters, " * 3 + '"'
    gallery = SimpleNamespace(thumbnails=[picture(0)])
    shown = app.neighbors(gallery, [Neighbor(0, 0.5, name)])
    assert f"{html.escape(name)} · 0.50" in shown and "<b>" not in shown


def test_files_that_a_data_set_may_have_are_offered(app: ModuleType) -> None:
    assert app.FILE_TYPES[0] == "image"
    assert (".heic" in app.FILE_TYPES) == (".heic" in READABLE)
    assert (".avif" in app.FILE_TYPES) == (".avif" in READABLE)


def test_a_slow_first_answer_or_a_proxy_does_not_end_the_server(
    app: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio (6.29 to 6.31) requests its own page at the start, with the proxy of the environment."""
    started = []
    monkeypatch.setattr(networking, "url_ok", lambda url: False)
    monkeypatch.setattr(app.gr.Blocks, "block_thread", lambda self: started.append(self))
    monkeypatch.setattr(app.signal, "signal", lambda *arguments: None)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no server
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(free_port("127.0.0.1", 18060)))
    app.main()
    assert len(started) == 1
    started[0].close()


def test_the_page_does_not_run_the_code_of_an_encoder(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = foreign(tmp_path / "encoder", tmp_path / "proof")
    monkeypatch.setitem(app.FACTS["model"], "folder", str(folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(UserError, match=mentions("auto_map")):
        app.open_retriever()
    assert not (tmp_path / "proof").exists()
