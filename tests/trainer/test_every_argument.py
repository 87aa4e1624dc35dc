# SPDX-License-Identifier: Apache-2.0
"""Each argument of transformers' Trainer works, is rejected, or causes a message."""

import abc
import copy
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from forks import Forks
from messages import mentions
from safetensors.torch import load_file
from tiers import in_tiers
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    ResNetConfig,
    ResNetModel,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments
from hf_ssl.effects import WITHOUT_EFFECT
from hf_ssl.errors import UserError
from hf_ssl.modeling.activation_checkpoints import find_segments
from hf_ssl.modeling.lars import LARSConfig
from hf_ssl.recipe import load_recipe
from hf_ssl.trainer import transformers_arguments
from hf_ssl.trainer.callbacks import CurvesCallback
from hf_ssl.trainer.optimizers import check_optimization
from hf_ssl.trainer.transformers_arguments import REJECTED

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
ROWS = 32


@pytest.fixture(scope="module")
def table() -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 255, (ROWS, 16, 16, 3), dtype=np.uint8)
    pixels[::2] //= 2
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    rows = {"image": [PIL.Image.fromarray(one) for one in pixels], "label": [row % 2 for row in range(ROWS)]}
    return Dataset.from_dict(rows, features=features)


class Run:
    """A short run with the given arguments.

    Attributes:
        trainer: the trainer after training.
        weights: all weights, one after the other.
        steps: for each step, the learning rate of the first group before it.
    """

    def __init__(
        self,
        table: Dataset,
        folder: Path,
        labeled: bool = True,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        objects: Callable[[Any], dict[str, Any]] = lambda model: {},
        width: int = 16,
        **changes: Any,
    ) -> None:
        values: dict[str, Any] = {
            "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True,
            "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "precision": "float32",
            "eval_steps": 1, "report_to": "none",
        }  # fmt: skip
        torch.manual_seed(0)
        config = SimCLRConfig(backbone_config=ResNetConfig(**TINY), views={"size": 16}, projection_size=width)
        args = SSLTrainingArguments(**values | changes)
        model = SimCLRForPreTraining(config)
        self.trainer = SSLTrainer(
            model, args, train_dataset=table, eval_dataset=table if labeled else None,
            compute_loss_func=compute_loss_func, compute_metrics=compute_metrics, **objects(model),
        )  # fmt: skip
        self.cleared: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            step = lambda: self.cleared.append(self.trainer.state.global_step)  # noqa: E731
            patch.setattr("hf_ssl.trainer.trainer.clear_device_cache", step)
            patch.setattr(CurvesCallback, "draw", lambda self, args, state: None)
            try:
                self.trainer.train()
            finally:
                self.deterministic = torch.are_deterministic_algorithms_enabled()
                torch.use_deterministic_algorithms(False)
        self.weights = torch.cat([v.flatten().float() for v in self.trainer.method.state_dict().values()])
        self.history = self.trainer.state.log_history

    @property
    def optimizer(self) -> dict[str, Any]:
        return self.trainer.optimizer.param_groups[0]

    def steps(self, key: str) -> list[int]:
        return [record["step"] for record in self.history if key in record]

    def checkpoints(self) -> list[int]:
        found = Path(self.trainer.args.output_dir).glob("checkpoint-*")
        return sorted(int(path.name.rpartition("-")[2]) for path in found)


@pytest.fixture(scope="module")
def usual(table: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(table, tmp_path_factory.mktemp("usual"))


def other_weights(run: Run, usual: Run) -> bool:
    return not torch.equal(run.weights, usual.weights)


def same_weights(run: Run, usual: Run) -> bool:
    return torch.equal(run.weights, usual.weights)


Check = Callable[[Run, Run], Any]
SAVE = {"save_strategy": "steps", "save_steps": 1}
BEST = {**SAVE, "load_best_model_at_end": True, "metric_for_best_model": "knn"}


def loader(run: Run) -> Any:
    return run.trainer.get_train_dataloader()


def callbacks(run: Run) -> list[Any]:
    return run.trainer.callback_handler.callbacks


def has_checkpoints(run: Run, usual: Run) -> bool:
    backbone = run.trainer.method.backbone
    segments = [backbone.get_submodule(name) for name in find_segments(backbone)]
    used = len(segments) > 1 and all("forward" in vars(segment) for segment in segments)
    return used and same_weights(run, usual)


def compiled(run: Run, usual: Run) -> bool:
    return run.trainer.accelerator.state.dynamo_plugin.backend.value == "EAGER"


def best(run: Run, key: str, choose: Callable) -> bool:
    measured = {record["step"]: record[key] for record in run.history if key in record and record["step"] > 0}
    return run.trainer.state.best_metric == choose(measured.values())


# Argument -> its value, further arguments, and a check of the run (compared with a usual run).
WORKING: dict[str, tuple[Any, dict[str, Any], Check]] = {
    "output_dir": ("given", SAVE, lambda run, usual: Path("given/checkpoint-3").exists()),
    "per_device_train_batch_size": (4, {}, lambda run, usual: run.trainer.args.batch_size == 4),
    "num_train_epochs": (2, {"max_steps": -1}, lambda run, usual: run.trainer.state.global_step == 8),
    "max_steps": (2, {}, lambda run, usual: run.trainer.state.global_step == 2),
    "learning_rate": (0.5, {}, lambda run, usual: run.optimizer["initial_lr"] == 0.5),
    "lr_scheduler_type": ("constant", {}, lambda run, usual: run.optimizer["lr"] == 1e-3),
    "lr_scheduler_kwargs": ({"num_cycles": 3}, {"lr_scheduler_type": "cosine"}, other_weights),
    "warmup_steps": (2, {}, lambda run, usual: run.history[1]["learning_rate"] == 0),
    "optim": ("rmsprop", {}, lambda run, usual: type(run.trainer.optimizer.optimizer) is torch.optim.RMSprop),
    "optim_args": ("momentum=0.5", {"optim": "rmsprop"}, lambda run, usual: run.optimizer["momentum"] == 0.5),
    "weight_decay": (0.5, {}, lambda run, usual: run.optimizer["weight_decay"] == 0.5),
    "adam_beta1": (0.5, {}, lambda run, usual: run.optimizer["betas"][0] == 0.5),
    "adam_beta2": (0.5, {}, lambda run, usual: run.optimizer["betas"][1] == 0.5),
    "adam_epsilon": (0.1, {}, lambda run, usual: run.optimizer["eps"] == 0.1),
    "gradient_accumulation_steps": (2, {}, lambda run, usual: run.trainer.args.batch_size == 16),
    "max_grad_norm": (1e-6, {}, other_weights),
    "bf16": (True, {"precision": "auto"}, lambda run, usual: run.trainer.args.precision == "bfloat16"),
    "fp16": (True, {"precision": "auto"}, lambda run, usual: run.trainer.args.precision == "float16"),
    "activation_checkpointing": (True, {}, has_checkpoints),
    "activation_checkpointing_kwargs": (
        {"preserve_rng_state": False}, {"activation_checkpointing": True}, has_checkpoints,
    ),
    "gradient_checkpointing": (True, {}, has_checkpoints),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": True}, {"gradient_checkpointing": True}, has_checkpoints,
    ),
    "torch_compile": (True, {"torch_compile_backend": "eager"}, compiled),
    "torch_compile_backend": ("eager", {}, compiled),
    "torch_compile_mode": ("default", {"torch_compile_backend": "eager"}, compiled),
    "torch_empty_cache_steps": (2, {}, lambda run, usual: run.cleared == [0, 2]),
    "logging_strategy": ("epoch", {"max_steps": 8}, lambda run, usual: run.steps("loss") == [1, 4, 8]),
    "logging_steps": (2, {}, lambda run, usual: run.steps("loss") == [1, 2, 3]),
    "logging_first_step": (False, {"logging_steps": 2}, lambda run, usual: run.steps("loss") == [2, 3]),
    "log_level": ("error", {}, lambda run, usual: run.trainer.args.get_process_log_level() == logging.ERROR),
    "disable_tqdm": (False, {}, lambda run, usual: run.trainer.bar in callbacks(run)),
    "report_to": ("tensorboard", {}, lambda run, usual: TensorBoardCallback in map(type, callbacks(run))),
    "skip_memory_metrics": (False, {}, lambda run, usual: "train_mem_cpu_alloc_delta" in run.history[-1]),
    "debug": ("underflow_overflow", {}, lambda run, usual: run.trainer.method._forward_hooks),
    "eval_strategy": (
        "epoch", {"eval_steps": None, "max_steps": 8}, lambda run, usual: run.steps("eval_knn") == [0, 4, 8],
    ),
    "eval_steps": (2, {}, lambda run, usual: run.steps("eval_knn") == [0, 2, 3]),
    "eval_delay": (2, {}, lambda run, usual: run.steps("eval_knn") == [0, 2, 3]),
    "eval_on_start": (False, {}, lambda run, usual: run.steps("eval_knn") == [1, 2, 3]),
    "per_device_eval_batch_size": (5, {}, lambda run, usual: run.trainer.classifiers[""].batch_size == 5),
    "save_strategy": ("epoch", {"max_steps": 8}, lambda run, usual: run.checkpoints() == [4, 8]),
    "save_steps": (2, {"save_strategy": "steps"}, lambda run, usual: run.checkpoints() == [2, 3]),
    "save_total_limit": (1, SAVE, lambda run, usual: run.checkpoints() == [3]),
    "load_best_model_at_end": (True, BEST, lambda run, usual: run.trainer.state.best_model_checkpoint),
    "metric_for_best_model": ("eval_rank_me", BEST, lambda run, usual: best(run, "eval_rank_me", max)),
    "greater_is_better": (False, BEST, lambda run, usual: best(run, "eval_knn", min)),
    "seed": (3, {}, other_weights),
    "data_seed": (3, {}, other_weights),
    "full_determinism": (True, {}, lambda run, usual: run.deterministic),
    "use_cpu": (True, {}, lambda run, usual: run.trainer.args.device.type == "cpu"),
    "accelerator_config": (
        {"gradient_accumulation_kwargs": {"sync_each_batch": True}}, {},
        lambda run, usual: run.trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"],
    ),
    "dataloader_num_workers": (1, {}, lambda run, usual: loader(run).num_workers == 1),
    "dataloader_prefetch_factor": (7, {}, lambda run, usual: loader(run).prefetch_factor == 7),
    "dataloader_persistent_workers": (
        True, {"dataloader_num_workers": 1}, lambda run, usual: loader(run).persistent_workers,
    ),
    "dataloader_multiprocessing_context": (
        "fork", {}, lambda run, usual: "Fork" in type(loader(run).multiprocessing_context).__name__,
    ),
}  # fmt: skip
# Argument -> the place of its test, or why one process without a GPU cannot show its effect.
ELSEWHERE = {
    **dict.fromkeys(("tf32", "dataloader_pin_memory"), "needs a GPU"),
    **dict.fromkeys((field for field in FIELDS if field.startswith("ddp_")), "test_settings_of_ddp_arrive"),
    **dict.fromkeys(("local_rank", "log_level_replica"), "the launcher sets it; needs several processes"),
    **dict.fromkeys(("log_on_each_node", "save_on_each_node"), "needs several machines"),
    **dict.fromkeys((field for field in FIELDS if field.startswith(("hub_", "push_"))), "test_pushing.py"),
    **dict.fromkeys(("run_name", "project"), "test_trackers.py"),
    **dict.fromkeys((field for field in FIELDS if field.startswith("trackio_")), "uploads to the Hub"),
    "logging_nan_inf_filter": "test_a_loss_that_is_no_number_is_averaged",
    "restore_callback_states_from_checkpoint": "test_resuming_by_arguments",
    "resume_from_checkpoint": "test_resuming_by_arguments",
}
VALUES = {
    "batch_eval_metrics": True, "include_for_metrics": ["inputs"], "label_names": ["label"],
    "length_column_name": "size", "liger_kernel_config": {"rope": True}, "eval_accumulation_steps": 2,
    "deepspeed": {"zero_optimization": {"stage": 2}}, "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1}, "include_num_input_tokens_seen": "all",
    "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["attention"], "train_sampling_strategy": "sequential",
}  # fmt: skip


def value_of(name: str) -> Any:
    """Return a value of a rejected argument or one without effect, which is not the default."""
    default = next(field.default for field in dataclasses.fields(SSLTrainingArguments) if field.name == name)
    return VALUES[name] if name in VALUES else not default


def test_every_argument_is_in_one_table() -> None:
    tables = [set(WORKING), set(ELSEWHERE), set(REJECTED), set(WITHOUT_EFFECT)]
    assert {name for names in tables for name in names} >= FIELDS
    assert sum(len(names & FIELDS) for names in tables) == len(FIELDS)


def one_of(count: int, names: Iterable[str]) -> list[Any]:
    """Return all names, of which the default tests run the first one of each `count`."""
    names = list(names)
    return in_tiers(zip(names), list(zip(names[::count])))


