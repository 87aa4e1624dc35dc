# SPDX-License-Identifier: Apache-2.0
"""Checks which packages a run imports before its first training step, and how often it lists a folder.

Each run is a new process, because only a new process shows its imports.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch  # noqa: F401  (loads it in this process)

from hf_ssl.commands import quick_imports

RUN = """
import importlib.machinery, json, os, sys

listed = []
def note(event, arguments):
    if event in ("os.scandir", "os.listdir") and not isinstance(arguments[0], int):
        listed.append(os.path.abspath(os.fsdecode(arguments[0] or ".")))
sys.addaudithook(note)

from hf_ssl.cli import main
report = {}

def begin(trainer, *arguments, **options):
    report.setdefault("modules", sorted(sys.modules))
    report.setdefault("frozen", __import__("gc").get_freeze_count())
    return step(trainer, *arguments, **options)

class Finder:  # wraps the trainer's step when its module is imported; it imports nothing itself
    @staticmethod
    def find_spec(name, path, target=None):
        global step
        if name != "hf_ssl.trainer.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            global step
            execute(module)
            step = module.SSLTrainer.training_step
            module.SSLTrainer.training_step = begin
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder)

status = main(sys.argv[2:])
report["listed"] = listed
open(sys.argv[1], "w").write(json.dumps(report))
sys.exit(status)
"""


def run(folder: Path, *overrides: str) -> dict:
    """Return the report of `hf-ssl pretrain smoke/simclr` with two steps."""
    command = ["pretrain", "smoke/simclr", f"training.output_dir={folder / 'run'}", "training.max_steps=2"]
    quick = [
        "evaluation.baselines=false",
        "evaluation.settings.linear.epochs=1",
        "evaluation.settings.few_label_knn.draws=1",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    report = folder / "report.json"
    finished = subprocess.run(
        [sys.executable, "-c", RUN, report, *command, *quick, *overrides],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory):
    return run(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def trainer_modules() -> set[str]:
    """Modules that `from transformers import Trainer` imports in a process of its own."""
    code = "import json, sys; from transformers import Trainer; print(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "package",
    [
        "matplotlib",  # draws curves and pictures after training
        "sklearn",  # fits probes; hf_ssl reads the digits without it
        "scipy.stats",
        "timm",
        "gradio",
        "faiss",
        "hf_ssl.space",
        "hf_ssl.evaluation.attention",
        "hf_ssl.evaluation.overlays",
        "transformers.models.timm_wrapper.image_processing_timm_wrapper",
    ],
)
@pytest.mark.slow
def test_a_run_does_not_import_before_its_first_step(package, on_digits, trainer_modules):
    """What transformers' Trainer imports by itself is not counted (5.20: scikit-learn and scipy.stats)."""
    assert "torch" in on_digits["modules"]
    if package in trainer_modules:
        assert package in ("sklearn", "scipy.stats")
        return
    assert [name for name in on_digits["modules"] if f"{name}.".startswith(f"{package}.")] == []


def test_imported_objects_are_excluded_from_collections(on_digits):
    assert on_digits["frozen"] > 100_000


def test_the_collector_works_again_after_an_error(monkeypatch):
    with quick_imports():
        assert gc.isenabled()  # because torch was imported before
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ValueError, match="x"), quick_imports():
        assert not gc.isenabled()
        raise ValueError("x")
    assert gc.isenabled() and gc.get_freeze_count()
    gc.unfreeze()


@pytest.mark.slow
def test_a_run_lists_each_directory_of_its_images_once(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name in ("ant", "bee"):
            directory = tmp_path / "photos" / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (8 + number % 2, 8, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(directory / f"{number}.png")
            os.utime(directory, (1e9, 1e9))  # an old time stamp
        os.utime(directory.parent, (1e9, 1e9))
    os.utime(tmp_path / "photos", (1e9, 1e9))
    listed = run(tmp_path, f"data.path={tmp_path / 'photos'}", "data.cache=none")["listed"]
    inside = [path for path in listed if path.startswith(str(tmp_path / "photos"))]
    assert sorted(inside) == sorted(
        str(tmp_path / "photos" / part)
        for part in ("", "train", "train/ant", "train/bee", "test", "test/ant", "test/bee")
    )
