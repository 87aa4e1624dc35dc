# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network, no cache that an earlier run left, no more threads than help; and a
Hub of its own for those that need one.
"""

import os
import tempfile

# Before torch and the Hugging Face libraries are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_ssl-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer


@pytest.fixture(scope="session", autouse=True)
def _fresh_hf_home() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a small run that is over. Do not write to it."""
    from hf_ssl.recipe import load_recipe
    from hf_ssl.run import pretrain

    folder = tmp_path_factory.mktemp("runs") / "digits"
    pretrain(load_recipe("smoke/simclr", [f"training.output_dir={folder}", "training.monitor_steps=0"]))
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def online(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """Lets this process talk to the test suite's Hub, as somebody who may write there, and never waits."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub
