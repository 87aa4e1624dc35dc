# SPDX-License-Identifier: Apache-2.0
"""Trains the reference encoder: with labels, from random weights, with the encoder and the data of a recipe
(layer 5).

The code is that of fine-tuning. The encoder is exported like a pretrained encoder, so that the same protocols
can measure it.
"""

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_ssl import __version__
from hf_ssl.building import build_model, open_labeled_splits
from hf_ssl.cards import environment, remove_private
from hf_ssl.cards.facts_files import settings_of_weights
from hf_ssl.cards.result_files import EVALUATED, SUPERVISED
from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation import fastest_device
from hf_ssl.evaluation.augmented import epoch_batches
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.evaluation.encoders import inspect_encoder
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.evaluation.protocols.fine_tune import Task, train_and_test
from hf_ssl.evaluation.results import ACCURACY, metric_of, percent
from hf_ssl.evaluation.split_report import report_comparison
from hf_ssl.files import check_new_or_empty, write_json
from hf_ssl.hub import export_encoder, image_processor
from hf_ssl.modeling.gather import joined_processes, process_count, process_rank
from hf_ssl.precision import autocast_dtype
from hf_ssl.progress import hidden_progress
from hf_ssl.recipe import Recipe
from hf_ssl.recipe.source import apply_overrides
from hf_ssl.recording import current_date, encoder_facts, evaluation_facts
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.machine_settings import choose_precision

DEFAULT_RECIPE = "scratch"
CHECKPOINTS = "_checkpoints"  # `hf-ssl publish` uploads no name with a leading underscore
_SETTINGS = "evaluation.settings.fine_tune"
_EQUIVALENT = {
    "batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "learning_rate": "learning_rates",
    "weight_decay": "weight_decay",
    "warmup_epochs": "warmup_epochs",
    "optimizer": "optimizer",
    "layer_decay": "layer_decay",
}
"""Key of `training` -> setting of the protocol `fine_tune` with the same meaning."""
_USED = {
    "training": ("output_dir", "seed", "precision", "bf16", "fp16", "use_cpu", "disable_tqdm", *_EQUIVALENT),
    "views": ("size", "enlarge", "interpolation", "mean", "std"),
    "evaluation": (
        "path", "train_split", "test_split", "test_fraction", "image_column", "label_column",
        "max_train_images", "max_test_images", "batch_size", "settings",
    ),
    "method": (),
    "publish": (),
}  # fmt: skip
"""The keys of each section that have an effect. All keys of `backbone` have one."""
_UNUSED = ("split", "max_images", "num_images")
"""The keys of `data` without an effect."""
_ADVICE = {
    "training.max_steps": "training.num_train_epochs",
    "training.epochs": "training.num_train_epochs",
    "training.per_device_train_batch_size": "training.batch_size",
    "training.base_learning_rate": "training.learning_rate",
    "training.warmup_steps": "training.warmup_epochs",
    "evaluation.protocols": "hf-ssl evaluate on the trained encoder",
    "evaluation.seed": "training.seed",
    "data.split": "evaluation.train_split",
    "data.max_images": "evaluation.max_train_images",
    "evaluation.precision": "training.precision",
    "evaluation.settings": _SETTINGS,
}


def supervise(recipe: Recipe) -> dict[str, Any]:
    """Train, test and export a supervised encoder, and return the test result of its classifier.

    The recipe gives the encoder, the images, their size and the seed. Its method is not used. The settings of
    the training are those of the protocol `fine_tune`, with its recipe "scratch" by default. On
    the command line, keys of `training` with the same meaning replace them. The keys of `training` in the
    recipe file have no effect, because they are for its method. The same command resumes an interrupted
    training.

    Args:
        recipe: the result of `hf_ssl.recipe.load_recipe`. `training.output_dir` is the output folder.

    Raises:
        UserError: the data have no labels, a setting has no effect here or is not possible, or the output
            folder is not empty.
    """
    transformers_logging.disable_progress_bar()
    evaluation = with_settings(recipe)  # first: its errors name the keys of this command
    args = recipe.training_arguments()
    device = torch.device("cpu") if args.use_cpu else fastest_device()
    with joined_processes(device.type), hidden_progress(process_rank() > 0 or bool(args.disable_tqdm)):
        return _supervise(recipe, evaluation, device)