@pytest.mark.parametrize("name", one_of(16, [name for name in WORKING if name in FIELDS]))
def test_it_works(name: str, table: Dataset, usual: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    value, further, check = WORKING[name]
    if name == "report_to":
        pytest.importorskip("tensorboard")
    run = Run(table, tmp_path / "run", **{**further, name: value})
    assert check(run, usual)


@pytest.mark.parametrize("name", sorted(REJECTED.keys() & FIELDS - {"parallelism_config"}))
def test_it_is_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(f"training.{name}", REJECTED[name])):
        SSLTrainingArguments(str(tmp_path), **{name: value_of(name)})
    with pytest.raises(UserError, match=mentions(f"training.{name}")):
        load_recipe("smoke/simclr", [f"training.{name}={json.dumps(value_of(name))}"])


@pytest.mark.parametrize("name", one_of(6, [name for name in WITHOUT_EFFECT if name in FIELDS]))
def test_it_has_no_effect_and_says_so(name: str, table, usual, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(transformers_arguments, "warn_once", transformers_arguments.warn_once.__wrapped__)
    run = Run(table, tmp_path, **{name: value_of(name)})
    assert same_weights(run, usual) and run.steps("eval_knn") == usual.steps("eval_knn")
    assert [WITHOUT_EFFECT[name] in record.getMessage() for record in caplog.records].count(True) == 1


@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"accelerator_config": {"split_batches": True}}, ["training.accelerator_config", "split_batches"]),
        ({"report_to": "wandv"}, ["training.report_to", "wandv", "tensorboard"]),
        ({"report_to": "clearml"}, ["training.report_to", "clearml", "pip install clearml"]),
        ({"optimizer": "adafacto"}, ["training.optimizer", "adafactor"]),
        ({"optimizer": "sgd", "optim": "rmsprop"}, ["training.optimizer", "training.optim", "rmsprop"]),
        ({"optim_args": "momentum=0.5"}, ["training.optim_args", "adamw"]),
        ({"learning_rate": "fast"}, ["training.learning_rate", "number", "fast"]),
        ({"per_device_eval_batch_size": 0}, ["training.per_device_eval_batch_size", 1, 0]),
        ({"gradient_accumulation_steps": 0}, ["training.gradient_accumulation_steps", 1, 0]),
        ({"max_steps": 0}, ["training.max_steps", -1, 0]),
        ({"log_level": "loud"}, ["training.log_level", "warning", "loud"]),
        ({"monitor_steps": 100, "eval_steps": 50}, ["training.monitor_steps", "training.eval_steps", 50]),
        ({"eval_steps": 0}, ["training.eval_steps", "monitor_steps=0"]),
        ({"bf16": "never"}, ["training.bf16", "true or false", "never"]),
        ({"channels_last": 2}, ["training.channels_last", "true or false", 2]),
        ({"max_steps": True}, ["training.max_steps", "whole number", True]),
        ({"logging_steps": float("inf")}, ["training.logging_steps", "inf"]),
        ({"warmup_epochs": float("inf")}, ["training.warmup_epochs", "inf"]),
        ({"learning_rate": np.array([1.0, 2.0])}, ["training.learning_rate", "number"]),
        ({"learning_rate_drops": ["one"]}, ["training.learning_rate_drops", "numbers"]),
        ({"metric_for_best_model": True}, ["training.metric_for_best_model", "text", True]),
        ({"report_to": 3}, ["training.report_to", 3]),
        ({"seed": -1}, ["training.seed", "2**32", -1]),
        ({"adam_beta1": 1.0}, ["training.adam_beta1", 1.0]),
        ({"momentum": 1.5}, ["training.momentum", 1.5]),
        ({"minimum_learning_rate_ratio": 2}, ["training.minimum_learning_rate_ratio", 2]),
        ({"monitor_bank_images": 1}, ["training.monitor_bank_images", 2, 1]),
        ({"num_train_epochs": 0}, ["training.num_train_epochs", 0]),
        ({"max_steps": -2}, ["training.max_steps", -1, -2]),
        ({"save_steps": 0}, ["training.save_steps", 0]),
        ({"output_dir": ""}, ["training.output_dir"]),
        ({"dataloader_multiprocessing_context": "thread"}, ["dataloader_multiprocessing_context", "thread"]),
        ({"gradient_checkpointing_kwargs": 3}, ["training.gradient_checkpointing_kwargs", 3]),
        ({"accelerator_config": 3}, ["training.accelerator_config", 3]),
        ({"lars": {"clip": "maybe"}}, ["training.lars.clip", "true or false"]),
        ({"lars": LARSConfig("clip")}, ["training.lars", "JSON", "clip"]),
        ({"save_strategy": "best"}, ["training.metric_for_best_model", "knn"]),
        ({"monitor_steps": -1}, ["training.monitor_steps", -1]),
        ({"gradient_accumulation_steps": 1.5}, ["training.gradient_accumulation_steps", "whole", 1.5]),
        ({"learning_rate": None}, ["training.learning_rate", "number", None]),
        ({"learning_rate": float("nan")}, ["training.learning_rate", "number", "nan"]),
        ({"weight_decay": -0.1}, ["training.weight_decay", 0, -0.1]),
        ({"learning_rate_drops": 5}, ["training.learning_rate_drops", "list", 5]),
        ({"dataloader_prefetch_factor": 0}, ["training.dataloader_prefetch_factor", 1, 0]),
        ({"dataloader_num_workers": 1.5}, ["training.dataloader_num_workers", "auto", 1.5]),
        ({"lars": {"variat": "larc"}}, ["training.lars.variat", "training.lars.variant"]),
        ({"lars": 3}, ["training.lars", "LARSConfig", 3]),
        ({"debug": True}, ["training.debug", True]),
        ({"lr_scheduler_type": "cosin"}, ["training.lr_scheduler_type", "cosine"]),
        ({"eval_strategy": "epochs"}, ["training.eval_strategy", "epoch"]),
        ({"accelerator_config": {"split_batch": True}}, ["training.accelerator_config", "split_batches"]),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            ["training.accelerator_config", "gradient_accumulation_steps", 2],
        ),
        ({"gradient_checkpointing_kwargs": {"reentrant": True}}, ["reentrant", "use_reentrant"]),
        ({"torch_compile_backend": "inducter"}, ["training.torch_compile_backend", "inductor"]),
        ({"torch_compile_mode": "max"}, ["training.torch_compile_mode", "max-autotune"]),
        (
            {"minimum_learning_rate_ratio": 0.1, "lr_scheduler_type": "cosine"},
            ["training.minimum_learning_rate_ratio", 0.1, "cosine"],
        ),
        ({"learning_rate_rule": "linear"}, ["training.learning_rate_rule", "base_learning_rate"]),
        (
            {"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 4},
            ["training.save_steps", 3, 4, "save_steps=6"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            ["training.save_strategy", "save_strategy=epoch"],
        ),
        ({"load_best_model_at_end": True, "monitor_steps": 0}, ["training.monitor_steps"]),
        ({"save_strategy": "best", "eval_strategy": "no"}, ["training.monitor_steps", "save_strategy=best"]),
    ],
)
def test_contradictions_are_rejected(changes: dict, mentioned: list, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(*mentioned)):
        SSLTrainingArguments(**{"output_dir": str(tmp_path), **changes})


