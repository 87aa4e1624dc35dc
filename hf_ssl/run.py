# SPDX-License-Identifier: Apache-2.0
"""The main job, one way for the command line, scripts and notebooks: train, export, evaluate, describe
(layer 5).
"""

import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from hf_ssl.data import (
    DataConfig,
    LabelledImages,
    LoadedBatch,
    Source,
    labelled_images,
    open_source,
    train_loader,
)
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    EvaluationConfig,
    evaluate_encoder,
    evaluate_pixels,
    fastest_device,
    load_encoder,
    load_weights,
)
from hf_ssl.hub import append_result, image_processor, write_card, write_facts
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.gather import wait_for_all
from hf_ssl.output_folder import claim, is_last, last_checkpoint
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recording import Measured, collect_facts, results_table
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.guard import FeatureGuard
from hf_ssl.trainer.monitor import KNNMonitor, Monitor
from hf_ssl.trainer.pictures import MethodPictures
from hf_ssl.trainer.trainer import SSLTrainer
from hf_ssl.views import montage

logger = logging.getLogger(__name__)

_PROBE_IMAGES = 512
_MONTAGE_IMAGES = 8


def build_model(recipe: Recipe, seed: int, source: Source | None = None) -> SSLPreTrainedModel:
    """The recipe's model with random weights that depend on the seed alone, or with those of the encoder
    `backbone.init_from`.

    Args:
        recipe: what to build.
        seed: of the weights.
        source: the training data, for a method that has a place for each image; None opens the recipe's.
    """
    config: Any = recipe.config()
    if recipe.model_class.needs_sample_index:
        config.num_samples = (source or open_source(recipe.data)).num_rows
    set_seed(seed)
    model = recipe.model_class(config)
    if recipe.init_from is not None:
        model.start_from(load_weights(recipe.init_from))
    return model


def build_trainer(
    recipe: Recipe, args: SSLTrainingArguments, callbacks: list[TrainerCallback] | None = None
) -> SSLTrainer:
    """Everything that training needs: data, model, monitor. Mistakes in the data are found before anything is
    written.
    """
    source = open_source(recipe.data)
    batch_size, processes = args.per_device_train_batch_size, args.world_size
    train_loader(
        source, recipe.views, config=recipe.data, seed=0, batch_size=batch_size, world_size=processes
    )  # checks that there are enough images, and keeps the decoded ones for later
    model = build_model(recipe, args.seed, source)
    monitor = None
    if args.monitor_steps:
        probe = _probe(recipe, source, args)
        monitor = Monitor(probe, _knn_monitor(recipe, args), torch.bfloat16 if args.bf16 else None)
    trainer = SSLTrainer(model, args, source, recipe.data, monitor, callbacks)
    if recipe.init_from is not None and monitor is not None and monitor.knn is not None:
        trainer.add_callback(FeatureGuard(len(monitor.knn.queries)))
    return trainer


