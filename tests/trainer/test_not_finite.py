# SPDX-License-Identifier: Apache-2.0
"""Weights that are not finite are never saved, resumed from, exported, published or described."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import mentions
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetModel, TrainerCallback

from hf_ssl import run
from hf_ssl.errors import UserError
from hf_ssl.hub.export import export_checkpoint, export_encoder, image_processor
from hf_ssl.hub.publish import publish
from hf_ssl.methods import METHODS
from hf_ssl.modeling.finite import not_finite
from hf_ssl.modeling.loading import load_weights
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer import checkpoints
from hf_ssl.trainer.resuming import find_problem
from hf_ssl.weight_files import not_finite_in_file

pytestmark = pytest.mark.usefixtures("no_curves")
SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
    "training.batch_size=16",
    "training.max_steps=4", "training.save_steps=2", "training.logging_steps=1000", "data.max_images=128",
]  # fmt: skip


def recipe(folder: Path, *overrides: str, name: str = "simclr") -> Any:
    return load_recipe(f"smoke/{name}", [*SMALL, f"training.output_dir={folder}", *overrides])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Poison(TrainerCallback):
    """Writes a number that is not finite to a tensor of the model, after a step."""

    def __init__(self, step: int, name: str, value: float = float("nan")) -> None:
        self.step, self.name, self.value = step, name, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            named = {key: each for key, each in model.state_dict().items() if self.name in key}
            tensor = next(each for each in named.values() if each.is_floating_point())
            tensor[(0,) * tensor.ndim] = self.value


def poison(file: Path, value: float = float("nan")) -> str:
    """Write a number that is not finite to a file of weights, and return the name of its tensor."""
    weights = load_file(file)
    name = sorted(key for key, tensor in weights.items() if tensor.is_floating_point())[-1]
    weights[name].view(-1)[0] = value
    save_file(weights, file, {"format": "pt"})
    return name


PARTS = {
    "parameter": ("simclr", "projector"),
    "statistics": ("simclr", "running_var"),
    "teacher": ("moco", "teacher_backbone"),
    "queue": ("moco", "queue"),
    "center": ("dino", "center"),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_run_stops_at_the_next_save_and_names_the_last_good_checkpoint(tmp_path: Path, part: str) -> None:
    name, tensor = PARTS[part]
    with pytest.raises(UserError, match=mentions("step 4", "checkpoint-2", "of step 2", tensor)):
        run.train(recipe(tmp_path, name=name), [Poison(4, tensor)])
    assert {path for path in names(tmp_path) if "checkpoint" in path} == {"checkpoint-2"}


def test_the_same_command_then_resumes_from_the_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint-2"):
        run.train(recipe(tmp_path), [Poison(3, "projector")])
    resumed = run.train(recipe(tmp_path))
    assert (resumed.state.global_step, resumed.resumed) == (4, 1)


def test_nothing_is_named_if_no_checkpoint_is_good(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("step 2", "no good checkpoint", "training.learning_rate")):
        run.train(recipe(tmp_path), [Poison(1, "running_mean", float("inf"))])
    assert not [name for name in names(tmp_path) if "checkpoint" in name]


@pytest.mark.parametrize("monitored", [False, True])
def test_a_diverged_run_without_a_save_writes_neither_encoder_nor_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitored: bool
) -> None:
    """With a monitor, it does not end in an error of linear algebra."""
    # Without a monitor, all losses are finite.
    poisoned, found, steps = (1, 2, 2) if monitored else (4, 4, 0)
    trained, diverges = run.train, Poison(poisoned, "projector")
    monkeypatch.setattr(run, "train", lambda recipe: trained(recipe, [diverges]))
    settings = recipe(tmp_path, "training.save_strategy=no", f"training.monitor_steps={steps}")
    with pytest.raises(UserError, match=mentions(f"step {found}", "no good checkpoint")):
        run.pretrain(settings)
    assert not names(tmp_path) & {"config.json", "model.safetensors", "README.md", "pretraining"}


def test_a_checkpoint_with_a_diverged_optimizer_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.train(recipe(tmp_path, "training.save_total_limit=3"))
    assert find_problem(tmp_path / "checkpoint-4") is None
    shutil.rmtree(tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    next(iter(state["state"].values()))["exp_avg"].fill_(float("nan"))
    torch.save(state, file)
    assert find_problem(tmp_path / "checkpoint-2") == "NaN or infinity in optimizer.pt.0.exp_avg"
    with pytest.raises(UserError, match=mentions("training.output_dir", "checkpoint-2", "optimizer.pt")):
        run.train(recipe(tmp_path, "training.save_total_limit=3"))
    file.write_bytes(b"damaged")
    assert find_problem(tmp_path / "checkpoint-2") is None, "the loader reports it"


def test_a_diverged_optimizer_is_not_saved(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 4:
                next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))

    with pytest.raises(UserError, match=mentions("step 4", "checkpoint-2", "optimizer")):
        run.train(recipe(tmp_path), [Overflow()])
    assert {path for path in names(tmp_path) if "checkpoint" in path} == {"checkpoint-2"}


def test_old_checkpoints_that_diverged_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Older versions saved them, and the same command resumed from them each time."""
    run.train(recipe(tmp_path))
    name = poison(tmp_path / "checkpoint-4" / "model.safetensors")
    resumed = run.train(recipe(tmp_path))
    assert (resumed.state.global_step, resumed.resumed) == (4, 1)
    assert "checkpoint-4 is not used" in caplog.text and name in caplog.text
    assert not_finite(resumed.method.state_dict()) is None
    for number in (2, 4):
        poison(tmp_path / f"checkpoint-{number}" / "model.safetensors", float("inf"))
    with pytest.raises(UserError, match=mentions("checkpoint-4", name, "checkpoint-2", "delete")):
        run.train(recipe(tmp_path))