def test_numbers_of_numpy_and_copies_of_arguments_work(tmp_path: Path, caplog) -> None:
    given = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    args = SSLTrainingArguments(
        str(tmp_path), batch_size=np.int64(8), learning_rate=np.float32(0.5), use_cpu=True, **given
    )
    assert (args.batch_size, type(args.batch_size), args.learning_rate) == (8, int, 0.5)
    args.accelerator_config.gradient_accumulation_kwargs["num_steps"] = 1  # transformers does this
    assert dataclasses.replace(args, seed=3).batch_size == 8 and not caplog.records
    assert given == {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    parser = HfArgumentParser(SSLTrainingArguments)
    command = ["--output_dir", str(tmp_path), "--lars", '{"clip": true}', "--optimizer", "lars"]
    assert parser.parse_args_into_dataclasses(command)[0].lars == LARSConfig(clip=True)


@pytest.mark.parametrize(
    "changes",
    [{"per_device_train_batch_size": 4}, {"optim": "sgd"}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
)
def test_arguments_that_others_follow_from_cannot_change_later(changes: dict, table, tmp_path) -> None:
    args = SSLTrainingArguments(str(tmp_path), use_cpu=True, batch_size=8)
    args.max_steps = 2
    args.set_evaluate("epoch")
    args = SSLTrainingArguments.from_arguments(args)
    assert (args.eval_strategy, args.eval_delay) == ("epoch", 0)
    ((name, value),) = changes.items()
    setattr(args, name, value)
    with pytest.raises(UserError, match=mentions(f"args.{name}", f"SSLTrainingArguments({name}=...)")):
        SSLTrainingArguments.from_arguments(args)


@pytest.mark.parametrize(
    ("given", "mentioned"),
    [
        ({"optimizers": None}, "optimizers"),
        ({"optimizers": (torch.optim.SGD, None)}, "optimizers"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, None)}, "optimizer_cls_and_kwargs"),
        ({"callbacks": ["x"]}, "callbacks"),
    ],
)
def test_objects_of_another_kind_are_rejected(given: dict, mentioned: str, table: Dataset) -> None:
    with pytest.raises(UserError, match=mentions(f"SSLTrainer.{mentioned}")):
        SSLTrainer(None, None, train_dataset=table, **given)


def test_an_own_optimizer_says_which_arguments_have_no_effect(tmp_path: Path, caplog) -> None:
    transformers_arguments.warn_once.cache_clear()
    args = SSLTrainingArguments(
        str(tmp_path), use_cpu=True, layer_decay=0.5, warmup_epochs=2, head_warmup_epochs=1
    )
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**{**TINY, "depths": [2, 2]})))
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    check_optimization(model, args, own)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "layer_decay" in message and "SGD" in message
    check_optimization(model, args, schedule=torch.optim.lr_scheduler.ConstantLR(own))
    assert "training.warmup_epochs has no effect with your own ConstantLR" in caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"adam_beta2": 0.5}, "training.adam_beta2"),
        ({"optimizer": "lars", "lars": {"variant": "larc"}}, "training.lars.variant"),
        ({"optimizer": "lars", "lars": {"trust_coefficient": 0.5}}, "training.lars.trust_coefficient"),
    ],
)
def test_settings_of_an_optimizer_that_a_resumed_run_keeps_are_named(changes, kept, table, tmp_path, caplog):
    optimizer = changes.get("optimizer", "adamw")
    Run(table, tmp_path, max_steps=2, optimizer=optimizer, **SAVE)
    Run(table, tmp_path, resume_from_checkpoint="true", **changes)
    assert f"{kept}: the run keeps the value of the checkpoint" in caplog.text


def test_a_loss_function_returns_a_scalar(table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("compute_loss_func", None)):
        Run(table, tmp_path, compute_loss_func=lambda *given, **named: None)


def test_a_best_model_that_was_never_measured_is_reported(table: Dataset, tmp_path: Path, caplog) -> None:
    Run(table, tmp_path, eval_delay=100, **BEST)
    assert "training.load_best_model_at_end" in caplog.text


@pytest.mark.slow
def test_a_plateau_schedule_knows_what_is_better(table: Dataset, tmp_path: Path) -> None:
    for metric, mode in (("knn", "max"), ("loss", "min")):
        changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": metric}
        assert Run(table, tmp_path, **changes).trainer.lr_scheduler.mode == mode


def test_the_logged_learning_rate_is_the_largest(table: Dataset, tmp_path: Path) -> None:
    run = Run(table, tmp_path, layer_decay=0.5, lr_scheduler_type="constant")
    assert run.history[1]["learning_rate"] == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"max_steps": 1}, ["training.max_steps", 2, 1]),
        ({"optimizer": "sgd"}, ["training.optimizer", "layer_decay"]),
        ({"layer_decay": 0.5}, ["training.optimizer", "layer_decay"]),
        ({"resume_from_checkpoint": "nope"}, ["resume_from_checkpoint", "nope", "checkpoint-2"]),
    ],
)
def test_a_run_that_cannot_resume_says_why(changes: dict, mentioned: list, table, tmp_path) -> None:
    Run(table, tmp_path, max_steps=2, **SAVE)
    with pytest.raises(UserError, match=mentions(*mentioned)):
        Run(table, tmp_path, **{"resume_from_checkpoint": "true", **changes})


def test_a_resumed_run_names_the_values_that_it_keeps(table: Dataset, tmp_path: Path, caplog) -> None:
    Run(table, tmp_path, max_steps=2, **SAVE)
    Run(table, tmp_path, resume_from_checkpoint="true", learning_rate=0.5, adam_beta1=0.5)
    (rate,) = [message for message in caplog.messages if message.startswith("training.learning_rate")]
    assert "layer_decay" in rate and rate.endswith("the run keeps the value of the checkpoint: 0.001")
    assert "training.adam_beta1" in caplog.text and "training.weight_decay" not in caplog.text


