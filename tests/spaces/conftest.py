# SPDX-License-Identifier: Apache-2.0
"""Spaces of tiny encoders, served by processes that find hf_ssl in the Space's folder alone; a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitImageProcessor, PreTrainedModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_ssl.data import DataConfig
from hf_ssl.methods.cmc.configuration_cmc import CMCConfig
from hf_ssl.methods.cmc.modeling_cmc import CMCForPreTraining
from hf_ssl.space import build_space
from hf_ssl.space.serve import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS_TO_START = 600

# Runs app.py of each folder with an hf_ssl of its own, or with none: an installed one is not found. Importing
# the libraries takes seconds, so they are imported once, and each Space is a fork.
BOOT = """
import json, os, runpy, sys, tempfile
from importlib.machinery import PathFinder
import gradio, matplotlib, torchvision, transformers
import transformers.models.auto.image_processing_auto

class OnlyHere:
    folder = None
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "hf_ssl":
            return None
        spec = PathFinder.find_spec(name, [cls.folder])
        if spec is None:
            raise ModuleNotFoundError("the Space has no hf_ssl of its own")
        return spec

assert "hf_ssl" not in sys.modules
sys.meta_path.insert(0, OnlyHere)
children = []
for job in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        OnlyHere.folder = job["folder"]
        os.environ["GRADIO_SERVER_PORT"] = str(job["port"])
        tempfile.tempdir = os.environ["TMPDIR"] = job["scratch"]
        os.chdir(job["scratch"])
        with open(job["log"], "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        runpy.run_path(job["folder"] + "/app.py", run_name="__main__")
        sys.exit()
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def encoder(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "resnet":
        return ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    if kind == "parts":
        views = {"size": 32, "count": 1, "mean": [0.5] * 3, "std": [0.25] * 3}
        config = CMCConfig(backbone_config=encoder("resnet").config, color_space="lab", views=views)
        return CMCForPreTraining(config).exported_encoder
    return ViTModel(
        ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=32,
            patch_size=8, initializer_range=0.3,
        )
    )  # fmt: skip


@pytest.fixture(scope="session", name="save_encoder")
def _save_encoder() -> Callable[[str, Path], Path]:
    return save_encoder


def save_encoder(kind: str, folder: Path) -> Path:
    encoder(kind).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2,
        image_mean=[0.5] * 3, image_std=[0.25] * 3, do_convert_rgb=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@dataclass(frozen=True)
class Served:
    """A Space that is being served, the folder for all temporary files of its process, and what it says."""

    folder: Path
    port: int
    scratch: Path
    log: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


def build(kind: str, root: Path) -> Path:
    model = save_encoder(kind, root / f"{kind}_encoder")
    folder = root / f"{kind}_space"
    build_space(str(model), folder, DataConfig(path="digits"), images=40, title=f"Digits by a {kind}")
    return folder


@pytest.fixture(scope="session")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("spaces")
    return {kind: build(kind, root) for kind in ("vit", "resnet", "parts")}


@pytest.fixture(scope="session")
def served(spaces: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """All Spaces; whatever happens, their processes end, and then nothing is left of what they stored."""
    found = {}
    port = 7860
    for kind, folder in spaces.items():
        port = free_port("127.0.0.1", port + 1)
        scratch = tmp_path_factory.mktemp(f"scratch_{kind}")
        found[kind] = Served(folder, port, scratch, scratch.parent / f"{kind}.log")
    jobs = [{name: str(value) for name, value in vars(space).items()} for space in found.values()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "-c", BOOT, json.dumps(jobs)]
    group = subprocess.Popen(command, cwd=found["vit"].scratch, env=environment, start_new_session=True)
    try:
        for space in found.values():
            wait_until_served(space, group)
        yield found
        os.killpg(group.pid, signal.SIGTERM)
        end = time.monotonic() + 120
        while any(files_below(space.scratch) for space in found.values()) and time.monotonic() < end:
            time.sleep(0.05)
        assert [path for space in found.values() for path in files_below(space.scratch)] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
        group.wait()


def wait_until_served(space: Served, group: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and group.poll() is None:
        said = space.log.read_text() if space.log.exists() else ""
        if "Traceback" in said:
            break
        if "the Space is at http" in said:
            with urllib.request.urlopen(space.address) as answer:
                assert answer.status == 200
            return
        time.sleep(0.1)
    pytest.fail(f"not served: {space.log.read_text() if space.log.exists() else 'nothing was said'}")


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or install Google Chrome")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()