def draw_pictures(recipe: Recipe, trainer: SSLTrainer) -> None:
    """Leave `views.png` in the output folder, what the network is going to see; the trainer will leave the
    method's own pictures of the same images.
    """
    first = _probe(recipe, trainer.source, trainer.args)[:_MONTAGE_IMAGES]
    montage(first.views("cpu"), recipe.views, Path(recipe.training["output_dir"]) / "views.png")
    trainer.add_callback(MethodPictures(trainer.method, first, recipe.views))


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
        UserError: there are no labels, or they lie in data that is streamed, which would have to be copied
        first.
    """
    return _splits(recipe.data, recipe.evaluation, max_train, max_test)


def _splits(
    data: DataConfig, evaluation: EvaluationConfig, max_train: int | None, max_test: int | None
) -> tuple[LabelledImages, LabelledImages]:
    if evaluation.path is not None:
        data = replace(
            data, path=evaluation.path, name=None, revision=None, image_column=None, label_column=None
        )
    elif data.streaming:
        raise UserError("data that is streamed is not copied to be measured on: give evaluation.path=...")
    label_column = evaluation.label_column or data.label_column
    data = replace(data, label_column=label_column, max_images=None, streaming=False)
    return (
        labelled_images(data, evaluation.train_split, max_images=max_train),
        labelled_images(data, evaluation.test_split, max_images=max_test),
    )


def train(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> SSLTrainer:
    """Train from the start, or go on from the last checkpoint in the output folder; nothing is exported.

    Raises:
        UserError: a mistake in the recipe or the data, a folder that holds another run, a diverged or (with
            `training.on_collapse=stop`) collapsed run.
        SystemExit: the process got SIGTERM; a checkpoint was saved.
    """
    args = recipe.training_arguments()
    checkpoint = last_checkpoint(recipe)
    trainer = build_trainer(recipe, args, callbacks)
    wait_for_all()  # nobody writes before everybody has looked
    if args.should_save:
        claim(recipe)
        draw_pictures(recipe, trainer)
    if checkpoint is not None and is_last(checkpoint):
        trainer.load_finished(checkpoint)
    else:
        if checkpoint is not None:
            logger.warning("going on from %s", checkpoint)
        trainer.train(None if checkpoint is None else str(checkpoint))
    if trainer.collapse_message is not None and args.on_collapse == "stop":
        raise UserError(f"{trainer.collapse_message}; the run was stopped (training.on_collapse=stop)")
    for guard in trainer.callback_handler.callbacks:
        if isinstance(guard, FeatureGuard) and guard.message is not None and args.on_worse == "stop":
            raise UserError(f"{guard.message}; the run was stopped (training.on_worse=stop)")
    if trainer.stop_signal.received:
        logger.warning(
            "stopped by SIGTERM after step %d; the same command goes on", trainer.state.global_step
        )
        raise SystemExit(128 + signal.SIGTERM)
    return trainer


def pretrain(recipe: Recipe) -> dict[str, Any]:
    """The main job: train, export, evaluate the exported encoder, write facts, results and card.

    Args:
        recipe: from `hf_ssl.recipe.load_recipe`.

    Returns:
        The facts of the run (`hf_ssl.hub.Facts`), also in `facts.json`. Empty on other processes than the
        first.

    Raises:
        UserError: as `train`; no space on the disk.
    """
    transformers_logging.disable_progress_bar()  # of loading and saving files; training has its own
    trainer = train(recipe)
    trainer.save_model()
    # Processes part here: what follows is the first one's work. One that ends with its group alive may abort.
    trainer.accelerator.end_training()
    if not trainer.args.should_save:
        return {}
    folder = Path(recipe.training["output_dir"])
    measured = measure(recipe, trainer, folder)
    facts = collect_facts(recipe, trainer, measured)
    write_facts(folder, facts)
    append_result(recipe.evaluation.results_dir or folder / "results", recipe.name, facts)
    write_card(folder, facts)
    if measured.results:
        print(results_table(measured.results))
    print(f"encoder, card and pictures are in {folder}")
    if trainer.args.push_to_hub:
        trainer.publish_output()
    return dict(facts)


def measure(recipe: Recipe, trainer: SSLTrainer, folder: Path) -> Measured:
    """Evaluate the encoder in `folder` as a stranger loads it, the same encoder as training began
    with it, and raw pixels."""
    try:
        train_images, test_images = labelled_splits(
            recipe, recipe.evaluation.max_train_images, recipe.evaluation.max_test_images
        )
    except UserError as error:
        logger.warning("the encoder is not measured: %s", error)
        return Measured(unmeasured=str(error))
    splits = (train_images, test_images)
    device = trainer.args.device
    encoder, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    results = {
        "trained": evaluate_encoder(
            encoder, processor, recipe.evaluation, *splits, device=device, description="trained encoder"
        )
    }
    if recipe.evaluation.baselines:
        began = build_model(recipe, trainer.args.seed, trainer.source).exported_encoder
        key = "untrained" if recipe.init_from is None else "start"
        results[key] = evaluate_encoder(
            began, processor, recipe.evaluation, *splits, device=device, description="encoder before training"
        )
        results["raw_pixels"] = evaluate_pixels(recipe.evaluation, *splits)
    return Measured(results=results, train=train_images, test=test_images)


def evaluate(model: str, data: DataConfig, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Measure any vision encoder of transformers on labelled images, on the accelerator if there is one;
    print a table and return the result.

    Args:
        model: a folder or the Hub id of an encoder with its image processor.
        data: where the images are, unless `evaluation.path` says otherwise.
        evaluation: the protocol.

    Raises:
        UserError: the encoder cannot be loaded, or the data have no labels.
    """
    transformers_logging.disable_progress_bar()
    encoder, processor = load_encoder(model)
    splits = _splits(data, evaluation, evaluation.max_train_images, evaluation.max_test_images)
    measured = evaluate_encoder(
        encoder, processor, evaluation, *splits, device=fastest_device(), description=model
    )
    results = {"encoder": measured}
    if evaluation.baselines:
        results["raw_pixels"] = evaluate_pixels(evaluation, *splits)
    print(results_table(results))
    print(f"revision of the images: {splits[1].revision}")
    return dict(results)


def demo(overrides: list[str], space: bool = False) -> dict[str, Any]:
    """`hf-ssl demo`: the main job on scikit-learn's handwritten digits, offline, in minutes; with `space`, a
    page that shows the encoder is served at the end, until Ctrl-C."""
    recipe = load_recipe("demo", overrides)
    print("pretraining on 8 x 8 pixel handwritten digits that come with scikit-learn; no labels are used")
    facts = pretrain(recipe)
    print(
        "With all labels even raw pixels of such small digits reach about 0.98, so there is little to gain; "
        "what pretraining brings shows where labels are few."
    )
    if space:
        from hf_ssl.space import serve_digits

        serve_digits(Path(recipe.training["output_dir"]), recipe.data, recipe.evaluation.test_split)
    return facts
