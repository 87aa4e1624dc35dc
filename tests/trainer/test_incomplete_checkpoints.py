# SPDX-License-Identifier: Apache-2.0
"""A run resumes only from a checkpoint with every file that a save writes, or reports the missing one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import mentions
from transformers import TrainerCallback

from hf_ssl import run
from hf_ssl.errors import UserError
from hf_ssl.evaluation.label_trainer import _newest_complete
from hf_ssl.modeling.image_trainer import CONTENTS, list_files, missing_files
from hf_ssl.output_folder import last_checkpoint
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer.resuming import FIRST_DATA_STATE, find_problem, usable_checkpoint
from hf_ssl.trainer.trainer import SSLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
    "training.batch_size=32",
    "training.max_steps=6", "training.save_steps=2", "data.max_images=128", "training.online_probe=true",
]  # fmt: skip
WRITTEN = {
    "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth",
    "data_state_0.json", "trainer_state.json", "online_probe.pt",
}  # fmt: skip
USUAL = WRITTEN - {"config.json", "scaler.pt", "online_probe.pt"}


def recipe(folder: Path, *overrides: str) -> Any:
    return load_recipe("smoke/simclr", [*SMALL, f"training.output_dir={folder}", *overrides])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def save_scaler(trainer: SSLTrainer, folder: str) -> None:
    """Write the scaler of float16, which a run on a CPU does not have."""
    torch.save({}, f"{folder}/scaler.pt")


@pytest.fixture(scope="module")
def stopped(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The output folder of a run with the checkpoints 2 and 4 of 6 steps. Do not write to it."""

    def train(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SSLTrainer, "_save_scaler", save_scaler)
            run.train(recipe(root / "run"), [StopAt(4)])

    return made_once("stopped", train) / "run"


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    """The same folder, to write to, as a run without a scaler writes it."""
    shutil.copytree(stopped, tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        (checkpoint / "scaler.pt").unlink()
        list_files(checkpoint)
    return tmp_path / "run"


def remove(folder: Path, step: int, name: str) -> None:
    (folder / f"checkpoint-{step}" / name).unlink()


def test_a_checkpoint_lists_its_files(stopped: Path) -> None:
    for step in (2, 4):
        checkpoint = stopped / f"checkpoint-{step}"
        assert set(json.loads((checkpoint / CONTENTS).read_text())) == WRITTEN
        assert {path.name for path in checkpoint.iterdir()} == WRITTEN | {CONTENTS}


def test_a_missing_scaler_is_noticed(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4")
    assert find_problem(tmp_path / "checkpoint-4") is None
    remove(tmp_path, 4, "scaler.pt")
    assert find_problem(tmp_path / "checkpoint-4") == "no scaler.pt"


@pytest.mark.parametrize("name", sorted(WRITTEN - {"scaler.pt"}))
def test_an_older_complete_checkpoint_is_used(
    copied: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    settings = recipe(copied)
    assert last_checkpoint(settings) == copied / "checkpoint-4"
    remove(copied, 4, name)
    assert last_checkpoint(settings) == copied / "checkpoint-2"
    assert f"checkpoint-4 is not used, because it has no {name}" in caplog.text
    remove(copied, 2, name)
    with pytest.raises(UserError, match=mentions("checkpoint-4", name, "checkpoint-2", "delete")):
        last_checkpoint(settings)


@pytest.mark.parametrize("name", sorted(USUAL))
def test_a_checkpoint_of_an_older_version_has_no_list(copied: Path, name: str) -> None:
    remove(copied, 4, CONTENTS)
    assert find_problem(copied / "checkpoint-4") is None
    remove(copied, 4, name)
    assert name in str(find_problem(copied / "checkpoint-4"))


def test_other_names_of_an_older_version_are_complete(copied: Path) -> None:
    """Several processes have several random states, and large weights several files."""
    checkpoint = copied / "checkpoint-4"
    remove(copied, 4, CONTENTS)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert find_problem(checkpoint) is None


def test_the_run_ends_with_the_same_weights(copied: Path, tmp_path: Path) -> None:
    """Without its optimizer, the newest checkpoint would lead to other weights."""
    whole = run.train(recipe(tmp_path / "whole"))
    remove(copied, 4, "optimizer.pt")
    resumed = run.train(recipe(copied))
    assert (resumed.state.global_step, resumed.resumed) == (6, 1)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name
    assert (copied / "abandoned-checkpoint-4").is_dir()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_trainer_refuses_a_named_checkpoint_and_replaces_the_newest(copied: Path, name: str) -> None:
    settings = recipe(copied)
    trainer = run.build_trainer(settings, settings.training_arguments())
    remove(copied, 4, name)
    newest = copied / "checkpoint-4"
    with pytest.raises(UserError, match=mentions("checkpoint-4", name, copied / "checkpoint-2")):
        trainer.train(str(newest))
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.global_step, trainer.resumed) == (6, 1)


def test_a_finished_run_needs_no_optimizer(tmp_path: Path) -> None:
    first = run.train(recipe(tmp_path, "training.max_steps=2"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        remove(tmp_path, 2, name)
    again = run.train(recipe(tmp_path, "training.max_steps=2"))
    assert (again.state.global_step, again.resumed) == (2, 0)
    for name, value in first.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name]), name
    args = recipe(tmp_path, "training.max_steps=4")
    longer = run.build_trainer(args, args.training_arguments())
    with pytest.raises(UserError, match=mentions("optimizer.pt", "further training")):
        longer.train(str(tmp_path / "checkpoint-2"))


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path: Path) -> None:
    assert usable_checkpoint(tmp_path / "missing") is None


def test_training_with_labels_uses_a_complete_checkpoint(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _newest_complete(copied) == copied / "checkpoint-4"
    remove(copied, 4, "optimizer.pt")
    assert _newest_complete(copied) == copied / "checkpoint-2"
    assert "checkpoint-4 is not used, because it has no optimizer.pt" in caplog.text
    (copied / "checkpoint-2" / CONTENTS).write_text("")  # of an older version
    assert _newest_complete(copied) == copied / "checkpoint-2"
    assert missing_files(copied / "checkpoint-2", FIRST_DATA_STATE) == []
    remove(copied, 2, "scheduler.pt")
    assert _newest_complete(copied) is None
    remove(copied, 2, CONTENTS)  # the process ended before it wrote all files
    assert _newest_complete(copied) is None