def _supervise(recipe: Recipe, evaluation: EvaluationConfig, device: torch.device) -> dict[str, Any]:
    folder = recipe.output_dir
    unfinished = folder / CHECKPOINTS
    config = evaluation.of_protocol("fine_tune")
    if not unfinished.exists():
        check_new_or_empty(folder, "training.output_dir")
    if config.folder is None:
        config.folder = str(unfinished)
    elif Path(config.folder).expanduser().resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{_SETTINGS}.folder: expected a folder outside of training.output_dir={folder}, which contains "
            f"only the finished encoder, got {config.folder}; use {_SETTINGS}.folder=null"
        )
    if config.freeze != "none" or list(config.fractions) != [1.0] or config.labels_per_class:
        raise UserError(
            "evaluation.settings.fine_tune: expected all parameters and all labels, because training starts "
            f"from random weights, got freeze={config.freeze}, fractions={list(config.fractions)}, "
            f"labels_per_class={list(config.labels_per_class)}"
        )
    train, test = open_labeled_splits(recipe.data, replace(evaluation, protocols=["fine_tune"]))
    report_comparison("evaluation", train, test)
    args = recipe.training_arguments()
    seed, precision = args.seed, _precision(recipe, args)
    encoder: Any = build_model(recipe, seed).exported_encoder
    encoder.to(device)
    processor = image_processor(recipe.views, recipe.data.channels)
    pooling, size, _ = inspect_encoder(encoder, processor, test.iter_batches(1), device)
    splits = [
        Split(torch.empty(len(images.labels), 0), images.labels, name, images=images)
        for images, name in zip((train, test), evaluation.split_names, strict=True)
    ]
    inputs = Inputs(
        splits[0], splits[1], device, seed, description=f"{recipe.name}, supervised", encoder=encoder,
        processor=processor, batch_size=evaluation.batch_size, pooling=pooling,
        dtype=autocast_dtype(precision),
    )  # fmt: skip
    settings, rates = config.optimization(1.0, len(train))
    if process_rank() == 0:
        print(
            f"training with labels: {counted(settings.epochs, 'epoch')}, batch size {settings.batch_size}, "
            f"{settings.optimizer}, learning rate {', '.join(f'{rate:g}' for rate in rates)}, {precision}, "
            f"seed {seed}"
        )
    start = time.perf_counter()
    task = Task.of(inputs, config, native=False)
    model, result = train_and_test(task, 1.0, np.arange(len(train)), is_run=True)
    text = result["text"].replace("Fine-tuning", "Training from random weights", 1)
    metric = "" if metric_of(result) == ACCURACY else ", mAP"
    quantity = "mean average precision" if metric else "accuracy"
    title = f"{quantity.capitalize()} of the supervised classifier"
    words = {"key": "supervised", "title": title, "column": f"supervised{metric}", "text": text}
    result.update(words)  # type: ignore[typeddict-item]
    if process_rank() == 0:
        encoder = model.encoder.cpu().eval()
        export_encoder(encoder, processor, folder)
        seconds = round(time.perf_counter() - start, 1)
        settings = replace(settings, learning_rate=result["selection"].get("learning_rate", rates[0]))
        steps = settings.epochs * epoch_batches(len(train), settings.batch_size)
        training = {"steps": steps, "seed": seed, "precision": precision, "seconds": seconds}
        entry = _entry(recipe, asdict(settings) | training, encoder_facts(encoder, size), device)
        images = evaluation_facts(recipe.data, evaluation, train, test)
        source = {"name": images["name"], "revision": train.revision, "split": evaluation.split_names[0]}
        entry |= {"data": source | {"images": len(train)}, "evaluation": images}
        record = {
            "recipe": recipe.name,
            "revision": train.revision,
            "result": result,
            "seconds": seconds,
            "images": {"train": len(train), "test": len(test)},
            "pooling": pooling,
            EVALUATED: entry,
        }
        write_json(folder / SUPERVISED, record)
        shutil.rmtree(unfinished, ignore_errors=True)
        value, error = percent(result["value"]), percent(result["standard_error"])
        print(f"{quantity} of the classifier on {splits[1]}: {value} (standard error {error})")
        command = shlex.join(["hf-ssl", "evaluate", str(folder)])
        print(f"the encoder is in {folder}; {command} measures it like every other encoder")
    return dict(result)


