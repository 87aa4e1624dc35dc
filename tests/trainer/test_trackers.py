# SPDX-License-Identifier: Apache-2.0
"""Trackers receive the terms of the loss, the measurements of the monitor, and pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_ssl.building import build_trainer, draw_pictures
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer.trainer import SSLTrainer

KEYS = {"train/loss", "train/term_reconstruction", "eval/rank_me", "train/images_per_second"}
PICTURES = {"views", "reconstructions"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_curves: None) -> Any:
    """Trains MAE for a few steps with a tracker. MAE has a picture of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DIR", "TRACKIO_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")

    def train(tracker: str) -> SSLTrainer:
        recipe = load_recipe(
            "smoke/mae",
            [
                "training.max_steps=4", "training.monitor_steps=2", "training.logging_steps=1",
                "training.batch_size=16", "training.use_cpu=true", "training.disable_tqdm=true",
                "training.monitor_bank_images=50", "training.monitor_query_images=50",
                f"training.report_to={tracker}", f"training.output_dir={tmp_path / 'run'}",
                "training.run_name=first", "training.project=photos",
            ],
        )  # fmt: skip
        trainer = build_trainer(recipe, recipe.training_arguments())
        draw_pictures(recipe, trainer)
        trainer.train()
        return trainer

    return train


def test_tensorboard(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("tensorboard")
    tags: dict[str, set] = {"scalars": set(), "images": set()}
    for folder in {file.parent for file in tmp_path.rglob("events.out.*")}:
        found = EventAccumulator(str(folder)).Reload().Tags()
        tags = {kind: tags[kind] | set(found[kind]) for kind in tags}
    assert tags["scalars"] >= KEYS and tags["images"] >= PICTURES


def test_wandb_offline(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    logged: dict[str, Any] = {}
    init = wandb.init

    def recorded(*args: Any, **kwargs: Any) -> Any:
        run = init(*args, **kwargs)
        assert run.name == "first"
        log = wandb.log
        monkeypatch.setattr(wandb, "log", lambda values, **more: (logged.update(values), log(values, **more)))
        return run

    monkeypatch.setattr(wandb, "init", recorded)
    run("wandb")
    wandb.finish()
    assert set(logged) >= KEYS | PICTURES
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow_in_a_file(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    run("mlflow")
    client = MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    (experiment,) = [one for one in client.search_experiments() if client.search_runs([one.experiment_id])]
    (found,) = client.search_runs([experiment.experiment_id])
    names = {key.partition("/")[2] if "train/" in key else key.replace("/", "_") for key in KEYS}
    assert set(found.data.metrics) >= names  # MLflow keeps the names of the log records
    images = [Path(item.path).name for item in client.list_artifacts(found.info.run_id, "images")]
    assert all(any(image.startswith(name) for image in images) for name in PICTURES), images


def test_trackio(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    logged: dict[str, Any] = {}
    log, init = trackio.log, trackio.init
    started: dict[str, Any] = {}
    monkeypatch.setattr(trackio, "init", lambda **given: (started.update(given), init(**given))[1])
    monkeypatch.setattr(trackio, "log", lambda values, **more: (logged.update(values), log(values, **more)))
    run("trackio")
    assert set(logged) >= KEYS | PICTURES, json.dumps(sorted(logged))
    assert (started["project"], started["name"]) == ("photos", "first")
