# SPDX-License-Identifier: Apache-2.0
"""Builds the model and the trainer of a recipe, and chooses settings for this machine (layer 5)."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from datasets import Dataset, List
from transformers import TrainerCallback, set_seed

from hf_ssl.data import (
    DataConfig,
    LabeledImages,
    Source,
    divided_images,
    holds_small_images,
    labeled_images,
    open_source,
    train_loader,
)
from hf_ssl.data.boxes import object_columns
from hf_ssl.data.config import COLUMN_KINDS
from hf_ssl.data.sources import UnknownSplit
from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.evaluation.protocols import label_kinds
from hf_ssl.evaluation.split_report import report_comparison
from hf_ssl.files import replaced_file
from hf_ssl.hub import image_processor
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.gather import from_first_process
from hf_ssl.modeling.loading import load_weights
from hf_ssl.precision import autocast_dtype
from hf_ssl.progress import progress
from hf_ssl.recipe import Recipe
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.callbacks import VIEWS
from hf_ssl.trainer.epochs import check_epochs
from hf_ssl.trainer.knn import KNNClassifier
from hf_ssl.trainer.machine_settings import (
    MONITOR_IMAGES,
    Choices,
    apply_choices,
    check_batch_size,
    check_images,
    choose_batch_size,
    choose_monitor,
    choose_precision,
    choose_workers,
    free_memory,
)
from hf_ssl.trainer.monitor import Monitor, load_monitor_images
from hf_ssl.trainer.step_cost import MEASURED_IMAGES, measure_step
from hf_ssl.trainer.trainer import SSLTrainer
from hf_ssl.views import montage

logger = logging.getLogger(__name__)

_MONTAGE_IMAGES = 8


def build_model(recipe: Recipe, seed: int, source: Source | None = None) -> SSLPreTrainedModel:
    """Return the recipe's model.

    Its random weights depend on the seed alone. With `backbone.init_from`, the backbone has the weights of
    that encoder.

    Args:
        recipe: the recipe of the model.
        seed: seed of the random weights.
        source: the training data, for a method that stores a state of each image. None opens the data of the
            recipe.
    """
    config: Any = recipe.config()
    if recipe.model_class.stores_images(config):
        config.num_samples = (source or open_source(recipe.data)).num_rows
    set_seed(seed)
    model = recipe.model_class(config)
    if recipe.init_from is not None:
        model.start_from(load_weights(recipe.init_from, "backbone.init_from"))
    return model


def build_trainer(
    recipe: Recipe,
    args: SSLTrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    stored: Choices | None = None,
) -> SSLTrainer:
    """Return a trainer with data, model and monitor. This function writes no files.

    Args:
        recipe: the recipe of the run.
        args: the result of `recipe.training_arguments()`. This function sets every value that is `auto`. It
            also reduces the batch size and the number of monitor images if they are too large for the
            machine.
        callbacks: further transformers callbacks.
        stored: the choices of the earlier part of the run, possibly {}; None for a new run.

    Raises:
        UserError: the data contain a mistake, or contain fewer images than the batch size that the user set.
    """
    with progress(f"opening {recipe.data.path}"):
        source = open_source(recipe.data)
        if not recipe.is_set("data.split") and source.count is not None:
            source.count.require_most_files(recipe.data.split)
        small = holds_small_images(source, recipe.data)
    # The labeled images of the monitor use the range that "auto" found in the training images.
    recipe = replace(recipe, data=source.with_found_range(recipe.data))
    check_images(source)
    stored = from_first_process(stored)
    if stored is not None:
        # The user may change the settings of the monitor. All other stored choices stay the same.
        stored = {
            key: choice
            for key, choice in stored.items()
            if not (key.startswith("training.monitor_") and recipe.is_overridden(key))
        }
        apply_choices(args, stored)
    choices = (stored or {}) | choose_precision(args) | choose_workers(args, small=small)
    if recipe.is_overridden("training.batch_size"):
        check_batch_size(args, source)
    with progress("building the model"):
        model = build_model(recipe, args.seed, source)
    check_epochs(args, model, source, recipe.data)
    knn = _knn_classifier(recipe, args) if args.measures else None
    if stored is None and (args.measures or not recipe.is_overridden("training.batch_size")):
        with progress("measuring a training step"):
            chosen = _choose_sizes(recipe, args, model, source, labeled=knn is not None)
        if "training.monitor_bank_images" in chosen and knn is not None:
            knn = _knn_classifier(recipe, args)
        choices |= chosen
    # A training loader fills the cache, and raises `UserError` for images that it cannot use.
    size, processes = args.per_device_train_batch_size, args.world_size
    train_loader(source, recipe.views, config=recipe.data, seed=0, batch_size=size, world_size=processes)
    monitor = None
    if args.measures:
        count = choices.get("monitor.probe_images", {"value": MONITOR_IMAGES})["value"]
        with progress("loading images for the monitor"):
            images = load_monitor_images(source, recipe.views, recipe.data, args, count)
        monitor = Monitor(images, knn, autocast_dtype(args.precision))
        if knn is not None and args.should_log:
            report_comparison("monitor", knn.bank, knn.tested)
    return SSLTrainer(
        model,
        args,
        train_dataset=source,
        data=recipe.data,
        monitor=monitor,
        callbacks=callbacks,
        choices=choices,
    )


def draw_pictures(recipe: Recipe, trainer: SSLTrainer) -> None:
    """Write `views.png` with augmented views of training images to the output folder.

    During training, the trainer writes the pictures of the method for the same images.
    """
    first = load_monitor_images(trainer.source, recipe.views, recipe.data, trainer.args, _MONTAGE_IMAGES)
    with replaced_file(recipe.output_dir / VIEWS) as path:
        kinds = dict(sorted(recipe.data.further_image_columns.items())).values()
        further = [COLUMN_KINDS[kind] for kind in kinds]
        montage(first.views("cpu"), recipe.views, path, further=further)
    trainer.draw_method_pictures(first)


def open_labeled_splits(
    data: DataConfig, evaluation: EvaluationConfig
) -> tuple[LabeledImages, LabeledImages]:
    """Return the labeled images of the training split and the test split for the evaluation.

    They come from the training data unless `evaluation.path` is set. With `evaluation.test_fraction`, they
    are two parts of the training split.

    Args:
        data: the section `data` of a recipe.
        evaluation: the section `evaluation`.

    Raises:
        UserError: the data have no labels, the training split has one class or lacks a class of the test
            split, or `data.streaming=true` without `evaluation.path`.
    """
    if evaluation.path is None and data.streaming:
        raise UserError(
            "evaluation.path: expected a data set, because the evaluation cannot stream, got none with "
            "data.streaming=true; set evaluation.path=..."
        )
    data = evaluation.data(data)
    with progress(f"opening {data.path}"), _keys_of_evaluation(evaluation):
        train, test = _open_parts(data, evaluation)
    test.classified_by(train)
    expected = f"at least 2 images in {test.description}"
    check_values("evaluation", ("test_split", len(test), len(test) >= 2, expected, "another split"))
    return train, test


def _open_parts(data: DataConfig, evaluation: EvaluationConfig) -> tuple[LabeledImages, LabeledImages]:
    """Return the training images and the test images, whose classes can have different numbers."""
    kinds = label_kinds(evaluation.protocols)
    limits = (evaluation.max_train_images, evaluation.max_test_images)
    split, fraction = evaluation.train_split, evaluation.test_fraction
    key = "evaluation.train_split"
    try:
        if fraction is not None:
            names = evaluation.split_names
            return divided_images(data, split, fraction, names, limits=limits, kinds=kinds)
        train = labeled_images(data, split, max_images=limits[0], kinds=kinds)
        data = replace(data, value_range=train.value_range)  # that "auto" found
        key = "evaluation.test_split"
        return train, labeled_images(data, evaluation.test_split, max_images=limits[1], kinds=kinds)
    except UnknownSplit as error:
        advice = f"{key}={error.splits[0]}"
        if key == "evaluation.test_split":
            advice = f"{key}=NAME, or evaluation.test_fraction=0.2 for a part of {split}"
        raise UnknownSplit(error.splits, error.path, error.split, key, advice) from error


@contextmanager
def _keys_of_evaluation(evaluation: EvaluationConfig) -> Iterator[None]:
    """Name the keys of the section `evaluation` in messages about columns, if `evaluation.path` is set."""
    try:
        yield
    except UserError as error:
        if evaluation.path is None:
            raise
        keys = r"\bdata\.(?=(path|image_column|label_column)\b)"
        raise UserError(re.sub(keys, "evaluation.", str(error))) from error


def has_label_lists(data: DataConfig, evaluation: EvaluationConfig) -> bool:
    """Return whether the images of the evaluation can have several labels, without reading the labels.

    Boxes are several labels, too. If the data cannot be opened, the result is False, and the evaluation
    reports the reason later.

    Args:
        data: the section `data` of a recipe.
        evaluation: the section `evaluation`.
    """
    streams = evaluation.path is None and data.streaming
    data = evaluation.data(data)
    if streams:
        return False
    try:
        source = open_source(data, evaluation.train_split, labels=True, only_image=True)
    except UserError:
        return False
    if not isinstance(source.dataset, Dataset):
        return False
    features, column = source.dataset.features, source.label_column
    return isinstance(features[column], List) or column in object_columns(features)


def _choose_sizes(
    recipe: Recipe, args: SSLTrainingArguments, model: SSLPreTrainedModel, source: Source, *, labeled: bool
) -> Choices:
    """Measure a step, choose the batch size and the number of monitor images, and return the choices.

    A batch size that the user set on the command line does not change.
    """
    if not source.streaming:
        # The first call fills the cache (`data.cache`) before the time is measured.
        load_monitor_images(source, recipe.views, recipe.data, args, 1)
    start = time.process_time()
    batch = load_monitor_images(source, recipe.views, recipe.data, args, MEASURED_IMAGES)
    load_seconds = (time.process_time() - start) / len(batch)
    cost = measure_step(model, batch, load_seconds, args, free_memory(args.device))
    logger.debug("a step costs %s", cost)
    choices: Choices = {}
    free = free_memory(args.device)
    if not recipe.is_overridden("training.batch_size"):
        wanted = args.batch_size
        choices |= choose_batch_size(args, cost, source.num_rows, free_bytes=free)
        if "training.batch_size" in choices and args.should_log:
            logger.warning(
                "training.batch_size: reduced from %d to %d because %s; the learning rate is %.3g "
                "(training.learning_rate_rule=%s); to keep the recipe's value, set training.batch_size=%d",
                wanted,
                args.batch_size,
                choices["training.batch_size"]["reason"],
                args.learning_rate,
                args.learning_rate_rule,
                wanted,
            )
    elif args.should_log and cost.needed_bytes(args) > free:
        logger.warning(
            "training.batch_size: %d images need about %.1f GiB, and %.1f GiB are free; "
            "for less memory, set training.contrastive_chunk_size=32 or training.gradient_accumulation_steps",
            args.batch_size, cost.needed_bytes(args) / 2**30, free / 2**30,
        )  # fmt: skip
    if args.measures:
        overridden = {name for name in recipe.training if recipe.is_overridden(f"training.{name}")}
        choices |= choose_monitor(args, cost, source.num_rows, labeled=labeled, overridden=overridden)
    return choices


def _knn_classifier(recipe: Recipe, args: SSLTrainingArguments) -> KNNClassifier | None:
    """Return a k-NN classifier. Without labels in the evaluation splits, log a warning and return None."""
    bank_size, query_size = args.monitor_bank_images, args.monitor_query_images
    evaluation = replace(recipe.evaluation, max_train_images=bank_size, max_test_images=query_size)
    processor = image_processor(recipe.views, recipe.data.channels)
    try:
        bank, queries = open_labeled_splits(recipe.data, evaluation)
        return KNNClassifier(
            bank, queries, processor, args.monitor_neighbors, args.per_device_eval_batch_size,
            args.monitor_projector,
        )  # fmt: skip
    except UserError as error:
        logger.warning("the monitor measures no k-NN accuracy: %s", error)
        return None