def test_the_kept_value_is_that_of_the_groups_that_differ(table: Dataset, tmp_path: Path, caplog) -> None:
    """Groups without weight decay, such as biases, keep 0.0 in both runs."""
    Run(table, tmp_path, max_steps=2, weight_decay=0.25, **SAVE)
    Run(table, tmp_path, resume_from_checkpoint="true", weight_decay=0.5)
    (kept,) = [message for message in caplog.messages if "the run keeps" in message]
    assert kept.startswith("training.weight_decay") and kept.endswith(": 0.25")


class AbstractOptimizer(abc.ABC):  # noqa: B024
    pass


class OwnOptimizer(AbstractOptimizer, torch.optim.SGD):
    """An optimizer whose class is made by another class than `type`."""


def test_an_own_class_of_optimizers_is_named_in_warnings(table: Dataset, tmp_path: Path, caplog) -> None:
    transformers_arguments.warn_once.cache_clear()
    own = {"optimizer_cls_and_kwargs": (OwnOptimizer, {"lr": 0.1})}
    run = Run(table, tmp_path, adam_beta1=0.8, objects=lambda model: own)
    assert isinstance(run.trainer.optimizer.optimizer, OwnOptimizer)
    assert "training.adam_beta1 has no effect with the optimizer OwnOptimizer" in caplog.messages


def test_the_speed_is_measured_with_an_own_schedule(table: Dataset, tmp_path: Path) -> None:
    def own(model: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))}

    assert Run(table, tmp_path, objects=own).trainer.stopwatch.seconds > 1e-3


@pytest.mark.parametrize("count", [2.0, np.int64(2), "2"])
def test_any_whole_number_of_workers(count: Any, tmp_path: Path) -> None:
    args = SSLTrainingArguments(str(tmp_path), use_cpu=True, dataloader_num_workers=count)
    assert type(args.dataloader_num_workers) is int and args.dataloader_num_workers == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"eval_strategy": "epoch", "monitor_steps": 3}, ["training.monitor_steps", "eval_strategy=epoch"]),
        ({"eval_strategy": "no", "eval_steps": 3}, ["training.eval_steps", "eval_strategy=no"]),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 0},
            ["training.dataloader_persistent_workers", "dataloader_num_workers=0"],
        ),
        ({"optim": "adagrad", "adam_epsilon": 0.1}, ["training.adam_epsilon", "adagrad"]),
        ({"optim": "rmsprop", "momentum": 0.5}, ["training.momentum", "rmsprop"]),
        ({"optimizer": "sgd", "adam_beta1": 0.5}, ["training.adam_beta1", "sgd"]),
        ({"lars": {"clip": True}}, ["training.lars", "adamw"]),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, ["training.warmup_steps", "constant"]),
        (
            {"lr_scheduler_kwargs": {"a": 2}, "lr_scheduler_type": "constant"},
            ["training.lr_scheduler_kwargs", "constant"],
        ),
    ],
)
def test_values_that_another_value_disables_are_reported(changes, mentioned, table, tmp_path, caplog) -> None:
    transformers_arguments.warn_once.cache_clear()
    Run(table, tmp_path, max_steps=1, **{"eval_steps": None, **changes})
    assert sum(bool(re.search(mentions(*mentioned), each.getMessage())) for each in caplog.records) == 1


def test_plain_arguments_get_our_defaults_with_a_warning(tmp_path: Path, caplog) -> None:
    transformers_arguments.warn_once.cache_clear()
    plain = TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="steps", adam_beta1=0.5)
    args = SSLTrainingArguments.from_arguments(plain)
    assert (args.adam_beta1, args.batch_size, args.eval_strategy) == (0.5, 256, "steps")
    (message,) = [record.getMessage() for record in caplog.records]
    assert "SSLTrainingArguments" in message


@pytest.mark.parametrize("given", [{"output_dir": "out"}, "out", SSLTrainingArguments])
def test_other_arguments_are_rejected(given: Any) -> None:
    with pytest.raises(UserError, match=mentions("args", "SSLTrainingArguments")):
        SSLTrainingArguments.from_arguments(given)


def test_a_misspelt_argument_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=mentions("bach_size", "batch_size")):
        SSLTrainingArguments(str(tmp_path), bach_size=3)


def test_without_measurements(table: Dataset, usual: Run, tmp_path: Path) -> None:
    for number, off in enumerate(({"eval_strategy": "no"}, {"monitor_steps": 0})):
        run = Run(table, tmp_path / str(number), **{"eval_steps": None, **off})
        assert not run.steps("eval_rank_me") and same_weights(run, usual)
    for strategy in ("save_strategy", "eval_strategy", "logging_strategy"):
        args = load_recipe("smoke/simclr", [f"training.{strategy}=no"]).training_arguments()
        assert getattr(args, strategy) == "no"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim_args", "name", "value"),
    [
        ("lr=0.5", "lr", 0.5),
        ("scale_parameter=true", "scale_parameter", True),
        ("eps=(1e-20, 1e-4), clip_threshold=2.0", "eps", (1e-20, 1e-4)),
        ({"decay_rate": -0.5}, "decay_rate", -0.5),
    ],
)
def test_arguments_of_the_optimizer_have_precedence(optim_args, name, value, table, tmp_path) -> None:
    run = Run(table, tmp_path, optim="adafactor", optim_args=optim_args, lr_scheduler_type="constant")
    assert run.optimizer[name] == value


class TwoWeights(torch.optim.SGD):
    """Has other weights for measurements than for training, as schedule-free optimizers do."""

    averaged = False

    def train(self) -> None:
        self.averaged = False

    def eval(self) -> None:
        self.averaged = True

    def step(self, closure: Any = None) -> Any:
        assert not self.averaged
        return super().step(closure)


