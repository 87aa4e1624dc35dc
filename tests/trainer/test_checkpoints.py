# SPDX-License-Identifier: Apache-2.0
"""What a run's folder goes through: full disks, damaged and foreign checkpoints, signals, a second call."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from messages import mentions
from transformers import TrainerCallback

from hf_ssl import output_folder, run
from hf_ssl.cards import read_facts
from hf_ssl.errors import UserError
from hf_ssl.evaluation.label_trainer import LabelTrainer
from hf_ssl.output_folder import last_checkpoint, mark_output_folder, only_command, stored_choices
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer import checkpoints
from hf_ssl.trainer.alarms import CollapseAlarm
from hf_ssl.trainer.trainer import SSLTrainer

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = [
    "training.use_cpu=true",
    "training.disable_tqdm=true",
    "training.monitor_steps=0",
    "training.batch_size=64",
    "training.max_steps=4",
    "training.save_steps=2",
    "data.max_images=256",
]


def recipe(folder, *overrides):
    return load_recipe("smoke/simclr", [*SMALL, f"training.output_dir={folder}", *overrides])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("trainer", [SSLTrainer, LabelTrainer])
def test_weights_of_another_model_end_in_a_sentence_with_advice(trainer):
    result = SimpleNamespace(missing_keys=["head.weight"], unexpected_keys=[])
    with pytest.raises(
        UserError, match=mentions("checkpoint", "head.weight", "use the model of the checkpoint")
    ):
        trainer._issue_warnings_after_load(None, result)


def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_saved(tmp_path, monkeypatch):
    saved = SSLTrainer._save_rng_state

    def save(self, directory):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved(self, directory)

    monkeypatch.setattr(SSLTrainer, "_save_rng_state", save)
    with pytest.raises(UserError, match=mentions("checkpoint-4", "no space left")):
        run.train(recipe(tmp_path))
    assert "checkpoint-2" in names(tmp_path)
    assert not [name for name in names(tmp_path) if "4" in name]
    monkeypatch.undo()
    assert run.train(recipe(tmp_path)).state.global_step == 4


DAMAGED = ["model.safetensors", "optimizer.pt", "data_state_0.json", "trainer_state.json"]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_checkpoint_ends_in_a_sentence(tmp_path, damaged):
    run.train(recipe(tmp_path, "training.max_steps=3"))
    file = tmp_path / "checkpoint-2" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "checkpoint-3").rename(tmp_path / "_checkpoint-3")
    with pytest.raises(UserError, match=mentions("checkpoint-2")):
        run.train(recipe(tmp_path, "training.max_steps=3"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run.train(recipe(tmp_path / "one", "training.max_steps=2"))
    other = recipe(tmp_path / "two", "method.projection_layers=3")
    trainer = run.build_trainer(other, other.training_arguments())
    with pytest.raises(UserError, match=mentions("checkpoint", "projector")):
        trainer.train(str(tmp_path / "one" / "checkpoint-2"))


def test_trainers_in_one_process_keep_their_precision(tmp_path):
    """accelerate 1.15 would use the precision of the trainer that was made last."""
    settings = [
        recipe(tmp_path / precision, "training.max_steps=1", f"training.precision={precision}")
        for precision in ("bfloat16", "float32")
    ]
    first, _ = (run.build_trainer(each, each.training_arguments()) for each in settings)
    assert first.accelerator.mixed_precision == "no"  # else the workaround is not needed
    first.train()
    assert first.accelerator.mixed_precision == "bf16"


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    run.train(recipe(tmp_path))
    before = names(tmp_path)
    with pytest.raises(UserError, match=mentions("method.temperature", 0.5, 0.1)):
        run.train(recipe(tmp_path, "method.temperature=0.1"))
    assert names(tmp_path) == before
    assert json.loads((tmp_path / "_run.json").read_text())["method"]["temperature"] == 0.5


HOLD = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""


def test_two_commands_do_not_train_in_one_folder(tmp_path):
    lock = tmp_path / "_run.lock"

    def refused():
        command = [sys.executable, "-c", HOLD, str(lock)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=mentions("training.output_dir", tmp_path, "another folder")):
                run.train(recipe(tmp_path))
            other.kill()

    refused()  # the folder contains no `_run.json` yet, as at the start of the other command
    assert names(tmp_path) == ["_run.lock"]  # left by the process that was killed
    (tmp_path / "_writing-_run.json").touch()
    assert run.train(recipe(tmp_path)).state.global_step == 4
    before = names(tmp_path)
    assert "_run.lock" not in before and "_writing-_run.json" not in before
    refused()
    assert [name for name in names(tmp_path) if name != "_run.lock"] == before


def test_a_training_that_ends_with_an_error_leaves_no_lock(tmp_path):
    with pytest.raises(UserError), only_command(tmp_path):
        raise UserError("the loss is not finite")
    assert names(tmp_path) == []


def test_a_run_on_a_file_system_without_locks_uses_no_lock(tmp_path, monkeypatch):
    def lockf(file, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(output_folder, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4))
    (tmp_path / "_run.lock").touch()
    for _ in range(2):
        with only_command(tmp_path), only_command(tmp_path):
            pass
    assert names(tmp_path) == []


def test_values_that_do_not_affect_the_weights_may_change(tmp_path):
    mark_output_folder(recipe(tmp_path), {}, "revision")
    changes = ("on_worse=stop", "on_collapse=stop", "do_train=true", "prediction_loss_only=true")
    changes += ("dataloader_num_workers=1", "dataloader_pin_memory=false", "log_level=error")
    changes += ("logging_first_step=false", "ddp_timeout=100", "skip_memory_metrics=false")
    assert last_checkpoint(recipe(tmp_path, *(f"training.{change}" for change in changes))) is None


def test_a_run_resumes_on_a_machine_with_another_number_of_workers(tmp_path):
    whole = run.train(recipe(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        run.train(recipe(tmp_path / "stopped"), [Terminate()])
    resumed = run.train(recipe(tmp_path / "stopped", "training.dataloader_num_workers=1"))
    assert (resumed.state.global_step, resumed.resumed) == (4, 1)
    for name, value in whole.method.state_dict().items():
        assert value.equal(resumed.method.state_dict()[name]), name


@pytest.mark.parametrize(("key", "short", "value"), [("max_steps", 2, 9), ("num_train_epochs", 0.05, 9.0)])
def test_a_longer_run_in_the_same_folder_is_refused_with_the_reason(tmp_path, key, short, value):
    run.train(recipe(tmp_path, f"training.{key}={short}"))
    with pytest.raises(UserError, match=mentions(f"training.{key}", value, "schedule")):
        run.train(recipe(tmp_path, f"training.{key}={value}"))


def test_a_damaged_record_of_the_run_ends_in_a_sentence(tmp_path):
    (tmp_path / "_run.json").write_bytes(b'{"name": "\xff')
    with pytest.raises(UserError, match=mentions("_run.json", tmp_path.name)):
        last_checkpoint(recipe(tmp_path))


def test_changed_images_are_reported_when_a_run_resumes(tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        PIL.Image.new("L", (8, 8), 6 * number).save(photos / f"{number}.png")
    settings = recipe(tmp_path / "out", f"data.path={photos}", "training.batch_size=8")
    run.train(settings)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    run.train(settings)
    assert "resuming" in caplog.text and "the images in" not in caplog.text
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (photos / "7.png").unlink()
    assert run.train(settings).state.global_step == 4
    assert any("the images in" in record.message and "exactly" in record.message for record in caplog.records)


OLDER = {
    "float32 by default": ({}, "auto", {"precision": "float32", "dataloader_num_workers": 0}),
    "half precision": ({"bf16": True}, "auto", {"precision": "bfloat16", "dataloader_num_workers": 0}),
    "workers": (
        {"bf16": True, "dataloader_num_workers": 1},
        "auto",
        {"precision": "bfloat16", "dataloader_num_workers": 1},
    ),
    "a recipe that says float32 now": ({}, "float32", {"dataloader_num_workers": 0}),
}


def write_as_an_older_version(folder, settings, had):
    written = settings.to_dict()
    del written["training"]["precision"]
    written["training"] |= had
    (folder / "_run.json").write_text(json.dumps(written))


@pytest.mark.parametrize(("had", "precision", "kept"), OLDER.values(), ids=OLDER)
def test_a_run_of_an_older_version_keeps_what_it_had(tmp_path, had, precision, kept):
    settings = recipe(tmp_path, f"training.precision={precision}")
    write_as_an_older_version(tmp_path, settings, had)
    assert last_checkpoint(settings) is None  # not refused
    choices = {key: choice["value"] for key, choice in stored_choices(settings).items()}
    assert choices == {f"training.{name}": value for name, value in kept.items()}


@pytest.mark.parametrize("key", ["shuffle_window", "box_format", "max_broken_fraction", "mask_column"])
def test_a_run_of_a_version_without_a_setting_of_the_data_resumes(tmp_path, key):
    settings = recipe(tmp_path)
    mark_output_folder(settings, {}, "revision")
    run = json.loads((tmp_path / "_run.json").read_text())
    del run["data"][key]
    (tmp_path / "_run.json").write_text(json.dumps(run))
    assert last_checkpoint(settings) is None
    if key == "shuffle_window":
        with pytest.raises(UserError, match=mentions("data.shuffle_window", 7)):
            last_checkpoint(recipe(tmp_path, "data.shuffle_window=7"))


def test_a_run_of_a_version_without_rotations_resumes(tmp_path):
    settings = recipe(tmp_path, "views.second.blur=0.1")
    mark_output_folder(settings, {}, "revision")
    run = json.loads((tmp_path / "_run.json").read_text())
    for key in ("quarter_turns", "rotation", "rotation_degrees"):
        del run["views"][key], run["views"]["second"][key]
    (tmp_path / "_run.json").write_text(json.dumps(run))
    assert last_checkpoint(settings) is None
    with pytest.raises(UserError, match=mentions("views.rotation", 0.5)):
        last_checkpoint(recipe(tmp_path, "views.second.blur=0.1", "views.rotation=0.5"))


def test_a_run_of_an_older_version_with_another_precision_is_refused(tmp_path):
    settings = recipe(tmp_path, "training.precision=bfloat16")
    write_as_an_older_version(tmp_path, settings, {})
    with pytest.raises(UserError, match=mentions("training.precision", "bfloat16")):
        run.train(settings)


def test_a_run_of_an_older_version_with_the_old_keys_of_lars_is_the_same_run(tmp_path):
    group = ["training.optimizer=lars", "training.lars.variant=larc", "training.lars.trust_coefficient=0.02"]
    settings = recipe(tmp_path, *group)
    run.train(settings, [Kill()])
    stored = json.loads((tmp_path / "_run.json").read_text())
    del stored["training"]["lars"]
    stored["training"] |= {"lars_variant": "larc", "lars_trust_coefficient": 0.02, "monitor_neighbours": 5}
    (tmp_path / "_run.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=mentions("training.lars.trust_coefficient", 0.02, 0.03)):
        run.train(recipe(tmp_path, *group, "training.lars.trust_coefficient=0.03"))
    resumed = run.train(settings)
    assert (resumed.state.global_step, resumed.resumed) == (4, 1)


def test_a_run_of_an_older_version_resumes(tmp_path):
    settings = recipe(tmp_path, "training.precision=auto")
    run.train(settings, [Kill()])
    write_as_an_older_version(tmp_path, settings, {"bf16": True})
    state = tmp_path / "checkpoint-2" / "data_state_0.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"broken": {"read": 128, "broken": 0}}))
    resumed = run.train(settings)
    assert (resumed.state.global_step, resumed.resumed, resumed.args.precision) == (4, 1, "bfloat16")


class Kill(TrainerCallback):
    """Ends training after the checkpoint of step 2."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    settings = recipe(tmp_path, "training.save_steps=100")
    with pytest.raises(SystemExit) as ended:
        run.train(settings, [Terminate()])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "checkpoint-3" in names(tmp_path)
    finished = run.train(settings)
    assert (finished.state.global_step, finished.resumed) == (4, 1)


