# SPDX-License-Identifier: Apache-2.0
"""Settings that count epochs: the length of an epoch is known, or they are rejected."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Features, Image, IterableDataset
from messages import mentions
from transformers import TrainerCallback, TrainingArguments

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments
from hf_ssl.errors import UserError
from hf_ssl.methods import METHODS
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer.epochs import IN_EPOCHS, check_epochs

IMAGES = 24
TINY = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
pytestmark = pytest.mark.usefixtures("no_curves")


def stream() -> IterableDataset:
    def rows() -> Any:
        for row in range(IMAGES):
            yield {"image": PIL.Image.new("RGB", (8, 8), (row, 0, 2 * row))}

    return IterableDataset.from_generator(rows, features=Features(image=Image()))


def trainer(folder: Path, data: dict[str, Any], **options: Any) -> SSLTrainer:
    given = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "max_steps": 7,
        "per_device_train_batch_size": 8, "monitor_steps": 0, "precision": "float32",
        "dataloader_num_workers": 0, "save_strategy": "no", **options,
    }  # fmt: skip
    config: Any = {"model_type": "resnet", **TINY}
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, views={"size": 8}))
    return SSLTrainer(model=model, args=SSLTrainingArguments(**given), train_dataset=stream(), data=data)


class FirstConvolution(TrainerCallback):
    """Stores the first convolution before each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(next(model.backbone.parameters()).detach().clone())


def test_the_heads_alone_are_trained_for_one_epoch_of_a_stream(tmp_path: Path) -> None:
    run, convolution = trainer(tmp_path, {"num_images": IMAGES}, head_warmup_epochs=1), FirstConvolution()
    run.add_callback(convolution)
    run.train()
    assert run.steps_per_epoch == 3
    first, *later = convolution.seen
    assert [torch.equal(first, each) for each in later] == [True, True, True, False, False, False]


class GradientNorm(TrainerCallback):
    """Stores the norm of all gradients before each step of the optimizer."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.seen.append(torch.cat(gradients).norm().item())


def test_gradients_of_a_frozen_backbone_do_not_count_for_clipping(tmp_path: Path) -> None:
    limits = {"head_warmup_epochs": 1, "max_grad_norm": 1e-3}
    run, norm = trainer(tmp_path, {"num_images": IMAGES}, **limits), GradientNorm()
    run.add_callback(norm)
    run.train()
    assert norm.seen == pytest.approx([1e-3] * 7, rel=0.01)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"warmup_epochs": 2}, ("training.warmup_epochs", 2, "training.warmup_steps")),
        ({"head_warmup_epochs": 0.5}, ("training.head_warmup_epochs", 0.5)),
        (
            {"learning_rate_drops": [1.0], "lr_scheduler_type": "constant"},
            ("training.learning_rate_drops", [1.0]),
        ),
        ({"eval_strategy": "epoch"}, ("training.eval_strategy", "epoch", "training.monitor_steps")),
        ({"save_strategy": "epoch"}, ("training.save_strategy", "epoch", "training.save_steps")),
        ({"logging_strategy": "epoch"}, ("training.logging_strategy", "epoch", "training.logging_steps")),
        ({"max_steps": -1}, ("training.max_steps", -1)),
    ],
)
def test_a_stream_of_unknown_length_has_no_epochs(given: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*words, "data.num_images")):
        trainer(tmp_path, {}, **given)
    trainer(tmp_path, {"num_images": IMAGES}, **given)


@pytest.mark.parametrize(
    ("name", "given", "keys"),
    [
        ("dino", {}, ["freeze_last_layer_epochs"]),
        ("dino", {"freeze_last_layer_epochs": 0, "teacher_temperature_warmup_epochs": 2},
         ["teacher_temperature_warmup_epochs"]),
        ("swav", {"queue_size": 0}, []),
        ("swav", {"queue_size": 32}, ["queue_start_epoch"]),
    ],
)  # fmt: skip
def test_settings_of_methods_that_count_epochs(name: str, given: Any, keys: list[str]) -> None:
    model, config = METHODS[name].model_class(), METHODS[name].config_class()(**given)
    assert list(model.settings_in_epochs(config)) == keys


def test_a_recipe_of_a_stream_with_a_setting_in_epochs_names_it(tmp_path: Path) -> None:
    recipe = load_recipe("smoke/dino", ["method.freeze_last_layer_epochs=3"])
    run = trainer(tmp_path, {})
    method = recipe.model_class(recipe.config())
    with pytest.raises(UserError, match=mentions("method.freeze_last_layer_epochs", 3, "data.num_images")):
        check_epochs(run.args, method, run.source, run.data)


def test_all_settings_in_epochs_are_known() -> None:
    """A new setting in epochs must be in `IN_EPOCHS`, or must end in `_epochs` if it belongs to a method."""
    strategies = {item.name for item in fields(TrainingArguments) if item.name.endswith("_strategy")}
    named = {item.name for item in fields(SSLTrainingArguments) if "epoch" in item.name}
    known = {*IN_EPOCHS, "num_train_epochs", "hub_strategy", "train_sampling_strategy"}
    assert named | strategies | {"learning_rate_drops"} == known
    for method in METHODS.values():
        for item in fields(method.config_class()):
            assert "epoch" not in item.name or item.name.endswith(("_epoch", "_epochs")), item.name


def test_the_number_of_images_belongs_to_a_stream(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.num_images", 24, "data.max_images")):
        trainer_of_pictures(tmp_path, {"num_images": IMAGES})


def trainer_of_pictures(folder: Path, data: dict[str, Any]) -> SSLTrainer:
    run = trainer(folder, data)
    pictures = [PIL.Image.new("RGB", (8, 8), (row, 0, 0)) for row in range(IMAGES)]
    return SSLTrainer(model=run.method, args=run.args, train_dataset=pictures, data=data)


def test_a_backbone_that_never_changes_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, {"num_images": IMAGES}, head_warmup_epochs=1, max_steps=3).train()
    assert "training.head_warmup_epochs" in caplog.text
