# SPDX-License-Identifier: Apache-2.0
"""What a step costs, and how much memory there is."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from hf_ssl.building import build_model, build_trainer
from hf_ssl.data import decoded, open_source
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer import machine_settings, step_cost
from hf_ssl.trainer.monitor import load_monitor_images
from hf_ssl.trainer.step_cost import StepCost, measure_step

COST = StepCost(
    step_seconds=0.5, feature_seconds=0.1, load_seconds=0.05, step_bytes=100.0, fixed_bytes=1000.0
)


def digits(folder, *overrides):
    settings = [f"training.output_dir={folder}", "training.monitor_steps=0", "training.max_steps=2"]
    return load_recipe("smoke/simclr", [*settings, "training.use_cpu=true", *overrides])


def measured_passes(tmp_path, monkeypatch, passes, **options):
    """How many images each pass of a measurement had, where pass N takes the seconds and bytes passes[N]."""
    recipe = digits(tmp_path)
    args, source = recipe.training_arguments(), open_source(recipe.data)
    counts, answers = [], iter(passes)

    def measured(model, inputs, args):
        counts.append(len(inputs["pixel_values"]))
        return next(answers)

    monkeypatch.setattr(step_cost, "_pass", measured)
    cost = measure_step(
        build_model(recipe, 0, source),
        load_monitor_images(source, recipe.views, recipe.data, args, 32),
        0.0,
        args,
        **options,
    )
    return counts, cost


def test_the_main_process_decides_how_often_a_step_is_measured(tmp_path, monkeypatch):
    """It needed 2.5 s for the first pass and makes no second one, so this process makes none either."""
    monkeypatch.setattr(step_cost, "from_first_process", lambda value: (2.5, 1e6))
    counts, cost = measured_passes(tmp_path, monkeypatch, [(0.1, 1e3)])
    assert counts == [2] and cost.step_seconds == 1.25


def test_a_step_is_measured_with_no_more_images_than_fit(tmp_path, monkeypatch):
    passes = 3 * [(0.01, 4e9)] + 3 * [(0.01, 10e9)]  # 2 images, then 8; 32 need 50e9
    counts, cost = measured_passes(tmp_path, monkeypatch, passes, free_bytes=24e9)
    assert counts == [2, 2, 2, 8, 8, 8] and cost.step_bytes == 1e9


@pytest.mark.parametrize(
    ("splits", "images", "counts"), [(8, 30, [8, 24]), (3, 32, [3, 12, 30]), (4, 4, [4])]
)
def test_a_step_is_measured_with_a_batch_that_batch_norm_can_split(
    splits, images, counts, tmp_path, monkeypatch
):
    recipe = load_recipe("smoke/moco", ["training.use_cpu=true", f"training.output_dir={tmp_path}",
                                        f"method.batch_norm_splits={splits}"])  # fmt: skip
    args, source, found = recipe.training_arguments(), open_source(recipe.data), []
    measured = step_cost._pass

    def measure(model, inputs, args):
        found.append(len(inputs["pixel_values"]))
        return 0.01, measured(model, inputs, args)[1]

    monkeypatch.setattr(step_cost, "_pass", measure)
    batch = load_monitor_images(source, recipe.views, recipe.data, args, images)
    assert measure_step(build_model(recipe, 0, source), batch, 0.0, args).step_bytes > 0
    assert found == [count for count in counts for _ in range(3)]


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_activation_checkpoints_need_less_memory(tmp_path, method):
    """The memory is what the forward pass saves, and what the largest segment saves when it runs again."""
    costs, kept = [], []
    for enabled in ("false", "true"):
        recipe = load_recipe(
            f"smoke/{method}",
            [
                f"training.output_dir={tmp_path}", "training.use_cpu=true", "training.precision=float32",
                f"training.gradient_checkpointing={enabled}",
                *(["backbone.depths=[4, 4]"] if method == "simclr" else []),
            ],
        )  # fmt: skip
        args, source = recipe.training_arguments(), open_source(recipe.data)
        model = build_model(recipe, 0, source)
        batch = load_monitor_images(source, recipe.views, recipe.data, args, 8)
        costs.append(measure_step(model, batch, 0.0, args).step_bytes)
        assert not any("forward" in vars(module) for module in model.modules())  # a copy was measured
        model.train()
        if enabled == "true":
            again = step_cost._use_checkpoints(model, batch.inputs(args.device, model.sample_masks), args)
            assert again > 0
        kept.append(step_cost._pass(model, batch.inputs(args.device, model.sample_masks), args)[1])
    assert kept[1] < kept[0]
    assert kept[1] / 8 < costs[1] < 0.9 * costs[0]


def test_decoding_all_images_is_not_the_time_of_one(tmp_path, monkeypatch):
    seen, fill = [], decoded._fill

    def slow(*arguments):
        start = time.process_time()
        while time.process_time() - start < 2:
            pass
        return fill(*arguments)

    monkeypatch.setattr(decoded, "_fill", slow)
    monkeypatch.setattr(
        "hf_ssl.building.measure_step", lambda model, batch, load, *others: seen.append(load) or COST
    )
    recipe = digits(tmp_path, "data.cache=memory")
    build_trainer(recipe, recipe.training_arguments())
    assert seen[0] < 2 / 32


@pytest.mark.parametrize(
    ("limit", "current", "files", "left"),
    [("max", 900, 0, math.inf), ("1000", 900, 0, 100), ("1000", 1000, 700, 700)],
)
def test_files_that_were_read_leave_the_memory_of_a_container_free(
    tmp_path, monkeypatch, limit, current, files, left
):
    for name, text in {
        "memory.max": f"{limit}\n",
        "memory.current": f"{current}\n",
        "memory.stat": f"anon 5\ninactive_file {files - files // 2}\nactive_file {files // 2}\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine_settings, "CONTROL_GROUP", tmp_path)
    available = SimpleNamespace(available=10**6)
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    assert machine_settings.free_memory(torch.device("cpu")) == min(10**6, left)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine_settings.free_memory(torch.device("cpu")) == min(10**6, left) / 2


def test_memory_that_torch_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 600)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 50)
    assert machine_settings.free_memory(torch.device("cuda")) == 650