def test_a_run_that_is_resumed_on_another_machine_records_both(tmp_path, monkeypatch):
    settings = recipe(tmp_path, "training.save_steps=100")
    with pytest.raises(SystemExit):
        run.train(settings, [Terminate()])
    own = checkpoints.environment("cpu")
    monkeypatch.setattr(checkpoints, "environment", lambda *_: own | {"device": "another processor"})
    finished = run.train(settings)
    machine = finished.machine_of_training()
    assert machine["environment"]["device"] == "another processor"
    (before,) = machine["earlier"]
    assert (before["last_step"], before["environment"], before["processes"]) == (3, own, 1)
    assert before["precision"] == machine["precision"]
    monkeypatch.undo()  # another command, which only evaluates the finished run
    run.pretrain(settings)
    facts = read_facts(tmp_path)
    assert facts["training"]["earlier"] == [before] and facts["environment"] == machine["environment"]


def test_a_run_that_is_over_is_not_trained_again(tmp_path, monkeypatch):
    settings = recipe(tmp_path)
    first = run.train(settings)
    machine = first.machine_of_training()
    other = machine["environment"] | {"device": "another processor", "cores": 999}
    monkeypatch.setattr("hf_ssl.trainer.checkpoints.environment", lambda *_: other)
    assert first.machine_of_training()["environment"] == other
    again = run.train(settings)
    assert again.machine_of_training() == machine  # the other machine did not train the run
    assert again.state.global_step == 4
    assert again.resumed == 0
    spent = first.stopwatch.seconds
    time.sleep(0.3)
    assert first.stopwatch.seconds == spent  # what comes after training does not count
    assert 0 < again.stopwatch.seconds <= spent
    for name, value in first.method.state_dict().items():
        assert value.equal(again.method.state_dict()[name]), name