def test_all_processes_stop_if_one_of_them_finds_a_number_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of BatchNorm can differ between processes."""
    monkeypatch.setattr(checkpoints, "from_every_process", lambda own: [own, "running_var"])
    with pytest.raises(UserError, match=mentions("step 2", "running_var")):
        run.train(recipe(tmp_path))
    assert not [name for name in names(tmp_path) if "checkpoint" in name]


TWO = """
import os, sys, torch
from transformers import TrainerCallback
from hf_ssl.errors import UserError
from hf_ssl.recipe import load_recipe
from hf_ssl.run import train

class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4 and args.process_index == 1:
            key = next(key for key in model.state_dict() if "running_var" in key)
            model.state_dict()[key].view(-1)[0] = float("inf")

port, *overrides = sys.argv[1:]
children = []
for rank in range(2):
    child = os.fork()
    if not child:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            train(load_recipe("smoke/simclr", overrides), [Poison()])
        except UserError as error:
            os._exit(5 if "running_var" in str(error) and "checkpoint-2" in str(error) else 6)
        os._exit(7)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(0 if codes == [5, 5] else 1)
"""


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path, forks: Any) -> None:
    overrides = [*SMALL, f"training.output_dir={tmp_path / 'out'}"]
    done = forks.run("hf_ssl", TWO, str(29700 + hash(str(tmp_path)) % 200), *overrides, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {name for name in names(tmp_path / "out") if "checkpoint" in name} == {"checkpoint-2"}


class Skip(TrainerCallback):
    """Skips an optimizer step, as the scaler of float16 does for gradients that are not finite."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            for parameter in model.parameters():
                parameter.grad = None


def test_a_skipped_step_is_legal(tmp_path: Path) -> None:
    assert run.train(recipe(tmp_path), [Skip()]).state.global_step == 4
    assert {"checkpoint-2", "checkpoint-4"} <= names(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_the_initial_model_of_every_method_is_finite(name: str) -> None:
    """A buffer with an infinite mask would stop each run."""
    settings = load_recipe(f"smoke/{name}", SMALL)
    model = run.build_model(settings, 0, None)
    assert not_finite(model.state_dict()) is None


def test_a_diverged_checkpoint_is_not_exported(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "checkpoint-8", tmp_path / "checkpoint-8")
    name = poison(tmp_path / "checkpoint-8" / "model.safetensors")
    with pytest.raises(UserError, match=mentions("checkpoint-8", name, "earlier step")):
        export_checkpoint(tmp_path / "checkpoint-8", tmp_path / "exported")
    assert names(tmp_path) == {"checkpoint-8"}


def test_a_diverged_encoder_is_neither_exported_nor_loaded(tmp_path: Path) -> None:
    encoder = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    encoder.save_pretrained(tmp_path / "saved")
    name = poison(tmp_path / "saved" / "model.safetensors", float("-inf"))
    with pytest.raises(UserError, match=mentions("backbone.init_from", name)):
        load_weights(str(tmp_path / "saved"), "backbone.init_from")
    with torch.no_grad():
        encoder.embedder.embedder.normalization.running_mean[0] = float("nan")
    with pytest.raises(UserError, match=mentions("embedder.embedder.normalization.running_mean")):
        export_encoder(
            encoder, image_processor({"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}, 3), tmp_path / "new"
        )
    assert names(tmp_path) == {"saved"}


@pytest.mark.parametrize("folder", [".", "pretraining"])
def test_diverged_weights_are_not_published(finished_run: Path, tmp_path: Path, folder: str) -> None:
    copied = tmp_path / "run"
    shutil.copytree(finished_run, copied, ignore=shutil.ignore_patterns("checkpoint-*"))
    publish(copied, "user/name", dry_run=True)
    name = poison(copied / folder / "model.safetensors")
    with pytest.raises(UserError, match=mentions("model.safetensors", name)):
        publish(copied, "user/name", dry_run=True)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_files_and_tensors_are_checked_alike(tmp_path: Path, kind: torch.dtype, value: float | None) -> None:
    weights = {
        "counts": torch.full((3,), -1), "empty": torch.zeros(0),
        "large": torch.full((3,), torch.finfo(kind).max, dtype=kind),
        "values": torch.tensor([0.0, -1.0, 1e-7], dtype=kind),
    }  # fmt: skip
    if value is not None:
        weights["values"][1] = value
    save_file(weights, tmp_path / "model.safetensors")
    expected = None if value is None else "values"
    assert not_finite(weights) == not_finite_in_file(tmp_path / "model.safetensors") == expected


def test_a_damaged_file_is_left_to_the_loader(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content in (b"", b"\xff" * 40, (3).to_bytes(8, "little") + b"[1]", b"\x02" + b"\0" * 7 + b"{}"):
        file.write_bytes(content)
        assert not_finite_in_file(file) is None
