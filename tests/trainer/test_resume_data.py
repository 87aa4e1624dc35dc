# SPDX-License-Identifier: Apache-2.0
"""Every way of reading the data resumes in the middle of an epoch, bit for bit."""

import json
import multiprocessing
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers.trainer
from tiers import in_tiers
from transformers import TrainerCallback

from hf_ssl.data import DataConfig, open_source
from hf_ssl.data.config import CACHES
from hf_ssl.recipe import load_recipe
from hf_ssl.run import train
from hf_ssl.trainer import checkpoints

# An epoch has 7 batches of 16. With 3 accumulated batches, it has two full steps and a shorter one.
IMAGES, STEPS, KILLED_AT = 7 * 16 + 5, 8, 5
COMMON = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
    "training.save_steps=2", "training.logging_steps=1", "data.shuffle_window=24",
    f"training.max_steps={STEPS}",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Parquet file of several row groups."""
    folder = tmp_path_factory.mktemp("digits")
    rows = open_source(DataConfig(path="digits"), labels=True).dataset.select(range(IMAGES))
    rows.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=16)
    return folder


def overrides(digits: Path, output: Path, accumulated: int, *more: str) -> list[str]:
    return [
        *COMMON,
        f"data.path={digits}",
        f"training.output_dir={output}",
        f"training.batch_size={16 * accumulated}",
        f"training.gradient_accumulation_steps={accumulated}",
        *more,
    ]


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            raise RuntimeError("crashed")


def losses(trainer) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}


def check_crash(digits: Path, folder: Path, accumulated: int, *more: str) -> None:
    whole = train(load_recipe("smoke/simclr", overrides(digits, folder / "whole", accumulated, *more)))
    recipe = load_recipe("smoke/simclr", overrides(digits, folder / "cut", accumulated, *more))
    with pytest.raises(RuntimeError, match="crashed"):
        train(recipe, [Crash()])
    resumed = train(recipe)
    assert resumed.resumed == 1
    assert multiprocessing.active_children() == []  # otherwise the garbage collector waits for them
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name
    assert losses(whole) == losses(resumed)
    epochs = [[record["epoch"] for record in run.state.log_history] for run in (whole, resumed)]
    assert epochs[0] == epochs[1]


EPOCHS = [
    (1, ["data.cache=device", "training.dataloader_num_workers=2"]),
    (3, ["data.cache=device", "training.dataloader_num_workers=0"]),
    (3, ["data.streaming=true", "training.dataloader_num_workers=0"]),
]


@pytest.mark.parametrize(("accumulated", "more"), in_tiers(EPOCHS, EPOCHS[2:]))
def test_a_run_resumes_in_the_middle_of_an_epoch(digits, tmp_path, accumulated, more):
    check_crash(digits, tmp_path, accumulated, *more)


def test_transformers_skips_batches_by_the_name_that_is_replaced(digits, tmp_path, monkeypatch):
    """If this test fails, transformers no longer resumes as `keep_loader_position` describes."""
    calls = []

    def counted(loader, num_batches=0):
        calls.append(num_batches)
        return loader

    monkeypatch.setattr(checkpoints, "_return_unchanged", counted)
    original = transformers.trainer.skip_first_batches
    recipe = load_recipe("smoke/simclr", overrides(digits, tmp_path, 1, "data.cache=device"))
    with pytest.raises(RuntimeError, match="crashed"):
        train(recipe, [Crash()])
    train(recipe)
    assert calls == [4]
    assert transformers.trainer.skip_first_batches is original


GRID = [
    *product(CACHES, (0, 2), (1, 3), ("map",)),
    *product(("none",), (0, 2), (1, 3), ("stream",)),
]


@pytest.mark.slow
def test_every_cache_resumes_after_kill_minus_nine(digits, tmp_path):
    """Kills separate processes one step after a checkpoint, in the middle of an epoch."""
    groups, names = [], []
    for cache, workers, accumulated, kind in GRID:
        name = f"{cache}-{workers}-{accumulated}-{kind}"
        names.append(name)
        more = [f"data.cache={cache}", f"training.dataloader_num_workers={workers}"]
        more += ["data.streaming=true"] if kind == "stream" else []

        def job(part, kill_at, name=name, accumulated=accumulated, more=tuple(more)):
            return {
                "recipe": "smoke/simclr",
                "overrides": overrides(digits, tmp_path / f"{name}-{part}", accumulated, *more),
                "kill_at": kill_at,
                "weights": str(tmp_path / f"{name}-{part}.pt"),
            }

        groups += [[job("whole", None)], [job("cut", KILLED_AT)], [job("cut", None)]]
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps(groups))
    script = Path(__file__).parents[1] / "forked_runs.py"
    done = subprocess.run(
        [sys.executable, str(script), str(jobs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in names:
        whole, cut = (torch.load(tmp_path / f"{name}-{part}.pt") for part in ("whole", "cut"))
        differing = [k for k, value in whole["weights"].items() if not torch.equal(value, cut["weights"][k])]
        assert differing == [], name
        assert whole["losses"] == cut["losses"], name
