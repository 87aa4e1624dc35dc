# SPDX-License-Identifier: Apache-2.0
"""The recorded number of images and epochs, and the recorded precision, are those of the computation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import mentions

from hf_ssl import run
from hf_ssl.data.batch import BrokenCounter
from hf_ssl.errors import UserError
from hf_ssl.recipe import load_recipe
from hf_ssl.recording import _training_facts
from hf_ssl.trainer.machine_settings import apply_choices, choose_precision

pytestmark = pytest.mark.usefixtures("no_curves")
# 5 micro-batches of 8 images in an epoch, and one optimizer step
SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0", "data.max_images=43",
    "training.batch_size=64", "training.gradient_accumulation_steps=8", "training.max_steps=-1",
    "training.num_train_epochs=3", "training.save_steps=2", "training.logging_steps=100",
]  # fmt: skip


def recipe(folder: Path, *overrides: str) -> Any:
    return load_recipe("smoke/simclr", [*SMALL, f"training.output_dir={folder}", *overrides])


def facts(folder: Path, *overrides: str) -> Any:
    own = recipe(folder, *overrides)
    return _training_facts(own, run.train(own))


def counted(found: Any) -> tuple[int, int, float]:
    return found["steps"], found["images_seen"], found["epochs"]


def test_short_steps_at_the_end_of_an_epoch_count_their_images(tmp_path: Path) -> None:
    first = facts(tmp_path)
    assert counted(first) == (3, 120, 3.0)
    assert counted(facts(tmp_path)) == (3, 120, 3.0), "a finished run is read again"
    for name in ("checkpoint-3/data_state_0.json", "checkpoint-2/data_state_0.json"):
        state = json.loads((tmp_path / name).read_text())
        assert state.pop("images_seen") == 40 * int(name[11])
        (tmp_path / name).write_text(json.dumps(state))
    assert counted(facts(tmp_path)) == (3, 120, 3.0), "an older version did not store the number"


def test_images_of_all_parts_of_a_run_are_counted(tmp_path: Path) -> None:
    facts(tmp_path, "training.num_train_epochs=3")
    for path in sorted(tmp_path.glob("checkpoint-3/*"), reverse=True):
        path.unlink()
    (tmp_path / "checkpoint-3").rmdir()
    again = facts(tmp_path, "training.num_train_epochs=3")
    assert (counted(again), again["resumed"]) == ((3, 120, 3.0), 1)


def test_a_run_that_ends_in_an_epoch(tmp_path: Path) -> None:
    few = ["training.gradient_accumulation_steps=2", "training.batch_size=16", "training.max_steps=5"]
    assert counted(facts(tmp_path, *few)) == (5, 72, 1.8)  # steps of 2, 2, 1, 2 and 2 micro-batches


def test_chunks_are_counted_once(tmp_path: Path) -> None:
    chunks = ["training.contrastive_chunk_size=4", "training.gradient_accumulation_steps=1"]
    found = facts(tmp_path, *chunks, "training.batch_size=8", "training.num_train_epochs=1")
    assert counted(found) == (5, 40, 1.0)


def test_broken_images_of_all_processes_are_counted() -> None:
    first, second = BrokenCounter(0.5, 100), BrokenCounter(0.5, 100)
    first.count(9, ["a"])
    second.count(8, ["a", "b"])
    first.merge([first.state_dict(), second.state_dict()])
    assert (first.broken, first.read) == (2, 20)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --mixed_precision bf16`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")


def test_the_precision_of_accelerate_launch_is_recorded(tmp_path: Path, launched: None) -> None:
    own = recipe(tmp_path, "training.precision=auto", "training.num_train_epochs=1")
    trainer = run.train(own)
    assert _training_facts(own, trainer)["precision"] == "bfloat16"
    assert trainer.choices["training.precision"]["value"] == "bfloat16"
    with torch.no_grad(), trainer.accelerator.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "keys", [["precision=float32"], ["precision=auto", "bf16=false"], ["precision=float16"]]
)
def test_another_precision_than_that_of_accelerate_launch_is_an_error(
    keys: list[str], tmp_path: Path, launched: None
) -> None:
    with pytest.raises(UserError, match=mentions("training.precision", "bfloat16")):
        recipe(tmp_path, *(f"training.{key}" for key in keys))


def test_a_run_resumes_only_with_its_precision(tmp_path: Path, launched: None) -> None:
    args = recipe(tmp_path, "training.precision=auto").training_arguments()
    with pytest.raises(UserError, match=mentions("training.precision", "bfloat16", "float32")):
        apply_choices(args, {"training.precision": {"value": "float32", "reason": "measured"}})
    choose_precision(args)
    assert args.mixed_precision == "bf16"


def test_an_unknown_precision_of_accelerate_launch_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=mentions("fp8")):
        recipe(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("ACCELERATE_USE_FSDP", "true", "--use_fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "--use_deepspeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "--use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "--use_parallelism_config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--dynamo_backend"),
    ],
)
def test_options_of_accelerate_launch_that_no_argument_contains_are_an_error(
    name: str, value: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, `accelerate launch --dynamo_backend inductor` compiled the model, and no file recorded it."""
    monkeypatch.setenv(name, "NO")  # as `accelerate launch` without the option
    recipe(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=mentions(option)):
        recipe(tmp_path)


def test_the_launcher_can_name_a_compiler_if_the_run_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert recipe(tmp_path, "training.torch_compile=true").training_arguments().torch_compile