def _entry(
    recipe: Recipe, training: dict[str, Any], backbone: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return the entry of the training for `hf-ssl compare`, without data, evaluation and results.

    `hf_ssl.cards.result_files` reads it.
    """
    return {
        "date": current_date(),
        "hf_ssl_version": __version__,
        "recipe": recipe.name,
        "overrides": remove_private(recipe.overrides),
        "settings": remove_private(
            {key: v for key, v in settings_of_weights(recipe.differences()).items() if is_used(key)}
        ),
        "seed": training["seed"],
        "method": "supervised",
        "backbone": backbone,
        "training": training | {"processes": process_count()},
        "collapse": None,
        "environment": environment(device, process_count()),
    }


def is_used(key: str) -> bool:
    """Return whether `section.key` has an effect on this training."""
    section, _, name = key.partition(".")
    name = name.partition(".")[0]
    return name in _USED[section] if section in _USED else not (section == "data" and name in _UNUSED)


def used(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with an effect on this training, without `evaluation.settings` of protocols."""
    kept: list[str] = []
    for text in overrides:
        section, equals, _ = text.partition("=")
        parts = {section: text}
        if equals and section in _USED:  # a whole section
            values = apply_overrides({}, [text])[section]
            parts = {f"{section}.{key}": f"{section}.{key}={json.dumps(of)}" for key, of in values.items()}
        kept += [part for key, part in parts.items() if is_used(key) and key.split(".")[1:2] != ["settings"]]
    return kept


def with_settings(recipe: Recipe) -> EvaluationConfig:
    """Return the section `evaluation`, whose settings of `fine_tune` contain all settings of the training.

    The recipe of `fine_tune` is "scratch" by default.

    Raises:
        UserError: a value on the command line has no effect, or two keys with the same meaning are set.
    """
    given = apply_overrides({}, recipe.overrides)
    _check_used(recipe, given)
    settings = {name: dict(values or {}) for name, values in recipe.evaluation.settings.items()}
    own = settings.setdefault("fine_tune", {})
    for key, equivalent in _EQUIVALENT.items():
        value = given["training"].get(key)
        if value is None:
            continue
        if equivalent in own:
            raise UserError(
                f"training.{key}: expected no value, because {_SETTINGS}.{equivalent}={own[equivalent]} has "
                f"the same meaning, got {value}; use only one of them"
            )
        own[equivalent] = [value] if equivalent == "learning_rates" else value
    settings["fine_tune"] = {"recipe": DEFAULT_RECIPE} | own
    return replace(recipe.evaluation, settings=settings)


def _check_used(recipe: Recipe, given: dict[str, dict[str, Any]]) -> None:
    """Raise UserError for a value on the command line that has no effect.

    Args:
        recipe: the recipe.
        given: the sections with the values on the command line.
    """
    if recipe.init_from is not None:
        raise UserError(
            f"backbone.init_from: expected none, because hf-ssl supervise starts from random weights, got "
            f"{recipe.init_from}; use hf-ssl evaluate {recipe.init_from} --protocols fine_tune"
        )
    keys = [
        (f"{section}.{key}", value)
        for section, used in _USED.items()
        for key, value in given[section].items()
        if key not in used and not (section == "method" and recipe.model_class.takes_image_columns)
    ]
    keys += [(f"data.{key}", given["data"][key]) for key in _UNUSED if key in given["data"]]
    for name in given["evaluation"].get("settings") or {}:
        if name != "fine_tune":
            keys.append((f"evaluation.settings.{name}", given["evaluation"]["settings"][name]))
    for key, value in keys:
        section = key.partition(".")[0]
        usable = [f"{section}.{name}" for name in _USED.get(section, ())]
        advice = _ADVICE.get(key.rpartition(".")[0] if key.count(".") > 1 else key)
        advice = advice or (f"one of {', '.join(usable)}" if usable else "hf-ssl pretrain")
        raise UserError(
            f"{key}: expected no value, because it has no effect in hf-ssl supervise, got {value}; use "
            f"{advice}"
        )


def _precision(recipe: Recipe, args: SSLTrainingArguments) -> str:
    """Return the precision of the training: float32, unless the command line sets another one."""
    if not any(recipe.is_overridden(f"training.{key}") for key in ("precision", "bf16", "fp16")):
        return "float32"
    choose_precision(args)
    return args.precision
