# SPDX-License-Identifier: Apache-2.0
"""Settings for every test (no network, no cache of an earlier run, one thread for each worker), and fixtures
that the workers share.
"""

import os
import tempfile

# Before torch and the Hugging Face libraries are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_ssl-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock
from forks import Forks
from hub_server import HubServer

# The files whose tests take longest. They run first, so that no worker starts a long one at the end.
LONG = ("test_resume_and_processes", "test_collapse", "test_registration", "test_page", "test_methods")
sys.path.append(str(Path(__file__).parents[1]))  # for `training`; last, so that an installed hf_ssl is tested
MOST_WORKERS = 4  # each worker needs about 1 GiB


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers for `-n auto`. xdist would count two hardware threads as one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def _fresh_hf_home() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function (name, make) that returns the folder `name`.

    The first worker that calls it fills the folder with `make(folder)`. Do not write to the folder, because
    other workers read it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def find_or_make(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # remove files of a failed attempt
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return find_or_make


@pytest.fixture(scope="session")
def finished_run(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The output folder of a small run that is over. Do not write to it."""
    from hf_ssl.recipe import load_recipe
    from hf_ssl.run import pretrain

    def train(root: Path) -> None:
        folder = root / "digits"
        pretrain(load_recipe("smoke/simclr", [f"training.output_dir={folder}", "training.monitor_steps=0"]))

    return made_once("runs", train) / "digits"


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs programs in separate processes that do not import torch again."""
    with Forks() as forks:
        yield forks


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches off the curves for runs in this process; in a small run, they take most of the time."""
    from hf_ssl.trainer.callbacks import CurvesCallback

    monkeypatch.setattr(CurvesCallback, "draw", lambda self, args, state: None)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def online(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubServer:
    """Connect this process to the local Hub server with a write token, and disable `time.sleep`."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # transformers 5.24 keeps one client, which has the address of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub
