# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C end each phase of a run, and the run keeps its complete steps."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiers import in_tiers
from transformers import TrainerCallback

from hf_ssl import cli, commands
from hf_ssl.recipe import load_recipe
from hf_ssl.run import train
from hf_ssl.trainer.monitor import Monitor

SIGNALS = [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
    "training.batch_size=16", "training.max_steps=4", "training.save_steps=100", "data.max_images=64",
]  # fmt: skip


def recipe(folder: Path, *overrides: str):
    return load_recipe("smoke/simclr", [*SMALL, f"training.output_dir={folder}", *overrides])


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


class Send(TrainerCallback):
    """Sends signals to this process at the start of a step."""

    def __init__(self, step: int, number: int, times: int = 1, to=os.getpid) -> None:
        self.step, self.number, self.times, self.to = step, number, times, to

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(self.to(), self.number)
                time.sleep(0.01)  # signals that are pending at the same time become one


@pytest.mark.parametrize(("number", "raised"), in_tiers(SIGNALS, SIGNALS[:1]))
def test_the_step_is_finished_and_saved_and_the_same_command_resumes(tmp_path, number, raised):
    whole = train(recipe(tmp_path / "whole"))
    settings, before = recipe(tmp_path / "cut"), signal.getsignal(number)
    with pytest.raises(raised):
        train(settings, [Send(1, number)])
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2"]
    assert signal.getsignal(number) is before
    resumed = train(settings)
    assert (resumed.state.global_step, resumed.resumed) == (4, 1)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name


@pytest.mark.parametrize(("number", "raised"), in_tiers(SIGNALS, SIGNALS[:1]))
def test_a_second_signal_ends_at_once(tmp_path, number, raised):
    with pytest.raises(raised):
        train(recipe(tmp_path), [Send(1, number, times=2)])
    assert checkpoints(tmp_path) == []


class Measured:
    """Replaces the monitor's measurement by one that sends a signal and then never ends."""

    def __init__(self, number: int, at: int) -> None:
        self.number, self.at, self.calls = number, at, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls <= self.at:
            return {"embedding_std": 1.0, "embedding_rank": 9.0}
        os.kill(os.getpid(), self.number)
        while True:
            time.sleep(0.01)


@pytest.mark.parametrize(("number", "raised"), in_tiers(SIGNALS, SIGNALS[:1]))
@pytest.mark.parametrize(
    ("measurement", "saved"), in_tiers([(0, []), (1, ["checkpoint-2"])], [(1, ["checkpoint-2"])])
)
def test_a_measurement_is_aborted(tmp_path, monkeypatch, number, raised, measurement, saved):
    settings = recipe(tmp_path, "training.monitor_steps=2")
    monkeypatch.setattr(Monitor, "_measure_images", Measured(number, measurement))
    with pytest.raises(raised):
        train(settings)
    assert checkpoints(tmp_path) == saved
    monkeypatch.undo()
    assert train(settings).state.global_step == 4


@pytest.mark.parametrize("step", [2, 4])  # 4 is the last step
def test_a_measurement_that_a_signal_prevented_follows_in_the_resumed_run(
    tmp_path, monkeypatch, caplog, step
):
    best = ["training.metric_for_best_model=embedding_std", "training.load_best_model_at_end=true"]
    both = ["training.save_steps=2", "training.monitor_steps=2"]

    def run(name, *callbacks):
        return train(recipe(tmp_path / name, *both, *best), list(callbacks))

    def measure(spreads):
        values = iter(spreads)
        found = lambda monitor, model: {"embedding_std": next(values), "embedding_rank": 9.0}  # noqa: E731
        monkeypatch.setattr(Monitor, "_measure_images", found)

    spreads = [1.0, 3.0, 2.0] if step == 2 else [1.0, 2.0, 3.0]  # before the first step, after steps 2 and 4
    measure(spreads)
    whole = run("whole")
    measure(spreads)
    with pytest.raises(SystemExit):
        run("cut", Send(step - 1, signal.SIGTERM))
    assert "load_best_model_at_end" not in caplog.text
    resumed = run("cut")
    for trainer in (whole, resumed):
        history = [each for each in trainer.state.log_history if "eval_embedding_std" in each]
        assert [(each["step"], each["eval_embedding_std"]) for each in history] == list(
            zip((0, 2, 4), spreads, strict=True)
        )
        assert trainer.state.best_global_step == step
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, resumed.method.state_dict()[name]), name


class WhileSaving(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)


def test_a_signal_while_a_checkpoint_is_written_starts_no_further_step(tmp_path):
    with pytest.raises(SystemExit):
        train(recipe(tmp_path, "training.save_steps=2"), [WhileSaving()])
    assert checkpoints(tmp_path) == ["checkpoint-2"]


class ToWorkers(TrainerCallback):
    """Sends both signals to the loader's workers, as a terminal or a scheduler does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            workers = multiprocessing.active_children()
            assert len(workers) == 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGINT)
                os.kill(worker.pid, signal.SIGTERM)


def test_workers_survive_a_signal_to_all_processes(tmp_path):
    settings = recipe(tmp_path, "training.dataloader_num_workers=2", "training.max_steps=8")
    assert train(settings, [ToWorkers()]).state.global_step == 8


@pytest.mark.parametrize(
    ("command", "continues"),
    [
        (["methods"], False), (["pretrain", "smoke/simclr"], True), (["sweep", "smoke/simclr"], True),
        (["sweep", "smoke/simclr", "--list-jobs"], False), (["evaluate", "encoder"], False),
        (["evaluate", "encoder", "--suite", "transfer_small"], True),
    ],
)  # fmt: skip
def test_the_command_ends_on_sigterm_outside_of_training(monkeypatch, capsys, command, continues):
    before = signal.getsignal(signal.SIGTERM)

    def interrupted(arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(commands, command[0], interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 143
    shown = capsys.readouterr().err
    assert "terminated" in shown and ("the same command continues" in shown) == continues
    assert signal.getsignal(signal.SIGTERM) is before


DECODE = """
import os, signal, threading, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell disables it in the background
from hf_ssl import cli
from hf_ssl.data import images, inspection

def slow(data, channels, decode=images.decode):
    print("decoding", flush=True)
    time.sleep(0.2)
    return decode(data, channels)

import time
images.decode = inspection.decode = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_decoding_is_aborted_in_a_process_of_its_own(tmp_path, number):
    """Threads finish only their current chunk of images; the process does not wait for all images."""
    command = [sys.executable, "-c", DECODE, "pretrain", "smoke/simclr", f"training.output_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "decoding\n"
    process.send_signal(number)
    process.communicate(timeout=120)  # all 1,297 images of 0.2 s would take 8 threads 32 s
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