def test_other_users_can_read_the_weights(finished_run):
    """safetensors creates files that only their owner can read."""
    files = [path for path in finished_run.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent.name for path in weights} >= {"digits", "pretraining", "checkpoint-8"}
    expected = stat.S_IMODE((finished_run / "config.json").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in weights} == {expected}


def test_a_finished_run_keeps_its_best_model(tmp_path):
    """The second call of the same command exports the same weights."""
    best = [
        "training.monitor_steps=1", "training.save_steps=1", "training.load_best_model_at_end=true",
        "training.metric_for_best_model=loss", "training.greater_is_better=true",
    ]  # fmt: skip
    first, again = (run.train(recipe(tmp_path, *best)) for _ in range(2))
    assert first.state.best_global_step < 4
    weights = [trainer.method.state_dict() for trainer in (first, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    third = run.train(recipe(moved, *best)).method.state_dict()
    assert all(torch.equal(value, third[name]) for name, value in weights[0].items())


def test_a_run_that_an_alarm_stopped_stays_stopped(tmp_path, monkeypatch):
    stop = ["training.monitor_steps=1", "training.on_collapse=stop"]
    monkeypatch.setattr(
        CollapseAlarm, "find_problem", lambda self, history: "bad" if len(history) == 5 else None
    )
    for _ in range(2):
        with pytest.raises(UserError, match="bad; the run was stopped"):
            run.train(recipe(tmp_path, *stop))
    assert run.train(recipe(tmp_path, stop[0])).stop_reason is None


def test_the_output_folder_can_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe("~/runs/x").output_dir == tmp_path / "runs" / "x"


def test_a_failed_evaluation_keeps_the_reason(tmp_path, monkeypatch):
    trainer = run.train(recipe(tmp_path))
    trainer.save_model()

    def fail(*args, **kwargs):
        raise UserError("the bank has one class")

    monkeypatch.setattr(run, "evaluate_encoder", fail)
    measured = run.evaluate_run(recipe(tmp_path), trainer, tmp_path)
    assert measured.skip_reason == "the bank has one class" and not measured.results
