# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: updates, schedules, records and the memory of a method are those of one batch."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from messages import mentions
from tiers import in_tiers

from hf_ssl.building import build_trainer
from hf_ssl.methods import METHODS
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer.trainer import SSLTrainer
from hf_ssl.views import ViewPreset

SIZE = 8
MEMORY = [name for name in METHODS if load_recipe(f"smoke/{name}").model_class.memory_inputs]


def trained(method: str, folder: Path, accumulated: int) -> SSLTrainer:
    recipe = load_recipe(
        f"smoke/{method}",
        [
            "training.batch_size=16", "training.max_steps=3", "training.logging_steps=1",
            "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
            f"training.output_dir={folder}",
            f"training.gradient_accumulation_steps={accumulated}", "training.warmup_epochs=0.1",
        ],
    )  # fmt: skip
    trainer = build_trainer(recipe, recipe.training_arguments())
    updates: list[int] = []
    update = trainer.method.update_memory
    trainer.method.update_memory = lambda new: (updates.append(trainer.state.global_step), update(new))
    trainer.train()
    # Every step updates the memory once. Before the first step, DeepCluster v2 embeds all images.
    first = updates.index(1) - 1 if updates else 0
    assert updates[first:] == ([0, 1, 2] if trainer.method.memory_inputs else [])
    return trainer


@pytest.mark.parametrize("method", in_tiers([(name,) for name in METHODS], [("dino",), ("moco",)]))
def test_updates_schedules_and_records_are_equal(method: str, tmp_path: Path, no_curves: None) -> None:
    one, four = (trained(method, tmp_path / str(parts), parts) for parts in (1, 4))
    assert one.state.global_step == four.state.global_step == 3
    assert one.steps_per_epoch == four.steps_per_epoch
    assert [sorted(record) for record in one.state.log_history] == [
        sorted(record) for record in four.state.log_history
    ]
    for key in ("learning_rate", "epoch", "step"):
        records = [[record.get(key) for record in run.state.log_history] for run in (one, four)]
        assert records[0] == records[1], key
    totals = [getattr(run.method, "queue", None) for run in (one, four)]
    if method == "moco":
        assert totals[0].total == totals[1].total > 0


@pytest.mark.parametrize("method", MEMORY)
def test_the_memory_of_four_micro_batches_is_that_of_one_batch(method: str) -> None:
    recipe = load_recipe(f"smoke/{method}")
    config = recipe.config()
    if recipe.model_class.needs_sample_index:
        config.num_samples = 64
    torch.manual_seed(0)
    whole = recipe.model_class(config).double()
    parts = recipe.model_class(config).double()
    size = ViewPreset.from_dict(config.views).final_size
    inputs: dict[str, Any] = {"pixel_values": torch.randn(4 * SIZE, 2, 3, size, size, dtype=torch.float64)}
    inputs["pixel_values"] = inputs["pixel_values"][:, :, : config.backbone_config.num_channels]
    if config.views.get("local_views"):
        local = config.views["local_size"]
        inputs["local_pixel_values"] = torch.randn(
            4 * SIZE, config.views["local_views"], inputs["pixel_values"].shape[2], local, local
        ).double()
    inputs["sample_index"] = torch.arange(4 * SIZE)
    if "sample_index" not in whole.memory_inputs:
        del inputs["sample_index"]
    inputs |= whole.sample_masks(np.arange(4 * SIZE, dtype=np.uint64))
    with torch.no_grad():
        embeddings = whole.embed(inputs)
        parts.load_state_dict(whole.state_dict())
        before = {name: value.clone() for name, value in parts.state_dict().items()}
        whole.loss_from_embeddings(embeddings)
        for number in range(4):
            parts.ends_batch = number == 3
            part = {name: tensor[number * SIZE : (number + 1) * SIZE] for name, tensor in embeddings.items()}
            parts.loss_from_embeddings(part)
    for model in (whole, parts):
        model.write_memory()
    changed = 0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
        changed += not torch.equal(value, before[name])
    assert changed > 0


def test_separately_compared_images_are_reported(tmp_path: Path, no_curves, caplog) -> None:
    expected = mentions("training.gradient_accumulation_steps=4", "training.contrastive_chunk_size=4")
    trained("simclr", tmp_path / "simclr", 4)
    assert re.search(expected, caplog.text)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained("byol", tmp_path / "byol", 4)
        trained("deepcluster_v2", tmp_path / "deepcluster_v2", 4)  # compares images with prototypes
    assert "contrastive_chunk_size" not in caplog.text


def test_an_error_within_a_step_leaves_no_unfinished_batch(tmp_path: Path, no_curves: None) -> None:
    recipe = load_recipe(
        "smoke/moco",
        [
            "training.batch_size=16", "training.max_steps=2", "training.gradient_accumulation_steps=4",
            "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_steps=0",
            f"training.output_dir={tmp_path}",
        ],
    )  # fmt: skip
    trainer = build_trainer(recipe, recipe.training_arguments())
    model: Any = trainer.method
    embed, calls, updated = model.embed, [], []

    def failing(inputs: dict[str, Any]) -> Any:
        calls.append(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(inputs)

    model.embed = failing
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.ends_batch and not model._memory_parts and model.queue.total == 0
    model.train()(**calls[0])  # in a loop of the user, each pass is a whole batch
    total = model.queue.total
    assert total > 0
    model.ends_batch = False  # a loop of the user that ended within a batch
    model(**calls[0])
    update = model.update_memory
    model.update_memory = lambda new: (
        updated.append({name: len(value) for name, value in new.items()}), update(new),
    )  # fmt: skip
    trainer.train()
    assert updated == [dict.fromkeys(model.memory_inputs, 16)] * 2
