# SPDX-License-Identifier: Apache-2.0
"""Trains the reference encoder: with labels, from random weights, with the encoder and the data of a recipe
(layer 5).

The code is that of fine-tuning. The encoder is exported as that of any method, so that the same protocols
measure both.
"""

import shutil
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_ssl.building import build_model, open_labeled_splits
from hf_ssl.errors import UserError
from hf_ssl.evaluation import fastest_device
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.evaluation.features import inspect_encoder
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.evaluation.protocols.fine_tune import Task, train_and_test
from hf_ssl.files import check_new_or_empty, write_json
from hf_ssl.hub import export_encoder, image_processor
from hf_ssl.modeling.gather import joined_processes, process_rank
from hf_ssl.progress import hidden_progress
from hf_ssl.recipe import Recipe

DEFAULT_RECIPE = "scratch"
RESULT = "supervised.json"
CHECKPOINTS = "_checkpoints"  # `hf-ssl publish` uploads no name with a leading underscore


def supervise(recipe: Recipe) -> dict[str, Any]:
    """Train, test and export a supervised encoder, and return the test result of its classifier.

    The encoder, the images, their size and the seed are those of the recipe, which trains no method here. The
    settings of the training are those of the protocol `fine_tune`, whose recipe is "scratch" by default. The
    same command resumes an interrupted training.

    Args:
        recipe: the result of `hf_ssl.recipe.load_recipe`. `training.output_dir` is the output folder.

    Raises:
        UserError: the data have no labels, a setting is not possible here, or the output folder is not empty.
    """
    transformers_logging.disable_progress_bar()
    with joined_processes(fastest_device().type), hidden_progress(process_rank() > 0):
        return _supervise(recipe)


def _supervise(recipe: Recipe) -> dict[str, Any]:
    folder = recipe.output_dir
    unfinished = folder / CHECKPOINTS
    if not unfinished.exists():
        check_new_or_empty(folder, "training.output_dir")
    evaluation = with_settings(recipe.evaluation)
    config = evaluation.of_protocol("fine_tune")
    config.folder = config.folder or str(unfinished)
    if config.freeze != "none" or list(config.fractions) != [1.0] or config.labels_per_class:
        raise UserError(
            "evaluation.settings.fine_tune: expected all parameters and all labels, because training starts "
            f"from random weights, got freeze={config.freeze}, fractions={list(config.fractions)}, "
            f"labels_per_class={list(config.labels_per_class)}"
        )
    train, test = open_labeled_splits(recipe.data, evaluation)
    device, seed = fastest_device(), recipe.training_arguments().seed
    encoder: Any = build_model(recipe, seed).exported_encoder
    encoder.to(device)
    processor = image_processor(recipe.views, recipe.data.channels)
    pooling = inspect_encoder(encoder, processor, test.iter_batches(1), device)[0]
    splits = [
        Split(torch.empty(len(images.labels), 0), images.labels, name, images=images)
        for images, name in ((train, evaluation.train_split), (test, evaluation.test_split))
    ]
    inputs = Inputs(
        splits[0], splits[1], device, seed, description=f"{recipe.name}, supervised", encoder=encoder,
        processor=processor, batch_size=evaluation.batch_size, pooling=pooling,
    )  # fmt: skip
    start = time.perf_counter()
    task = Task.of(inputs, config, native=False)
    model, result = train_and_test(task, 1.0, np.arange(len(train)))
    text = result["text"].replace("Fine-tuning", "Training from random weights", 1)
    words = {"key": "supervised", "title": "Accuracy of the supervised classifier", "column": "supervised"}
    result.update(words | {"text": text})  # type: ignore[typeddict-item]
    if process_rank() == 0:
        export_encoder(model.encoder.cpu().eval(), processor, folder)
        seconds = round(time.perf_counter() - start, 1)
        facts = {"recipe": recipe.name, "revision": train.revision, "result": result, "seconds": seconds}
        write_json(folder / RESULT, facts)
        shutil.rmtree(unfinished, ignore_errors=True)
        accuracy, error = 100 * result["value"], 100 * result["standard_error"]
        print(f"accuracy of the classifier on {splits[1]}: {accuracy:.1f} % (standard error {error:.1f} %)")
        print(f"the encoder is in {folder}; hf-ssl evaluate {folder} measures it as every other encoder")
    return dict(result)


def with_settings(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return the settings with the recipe "scratch" for `fine_tune`, unless they set another one."""
    settings = {name: dict(values) for name, values in evaluation.settings.items()}
    settings["fine_tune"] = {"recipe": DEFAULT_RECIPE} | settings.get("fine_tune", {})
    return replace(evaluation, settings=settings)
