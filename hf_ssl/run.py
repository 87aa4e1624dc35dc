# SPDX-License-Identifier: Apache-2.0
"""The main job, one way for the command line, scripts and notebooks: train, export, evaluate, describe (layer 5)."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from hf_ssl import views
from hf_ssl.data import DataConfig, LabelledImages, LoadedBatch, Source, labelled_images, open_source, train_loader
from hf_ssl.errors import UserError
from hf_ssl.hub import image_processor
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.output_folder import claim
from hf_ssl.recipe import Recipe
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.monitor import KNNMonitor, Monitor
from hf_ssl.trainer.trainer import SSLTrainer

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 512
_MONTAGE_IMAGES = 8


def build_model(recipe: Recipe, seed: int) -> SSLPreTrainedModel:
    """The recipe's model with random weights that depend on the seed alone."""
    set_seed(seed)
    return recipe.model_class(recipe.config())


def build_trainer(
    recipe: Recipe, args: SSLTrainingArguments, callbacks: list[TrainerCallback] | None = None
) -> SSLTrainer:
    """Everything that training needs: data, model, monitor. Leaves `views.png` in the output folder."""
    source = open_source(recipe.data)
    model = build_model(recipe, args.seed)
    probe = _probe(recipe, source, args)
    if args.should_save:
        first = probe[:_MONTAGE_IMAGES]
        views.montage(views.apply(first.images, first.parameters), recipe.views, Path(args.output_dir) / "views.png")
    monitor = None
    if args.monitor_steps:
        monitor = Monitor(probe, _knn_monitor(recipe, args), torch.bfloat16 if args.bf16 else None)
    return SSLTrainer(model, args, source, recipe.data, monitor, callbacks)


def _probe(recipe: Recipe, source: Source, args: SSLTrainingArguments) -> LoadedBatch:
    """Some training images with fixed views; the seed is another one than that of training."""
    size = min(_PROBE_IMAGES, source.num_rows or _PROBE_IMAGES)
    loader = train_loader(source, recipe.views, config=recipe.data, seed=args.seed + 2**32, batch_size=size)
    return next(iter(loader))


def _knn_monitor(recipe: Recipe, args: SSLTrainingArguments) -> KNNMonitor | None:
    """A k-NN classifier if the evaluation's splits carry labels, else None with a word about it."""
    try:
        bank, queries = labelled_splits(recipe, args.monitor_bank_images, args.monitor_query_images)
    except UserError as error:
        logger.warning("the monitor runs without k-NN: %s", error)
        return None
    processor = image_processor(recipe.views.to_dict(), recipe.data.channels)
    return KNNMonitor(bank, queries, processor, args.monitor_neighbours)


def labelled_splits(
    recipe: Recipe, max_train: int | None = None, max_test: int | None = None
) -> tuple[LabelledImages, LabelledImages]:
    """Labelled images to measure with: of the training data, unless `evaluation.path` says otherwise.

    Raises:
        UserError: there are no labels, or they lie in data that is streamed, which would have to be copied first.
    """
    evaluation, data = recipe.evaluation, replace(recipe.data, max_images=None, streaming=False)
    if evaluation.path is not None:
        data = replace(data, path=evaluation.path, name=None, revision=None, image_column=None, label_column=None)
    elif recipe.data.streaming:
        raise UserError("data that is streamed is not copied to be measured on: give evaluation.path=...")
    data = replace(data, label_column=evaluation.label_column or data.label_column)
    return (
        labelled_images(data, evaluation.train_split, max_images=max_train),
        labelled_images(data, evaluation.test_split, max_images=max_test),
    )


def train(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> SSLTrainer:
    """Train from the start or from the last checkpoint in the output folder; nothing is exported.

    Raises:
        UserError: a mistake in the recipe or the data, a folder that holds another run, a diverged or (with
            `training.on_collapse=stop`) collapsed run.
    """
    args = recipe.training_arguments()
    with args.main_process_first(local=False):
        checkpoint = claim(recipe)
    trainer = build_trainer(recipe, args, callbacks)
    if checkpoint is not None:
        logger.warning("resuming from %s", checkpoint)
    trainer.train(None if checkpoint is None else str(checkpoint))
    if trainer.collapse_message is not None and args.on_collapse == "stop":
        raise UserError(f"{trainer.collapse_message}; the run was stopped (training.on_collapse=stop)")
    return trainer