def test_schedule_free_optimizers_change_the_weights(table: Dataset, tmp_path: Path, monkeypatch) -> None:
    """Measurements and files have the averaged weights; the hooks of a method read the training weights."""
    seen, hooked = [], []
    look = lambda *given: seen.append(trainer.optimizer.optimizer.averaged)  # noqa: E731
    config = SimCLRConfig(backbone_config=ResNetConfig(**TINY), views={"size": 16})
    args = SSLTrainingArguments(
        str(tmp_path), max_steps=2, batch_size=8, use_cpu=True, report_to="none", save_steps=1, eval_steps=1,
        disable_tqdm=True, eval_on_start=False,
    )  # fmt: skip
    trainer = SSLTrainer(
        SimCLRForPreTraining(config), args, train_dataset=table, eval_dataset=table,
        optimizer_cls_and_kwargs=(TwoWeights, {"lr": 0.01}), compute_metrics=lambda given: look() or {},
    )  # fmt: skip
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", look)
    for hook in ("before_step", "after_step"):
        monkeypatch.setattr(
            trainer.method, hook, lambda progress: hooked.append(trainer.optimizer.optimizer.averaged)
        )
    trainer.train()
    assert hooked == [False] * 4
    assert len(seen) == 4 and all(seen) and trainer.optimizer.optimizer.averaged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "choose"),
    [("uniformity", min), ("eval_alignment", min), ("eval_loss", min), ("embedding_rank", max)],
)
def test_the_best_model_has_the_best_value(name: str, choose: Any, table, tmp_path) -> None:
    run = Run(table, tmp_path, learning_rate=0.05, **{**BEST, "metric_for_best_model": name})
    assert best(run, f"eval_{name.removeprefix('eval_')}", choose)
    plain = TrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model=name)
    args = SSLTrainingArguments.from_arguments(plain)
    assert args.greater_is_better == (choose is max)


def test_the_best_model_is_loaded_with_default_steps(tmp_path: Path) -> None:
    args = SSLTrainingArguments(str(tmp_path), load_best_model_at_end=True)
    assert args.save_steps % args.eval_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize(("measure", "save"), [(1, 4), (0.25, 3), (0.3, 0.6)])
def test_the_best_model_is_loaded_also_between_saved_steps(measure, save, table, tmp_path) -> None:
    changes = {**BEST, "eval_steps": measure, "save_steps": save, "max_steps": 8, "learning_rate": 0.05}
    worse = lambda given, calls=[]: {"order": -len(calls), "call": calls.append(1) or 0}  # noqa: E731
    run = Run(table, tmp_path, compute_metrics=worse, **{**changes, "metric_for_best_model": "order"})
    first = min(run.steps("eval_order")[1:])
    assert run.trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{first}")
    stored = load_file(tmp_path / f"checkpoint-{first}/model.safetensors")
    weights = run.trainer.method.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("changes", "mentioned"), [({}, "metric_for_best_model"), ({"eval_steps": None}, "eval_strategy")]
)
def test_early_stopping_needs_a_measurement(changes: dict, mentioned: str, table, tmp_path) -> None:
    metric = "knn" if changes else None
    changes = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "monitor_steps": 0, **changes}
    if not metric:
        changes["monitor_steps"] = 200
    config = SimCLRConfig(backbone_config=ResNetConfig(**TINY), views={"size": 16})
    args = SSLTrainingArguments(use_cpu=True, per_device_train_batch_size=8, report_to="none", **changes)
    trainer = SSLTrainer(SimCLRForPreTraining(config), args, train_dataset=table, eval_dataset=table)
    trainer.add_callback(EarlyStoppingCallback(2))
    with pytest.raises(UserError, match=mentions(f"training.{mentioned}", "EarlyStoppingCallback")):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mentioned"),
    [
        ({"optim": "lomo"}, ["training.optimizer", "lomo"]),
        ({"optim": "rmsprop", "optim_args": "speed=3"}, ["training.optim_args", "RMSprop", "speed"]),
        ({"optim": "rmsprop", "optim_args": "momentum=fast"}, ["training.optimizer", "rmsprop", "fast"]),
        ({"optim": "rmsprop", "optim_args": "momentum"}, ["training.optim_args", "momentum"]),
        ({"optim": "rmsprop", "optim_args": "params=[]"}, ["training.optim_args", "params"]),
        ({"optim": "adafactor", "optim_args": "relative_step=True"}, ["training.optim_args", "Adafactor"]),
        ({"lr_scheduler_type": "warmup_stable_decay"}, ["training.lr_scheduler_kwargs", "num_decay_steps"]),
        (
            {"torch_compile": True, "gradient_checkpointing": True},
            ["training.torch_compile", "ResNetModel"],
        ),
        (
            {"torch_compile": True, "torch_compile_backend": "eager", "gradient_checkpointing": True},
            ["training.torch_compile_backend", "aot_eager", "eager"],
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "learning_rate_drops": [1.0]},
            ["training.lr_scheduler_type", "learning_rate_drops"],
        ),
    ],
)
def test_an_optimizer_that_does_not_work_is_reported(changes: dict, mentioned: list, table, tmp_path) -> None:
    with pytest.raises(UserError, match=mentions(*mentioned)):
        Run(table, tmp_path, **changes)


def test_a_model_that_returns_tuples_is_trained(table: Dataset, tmp_path: Path) -> None:
    config = SimCLRConfig(
        backbone_config=ResNetConfig(**TINY), views={"size": 16}, projector_sizes=[16, 8], return_dict=False
    )
    args = SSLTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, use_cpu=True, report_to="none",
        logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = SSLTrainer(SimCLRForPreTraining(config), args, train_dataset=table)
    trainer.train()
    assert not trainer.method.config.return_dict
    assert any("loss" in record for record in trainer.state.log_history)


def test_plateau_schedule_and_best_checkpoints_work(table: Dataset, tmp_path: Path) -> None:
    run = Run(table, tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **{**BEST, "save_strategy": "best"})
    assert run.checkpoints()


@pytest.mark.parametrize(
    ("name", "mentioned"), [("kn", ["eval_knn"]), ("eval_queue_age", ["eval_knn", "eval_queue_age"])]
)
def test_an_unknown_metric_is_reported_before_training(name: str, mentioned: list, table, tmp_path) -> None:
    with pytest.raises(UserError, match=mentions("training.metric_for_best_model", *mentioned)):
        Run(table, tmp_path, **{**BEST, "metric_for_best_model": name})
    assert not list(tmp_path.glob("checkpoint-*"))


def test_knn_as_metric_needs_labels(table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("eval_knn", "eval_dataset")):
        Run(table, tmp_path, labeled=False, **BEST)


def test_metrics_of_numpy_are_saved(table: Dataset, tmp_path: Path) -> None:
    run = Run(table, tmp_path, compute_metrics=lambda given: {"mine": np.float32(0.5)}, **SAVE)
    assert run.history[0]["eval_mine"] == 0.5 and run.checkpoints()


def test_resuming_by_arguments(table: Dataset, usual: Run, tmp_path: Path) -> None:
    Run(table, tmp_path, max_steps=2, lr_scheduler_kwargs={"min_lr_rate": 0.0}, **SAVE)
    Path(tmp_path / "checkpoint-2").rename(tmp_path / "kept")
    run = Run(
        table, tmp_path / "second", resume_from_checkpoint=str(tmp_path / "kept"),
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    assert run.trainer.resumed == 1 and run.trainer.state.global_step == 3
    with pytest.raises(UserError, match=mentions("nowhere")):
        Run(table, tmp_path / "third", resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_a_loss_that_is_no_number_is_averaged(table: Dataset, tmp_path: Path) -> None:
    def once(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        calls.append(1)
        return outputs.loss + (float("nan") if len(calls) == 2 else 0.0)  # the gradient stays finite

    calls: list[int] = []
    without = {"compute_loss_func": once, "eval_steps": None, "monitor_steps": 0}
    Run(table, tmp_path, logging_nan_inf_filter=True, **without)
    calls.clear()
    with pytest.raises(UserError, match=mentions("loss", "nan")):
        Run(table, tmp_path / "other", **without)


IN_RECIPES = sorted({*WORKING, *WITHOUT_EFFECT, "tf32", "resume_from_checkpoint"} & FIELDS)


@pytest.mark.parametrize("name", one_of(6, IN_RECIPES))
def test_recipes_accept_it_or_say_what_to_do(name: str, tmp_path: Path) -> None:
    value, further = WORKING[name][:2] if name in WORKING else (VALUES.get(name, True), {})
    given = {**further, name: value}
    overrides = [f"training.{key}={json.dumps(given[key])}" for key in given if given[key] is not None]
    try:
        recipe = load_recipe("smoke/simclr", [*overrides, f"training.output_dir={tmp_path}"])
    except UserError as error:
        assert re.search(f"training.*({name}|optim|load_best_model_at_end)", str(error))
    else:
        assert name in recipe.training


def test_scripts_can_read_the_arguments_from_the_command_line(tmp_path: Path) -> None:
    parser = HfArgumentParser(SSLTrainingArguments)
    command = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    (args,) = parser.parse_args_into_dataclasses(command)
    assert (args.dataloader_num_workers, args.batch_size, args.excluded_precisions) == ("auto", 256, set())
    further = "--dataloader_num_workers 2 --learning_rate_drops 3 4.5 --batch_size 32 --optimizer lars"
    (args,) = parser.parse_args_into_dataclasses([*command, *further.split()])
    assert (args.dataloader_num_workers, args.learning_rate_drops) == (2, [3.0, 4.5])
    assert (args.batch_size, args.optimizer) == (32, "lars")


DDP = """import os, sys, torch, pathlib
rank, folder, table, port = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port)
from datasets import load_from_disk
from transformers import ResNetConfig
from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments
measured, data = [], load_from_disk(table)
def order(predictions):  # each measurement is worse than the one before
    measured.append(1)
    return {"order": -len(measured)}
args = SSLTrainingArguments(
    str(folder / "run"), max_steps=3, learning_rate=0.05, per_device_train_batch_size=8, use_cpu=True,
    disable_tqdm=True, report_to="none", eval_steps=1, save_steps=1, load_best_model_at_end=True,
    metric_for_best_model="order", greater_is_better=True, ddp_backend="gloo", ddp_timeout=77,
    ddp_bucket_cap_mb=3,
    ddp_find_unused_parameters=True, ddp_broadcast_buffers=True, ddp_static_graph=True,
    log_level_replica="error")
tiny = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
trainer = SSLTrainer(SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny, views={"size": 16})), args,
                     train_dataset=data, eval_dataset=data, compute_metrics=order)
trainer.train()
torch.save((trainer.state.best_global_step, trainer.method.state_dict()), folder / f"{rank}.pt")
ddp = trainer.model_wrapped
assert ddp.bucket_bytes_cap == 3 * 2**20 and ddp.find_unused_parameters and ddp.broadcast_buffers
assert ddp.static_graph and torch.distributed.get_backend() == "gloo"
assert args.get_process_log_level() == (40 if rank else 20) or not rank
from hf_ssl.modeling.gather import finish_communication
finish_communication()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_settings_of_ddp_arrive(forks: Forks, table: Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "table")
    port = str(29600 + os.getpid() % 2000)
    ranks = [[str(rank), str(tmp_path), str(tmp_path / "table"), port] for rank in range(2)]
    done = forks.together("transformers", DDP, ranks)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr[-3000:]
    (best, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert best == 1
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_a_resumed_run_replaces_later_checkpoints(table: Dataset, tmp_path: Path, caplog) -> None:
    """They belong to a run with other images; `load_best_model_at_end` would load their weights."""
    keep = {**SAVE, "max_steps": 4, "save_total_limit": None}
    first = Run(table, tmp_path, **keep)
    before = str(tmp_path / "checkpoint-2")
    again = Run(table.select(range(16)), tmp_path, resume_from_checkpoint=before, **keep)
    assert "checkpoint-4 is from another continuation of checkpoint-2; it is now abandoned-" in caplog.text
    assert again.checkpoints() == [1, 2, 3, 4]
    saved = SimCLRForPreTraining.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    weights = torch.cat([value.flatten().float() for value in saved.values()])
    assert torch.equal(weights, again.weights) and not torch.equal(weights, first.weights)


def test_a_finished_run_makes_no_further_step(table: Dataset, tmp_path: Path) -> None:
    """transformers (5.20 to 5.24) makes one if the last step is inside an epoch."""
    first = Run(table, tmp_path, max_steps=2, eval_steps=None, **SAVE)
    again = Run(table, tmp_path, max_steps=2, resume_from_checkpoint="true", **SAVE)
    assert again.trainer.state.global_step == 2 and torch.equal(first.weights, again.weights)


@pytest.mark.slow
def test_a_changed_metric_does_not_compare_with_the_old_best(table: Dataset, tmp_path: Path, caplog) -> None:
    best = {"load_best_model_at_end": True, **SAVE}
    Run(table, tmp_path, max_steps=2, metric_for_best_model="knn", **best)
    run = Run(
        table, tmp_path, max_steps=4, resume_from_checkpoint="true", metric_for_best_model="loss", **best
    )
    assert run.trainer.state.best_global_step > 2 and "because knn selected it" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("value", ["good", [0.1, 0.2], None])
def test_the_best_metric_must_be_a_number(value: Any, table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("metric_for_best_model", "number", "plan")):
        Run(table, tmp_path, metric_for_best_model="plan", compute_metrics=lambda _: {"plan": value})


@pytest.mark.slow
def test_every_setting_of_an_optimizer_that_a_resumed_run_keeps_is_named(table, tmp_path, caplog) -> None:
    Run(table, tmp_path, max_steps=2, optim="rmsprop", **SAVE)
    Run(table, tmp_path, resume_from_checkpoint="true", optim="rmsprop", optim_args="alpha=0.5")
    assert "training.optim_args, alpha: the run keeps the value of the checkpoint: 0.99" in caplog.messages


@pytest.mark.slow
def test_kept_settings_of_a_schedule_are_named(table: Dataset, tmp_path: Path, caplog) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    Run(table, tmp_path, max_steps=2, **plateau, **SAVE)
    changed = {**plateau, "lr_scheduler_kwargs": {"factor": 0.5}}
    Run(table, tmp_path, resume_from_checkpoint="true", **changed)
    (kept,) = [message for message in caplog.messages if "the run keeps" in message]
    assert kept == "training.lr_scheduler_kwargs, factor: the run keeps the value of the checkpoint: 0.1"


def test_a_checkpoint_of_another_model_is_not_called_damaged(table: Dataset, tmp_path: Path) -> None:
    Run(table, tmp_path, max_steps=2, **SAVE)
    with pytest.raises(UserError, match=mentions("weights of this model", "size mismatch")) as error:
        Run(table, tmp_path, resume_from_checkpoint="true", width=8)
    assert "remove" not in str(error.value)


CHANGES: dict[str, Callable[[SSLTrainer], Any]] = {
    "train_dataset": lambda trainer: trainer.source.dataset,
    "eval_dataset": lambda trainer: trainer.source.dataset,
    "compute_metrics": lambda trainer: print,
    "args": lambda trainer: SSLTrainingArguments(trainer.args.output_dir, use_cpu=True),
    "model": lambda trainer: copy.deepcopy(trainer.method),
}


@pytest.mark.parametrize("name", one_of(6, CHANGES))
def test_an_attribute_that_changes_later_is_an_error(name: str, table: Dataset, tmp_path: Path) -> None:
    trainer = Run(table, tmp_path, max_steps=1).trainer
    with pytest.raises(UserError, match=mentions(f"SSLTrainer.{name}", "SSLTrainer")):
        setattr(trainer, name, CHANGES[name](trainer))
        trainer.train()


LATER = {
    "gradient_accumulation_steps": 4, "metric_for_best_model": "loss", "per_device_eval_batch_size": 0,
    "eval_steps": 0, "logging_steps": 0, "max_steps": 0, "monitor_bank_images": 0, "learning_rate": "fast",
    "on_worse": "x", "weight_decay": -1.0, "layer_decay": 0.0, "max_grad_norm": "a",
}  # fmt: skip


@pytest.mark.parametrize("name", one_of(6, LATER))
def test_arguments_that_change_later_are_checked(name: str, table: Dataset, tmp_path: Path) -> None:
    trainer = Run(table, tmp_path, max_steps=1).trainer
    setattr(trainer.args, name, LATER[name])
    with pytest.raises(UserError, match=mentions(name, LATER[name])):
        trainer.train()


def test_training_does_not_change_the_arguments_of_the_user(table: Dataset, tmp_path: Path) -> None:
    Run(table, tmp_path, max_steps=2, **SAVE)
    assert Run(table, tmp_path, resume_from_checkpoint="true").trainer.args.eval_on_start


def test_the_direction_of_a_copied_metric_is_questioned(tmp_path: Path, caplog) -> None:
    transformers_arguments.warn_once.cache_clear()
    args = SSLTrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model="knn")
    dataclasses.replace(args, metric_for_best_model="alignment")
    assert "training.greater_is_better=True selects the worst model by alignment" in caplog.messages


def test_a_number_in_yaml_without_a_point(tmp_path: Path) -> None:
    assert SSLTrainingArguments(str(tmp_path), use_cpu=True, learning_rate="1e-3").learning_rate == 1e-3


def test_a_schedule_free_optimizer_has_its_own_warmup(tmp_path: Path) -> None:
    given = {"use_cpu": True, "optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**TINY)))
    check_optimization(model, SSLTrainingArguments(str(tmp_path), warmup_steps=100, **given))
    for warmup in ({"warmup_steps": 0.5}, {"warmup_epochs": 1.0}):
        with pytest.raises(UserError, match=mentions("training.warmup_steps", "warmup_steps=100")):
            check_optimization(model, SSLTrainingArguments(str(tmp_path), **given, **warmup))


def test_weights_of_16_bits_are_trained_in_float32(table: Dataset, tmp_path: Path) -> None:
    encoder = ResNetModel(ResNetConfig(**TINY)).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path / "encoder")
    for start in (encoder, tmp_path / "encoder"):
        model = SimCLRForPreTraining.from_backbone(start, views={"size": 16})
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=mentions("model", "float32", "model.float()")):
        SSLTrainer(model.to(torch.bfloat16), None, train_dataset=table)


def test_a_frozen_model_is_reported(table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("model", "trainable", "requires_grad_(True)")):
        Run(table, tmp_path, objects=lambda model: model.requires_grad_(False) and {})


@pytest.mark.slow
def test_the_limit_of_checkpoints_does_not_keep_abandoned_ones(table: Dataset, tmp_path: Path) -> None:
    Run(table, tmp_path, **{**SAVE, "max_steps": 4, "save_total_limit": None})
    before = str(tmp_path / "checkpoint-2")
    changed = {**SAVE, "max_steps": 3, "save_total_limit": 1}
    run = Run(table, tmp_path, resume_from_checkpoint=before, **changed)
    assert run.checkpoints() == [3] and (tmp_path / "abandoned-checkpoint-4").is_dir()


@pytest.mark.slow
def test_another_folder_for_a_resumed_run_has_no_checkpoints(table: Dataset, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Run(table, tmp_path / name, max_steps=2, **SAVE)
    with pytest.raises(UserError, match=mentions("training.output_dir", "checkpoint-2")):
        Run(table, tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"), **SAVE)


def test_a_finished_run_of_half_an_epoch_makes_no_further_step(table: Dataset, tmp_path: Path) -> None:
    epochs = {**SAVE, "max_steps": -1, "num_train_epochs": 1.5}
    first = Run(table, tmp_path, **epochs)
    again = Run(table, tmp_path, resume_from_checkpoint="true", **epochs)
    assert again.trainer.state.global_step == first.trainer.state.global_step == 6
    assert torch.equal(first.weights, again.weights)


def test_a_copy_of_the_arguments_keeps_the_automatic_precision(tmp_path: Path) -> None:
    args = SSLTrainingArguments(str(tmp_path), use_cpu=True)
    assert dataclasses.replace(args, seed=1).excluded_precisions == args.excluded_precisions == set()
