# SPDX-License-Identifier: Apache-2.0
"""The choices of a run for its machine: precision, workers, batch size, images of the monitor."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_ssl import resources
from hf_ssl.building import build_model, build_trainer
from hf_ssl.data import open_source
from hf_ssl.data.loader import worker_options
from hf_ssl.errors import UserError
from hf_ssl.evaluation.augmented import EpochLoader, EpochSampler
from hf_ssl.methods import METHODS
from hf_ssl.precision import Precision
from hf_ssl.recipe import load_recipe
from hf_ssl.run import train
from hf_ssl.trainer import machine_settings
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.monitor import load_monitor_images
from hf_ssl.trainer.step_cost import StepCost, measure_step

COST = StepCost(
    step_seconds=0.5, feature_seconds=0.1, load_seconds=0.05, step_bytes=100.0, fixed_bytes=1000.0
)
PLENTY = 1e12


def arguments(**changed) -> SSLTrainingArguments:
    return SSLTrainingArguments(output_dir="unused", use_cpu=True, **changed)


def fastest(name):
    return lambda device: Precision(name, "a reason")


# Precision.


@pytest.mark.parametrize(
    ("given", "measured", "chosen"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({}, "float32", "float32"),
        ({"precision": "auto"}, "float16", "float16"),
        ({"precision": "float32"}, "bfloat16", "float32"),
        ({"bf16": True}, "float32", "bfloat16"),
        ({"bf16": True, "precision": "float32"}, "float32", "bfloat16"),
        ({"bf16": False}, "bfloat16", "float32"),
        ({"fp16": False}, "bfloat16", "bfloat16"),
        ({"clip_each_tensor": 3.0}, "float16", "float32"),
    ],
)
def test_precision_follows_the_machine_unless_the_user_set_it(monkeypatch, given, measured, chosen):
    monkeypatch.setattr(machine_settings, "fastest_precision", fastest(measured))
    args = arguments(**given)
    choices = machine_settings.choose_precision(args)
    assert args.precision == chosen
    assert (bool(args.bf16), bool(args.fp16)) == (chosen == "bfloat16", chosen == "float16")
    assert args.mixed_precision == {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[chosen]
    set_by_user = given.get("bf16") is True or given.get("precision", "auto") != "auto"
    assert ("training.precision" in choices) is not set_by_user


def test_both_half_precisions_are_a_mistake():
    with pytest.raises(UserError, match=r"training\.bf16.*training\.fp16"):
        arguments(bf16=True, fp16=True)


def test_the_chosen_precision_reaches_the_forward_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_settings, "fastest_precision", fastest("bfloat16"))
    overrides = ["training.precision=auto", "training.monitor_steps=0", f"training.output_dir={tmp_path}"]
    recipe = load_recipe("smoke/simclr", [*overrides, "training.batch_size=32", "training.max_steps=1"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    seen = []
    trainer.method.projector[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert trainer.choices["training.precision"] == {"value": "bfloat16", "reason": "a reason"}


# Workers.


@pytest.mark.parametrize(
    ("cores", "device", "small", "workers"),
    [
        (2, "cpu", True, 0), (2, "cpu", False, 1), (16, "cpu", False, 2), (1, "cpu", False, 0),
        (16, "cuda", False, 12), (8, "cuda", False, 7), (16, "cuda", True, 2), (1, "cuda", True, 0),
    ],
)  # fmt: skip
def test_workers_follow_cores_device_and_image_size(monkeypatch, cores, device, small, workers):
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    monkeypatch.setattr(SSLTrainingArguments, "device", torch.device(device))
    args = SSLTrainingArguments(output_dir="unused")
    machine_settings.choose_workers(args, small=small)
    assert args.dataloader_num_workers == workers


def test_processes_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(resources, "usable_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    args = arguments()
    machine_settings.choose_workers(args, small=False)
    assert args.dataloader_num_workers == 1
    sampler = EpochSampler(np.arange(8), 4, 0)
    loader = EpochLoader.of(list(range(8)), sampler, torch.device("cpu"), is_fast=False)
    assert loader.num_workers == 1, "label trainings share the cores, too"
    assert loader.worker_init_fn is worker_options(1, False)["worker_init_fn"]


def test_a_number_of_workers_set_by_the_user_stays():
    args = arguments(dataloader_num_workers=5)
    assert machine_settings.choose_workers(args, small=True) == {}
    assert args.dataloader_num_workers == 5


@pytest.mark.parametrize("workers", ["many", -1, 1.5])
def test_workers_that_are_no_number_are_a_mistake(workers):
    with pytest.raises(UserError, match=rf"training\.dataloader_num_workers.*{workers}"):
        arguments(dataloader_num_workers=workers)


# Batch size.


@pytest.mark.parametrize(
    ("images", "free", "step_seconds", "accumulated", "chosen"),
    [
        (400, PLENTY, 0.0, 1, 256),  # 400 images
        (1023, PLENTY, 0.0, 1, 512),
        (5000, PLENTY, 0.0, 1, 1024),  # everything fits
        (5000, 1000 + 1.25 * 100 * 300, 0.0, 1, 256),  # memory for 300 images at a time
        (5000, 1000 + 1.25 * 100 * 300, 0.0, 2, 512),  # and two accumulation steps
        (5000, PLENTY, 0.5, 1, 32),  # 30 s for 40 images
        (5000, PLENTY, 0.2, 1, 64),  # 30 s for 100 images, loading and optimizer included
        (5000, PLENTY, 60.0, 1, 2),  # a method may need two images
        (3, PLENTY, 0.0, 2, 4),
        (None, PLENTY, 0.54, 1, 32),  # a stream of unknown length
        (5000, 1100.0, 0.1, 1, 2),  # the least of three limits
    ],
)
def test_the_batch_is_the_largest_power_of_two_that_fits(images, free, step_seconds, accumulated, chosen):
    args = arguments(batch_size=1024, gradient_accumulation_steps=accumulated)
    cost = replace(COST, step_seconds=step_seconds)
    choices = machine_settings.choose_batch_size(args, cost, images, free_bytes=free)
    assert args.batch_size == chosen
    assert args.per_device_train_batch_size * accumulated == chosen
    assert ("training.batch_size" in choices) is (chosen < 1024)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 1 / 4), ("square_root", 1 / 2), ("none", 1)])
def test_the_learning_rate_follows_the_rule(rule, factor):
    args = arguments(batch_size=1024, base_learning_rate=0.1, learning_rate_rule=rule)
    before = args.learning_rate
    machine_settings.choose_batch_size(args, replace(COST, step_seconds=0.0), 400, free_bytes=PLENTY)
    assert args.batch_size == 256
    assert args.learning_rate == pytest.approx(before * factor)


def test_chunks_bound_the_memory_of_a_batch():
    args = arguments(batch_size=1024, contrastive_chunk_size=32)
    assert (
        machine_settings.choose_batch_size(args, replace(COST, step_seconds=0), 5000, free_bytes=2000) == {}
    )


def digits(folder, *overrides):
    settings = [f"training.output_dir={folder}", "training.monitor_steps=0", "training.max_steps=2"]
    return load_recipe("smoke/simclr", [*settings, "training.use_cpu=true", *overrides])


def test_a_recipe_with_a_large_batch_is_reduced_with_one_warning(tmp_path, caplog):
    recipe = digits(tmp_path, "data.max_images=100")
    recipe.training["batch_size"] = 1024  # a value of the recipe's file
    with caplog.at_level(logging.WARNING):
        trainer = train(recipe)
    assert trainer.args.batch_size == 64
    (warning,) = [record.message for record in caplog.records if "batch_size" in record.message]
    assert "1024" in warning and "64" in warning and "100 images" in warning
    stored = json.loads((tmp_path / "_run.json").read_text())["choices"]
    assert stored["training.batch_size"]["value"] == 64


def test_the_error_for_a_typed_batch_that_is_too_large_suggests_a_smaller_one(tmp_path):
    recipe = digits(tmp_path, "data.max_images=100", "training.batch_size=1024")
    with pytest.raises(UserError, match=r"training\.batch_size: .*100 .*1024; use training\.batch_size=64$"):
        train(recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "suggested"), [(1024, 4, (64, 4)), (1024, 8, (64, 8)), (8192, 64, (64, 1))]
)
def test_the_suggested_batch_size_fits_with_gradient_accumulation(
    tmp_path, batch_size, accumulated, suggested
):
    overrides = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulated}"]
    with pytest.raises(UserError, match=r"training\.batch_size: .*100 ") as error:
        train(digits(tmp_path, "data.max_images=100", *overrides))
    advice = str(error.value).split("; use ")[1].split()
    run = train(digits(tmp_path, "data.max_images=100", *overrides, *advice))
    assert (run.args.batch_size, run.args.gradient_accumulation_steps) == suggested
    assert run.state.global_step == 2


def test_one_image_is_too_few_to_pretrain(tmp_path):
    with pytest.raises(UserError, match=r"data\.path: expected at least 2 images .*got 1"):
        train(digits(tmp_path, "data.max_images=1"))


def test_a_resumed_run_reuses_its_choices(tmp_path, monkeypatch):
    overrides = ["training.precision=auto", "training.dataloader_num_workers=auto", "data.max_images=100"]
    monkeypatch.setattr(machine_settings, "fastest_precision", fastest("bfloat16"))
    recipe = digits(tmp_path, *overrides)
    recipe.training["batch_size"] = 1024
    first = train(recipe)
    monkeypatch.setattr(machine_settings, "fastest_precision", fastest("float32"))
    monkeypatch.setattr("hf_ssl.building.measure_step", lambda *arguments: pytest.fail("measured again"))
    resumed = train(recipe)
    assert resumed.choices == first.choices
    assert resumed.args.precision == "bfloat16" and resumed.args.batch_size == 64


def test_a_run_that_chose_nothing_resumes_without_a_choice(tmp_path, monkeypatch):
    recipe = digits(tmp_path, "training.dataloader_num_workers=0")
    assert train(recipe).choices == {}
    monkeypatch.setattr("hf_ssl.building.measure_step", lambda *arguments: pytest.fail("measured again"))
    assert train(recipe).args.batch_size == 32


def test_a_resumed_run_takes_the_monitor_that_the_user_typed(tmp_path):
    stored = {
        f"training.monitor_{name}_images": {"value": 100, "reason": "slow"} for name in ("bank", "query")
    }
    overrides = ["training.monitor_steps=4", "training.monitor_bank_images=300"]
    recipe = digits(tmp_path, *overrides)
    trainer = build_trainer(recipe, recipe.training_arguments(), stored=stored)
    assert (len(trainer.monitor.knn.bank), len(trainer.monitor.knn.queries)) == (300, 100)
    assert "training.monitor_bank_images" not in trainer.choices


def test_memory_that_is_used_up_names_the_line_to_type(tmp_path, monkeypatch):
    trainer = build_trainer(recipe := digits(tmp_path), recipe.training_arguments())

    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trainer, "training_step", full)
    with pytest.raises(UserError, match=r"training\.batch_size: .* 32 images; use training\.batch_size=16"):
        trainer.train()


# The monitor.


def test_the_first_measurement_takes_a_twentieth_of_the_run():
    # 512 x (0.5 / 3 + 0.1 + 0.05) + 3000 x 0.15 = 612 s would be measured
    args = arguments(batch_size=32, max_steps=10)  # 160 s are planned, 5 % are 8 s
    choices = machine_settings.choose_monitor(args, COST, 5000, labeled=True, overridden=set())
    assert choices["training.monitor_bank_images"]["value"] == args.monitor_bank_images == 100  # the fewest
    assert choices["training.monitor_query_images"]["value"] == args.monitor_query_images == 50
    assert choices["monitor.probe_images"]["value"] == 32
    assert "8.0 seconds" in choices["monitor.probe_images"]["reason"]


def test_images_are_reduced_in_proportion():
    cost = StepCost(0.03, 0.01, 0.0, 0.0, 0.0)  # 512 x 0.02 + 3000 x 0.01 = 40 s; 10 s are allowed
    args = arguments(batch_size=32, max_steps=10**6)
    choices = machine_settings.choose_monitor(args, cost, 5000, labeled=True, overridden=set())
    assert (args.monitor_bank_images, args.monitor_query_images) == (497, 248)
    assert choices["monitor.probe_images"]["value"] == 127
    args = arguments(batch_size=32, max_steps=10**6)
    choices = machine_settings.choose_monitor(
        args, cost, 5000, labeled=True, overridden={"monitor_bank_images"}
    )
    assert (args.monitor_bank_images, args.monitor_query_images) == (2000, 248)
    assert set(choices) == {"monitor.probe_images", "training.monitor_query_images"}


def test_without_labels_only_the_training_images_are_reduced():
    args = arguments(batch_size=32, max_steps=20)
    choices = machine_settings.choose_monitor(args, COST, 5000, labeled=False, overridden=set())
    assert set(choices) == {"monitor.probe_images"}
    assert (args.monitor_bank_images, args.monitor_query_images) == (2000, 1000)


def test_a_quick_measurement_is_not_reduced():
    cost = StepCost(1e-3, 1e-4, 0.0, 0.0, 0.0)  # 0.5 s, more than 5 % of 8 steps
    args = arguments(batch_size=32, max_steps=8)
    assert machine_settings.choose_monitor(args, cost, 5000, labeled=True, overridden=set()) == {}


# The measurement of a step.


@pytest.mark.parametrize("method", METHODS)
def test_measuring_a_step_does_not_change_the_model_and_the_random_state(tmp_path, method):
    recipe = load_recipe(f"smoke/{method}", [f"training.output_dir={tmp_path}", "training.use_cpu=true"])
    args, source = recipe.training_arguments(), open_source(recipe.data)
    model = build_model(recipe, 0, source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = measure_step(model, load_monitor_images(source, recipe.views, recipe.data, args, 8), 0.001, args)
    # A process with a limit of its CPU time has a coarse clock, which may show 0 for such small steps.
    assert cost.step_seconds >= 0 and cost.feature_seconds >= 0 and cost.step_bytes > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert cost.fixed_bytes >= sum(p.numel() * p.element_size() for p in model.parameters())


def test_bytes_of_a_step_grow_with_the_pixels(tmp_path):
    """An image with twice the side needs about four times the bytes of activations."""
    found = []
    for size in (16, 32):
        overrides = [f"views.enlarge={size}", f"training.output_dir={tmp_path}", "training.use_cpu=true"]
        recipe = load_recipe("smoke/simclr", overrides)
        args, source = recipe.training_arguments(), open_source(recipe.data)
        images = load_monitor_images(source, recipe.views, recipe.data, args, 8)
        found.append(measure_step(build_model(recipe, 0, source), images, 0.0, args).step_bytes)
    assert 3.2 < found[1] / found[0] < 4.5
