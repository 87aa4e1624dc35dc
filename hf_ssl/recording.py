# SPDX-License-Identifier: Apache-2.0
"""Collects the facts of a run (layer 5)."""

import math
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import torch

from hf_ssl import __version__
from hf_ssl.cards import Facts, environment, last_part, remove_private
from hf_ssl.cards.facts import (
    BackboneFacts,
    DataFacts,
    EvaluationFacts,
    MethodFacts,
    MonitorFacts,
    RecipeFacts,
    TrainingFacts,
)
from hf_ssl.cards.privacy import encoder_name, folder_name
from hf_ssl.cards.result_files import recorded_training
from hf_ssl.data import DataConfig, LabeledImages
from hf_ssl.data.inspection import FOUND_VALUES
from hf_ssl.data.location import DIGITS, locate
from hf_ssl.evaluation import EncoderResult, EvaluationConfig, plots
from hf_ssl.evaluation.feature_cache import encoder_fingerprint
from hf_ssl.files import local_folder
from hf_ssl.methods import METHODS
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.configuration import SSLConfig
from hf_ssl.modeling.encoder_parts import describe_views
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.modeling.pooling import pooling_rule
from hf_ssl.recipe import Recipe
from hf_ssl.trainer.alarms import monitor_records
from hf_ssl.trainer.callbacks import CURVES, VIEWS
from hf_ssl.trainer.trainer import SSLTrainer


@dataclass
class EvaluationOutcome:
    """The evaluation results of each encoder and the evaluated images, or the reason for no evaluation."""

    results: dict[str, EncoderResult] = field(default_factory=dict)
    train: LabeledImages | None = None
    test: LabeledImages | None = None
    skip_reason: str | None = None


def collect_facts(recipe: Recipe, trainer: SSLTrainer, measured: EvaluationOutcome) -> Facts:
    """Return all facts of a run; this is the only place that fills them."""
    method = METHODS[recipe.method["name"]]
    folder = recipe.output_dir
    data = _data_facts(recipe, trainer)
    backbone = _backbone_facts(recipe, trainer, measured)
    repo_id = trainer.hub_model_id or recipe.publish.repo_id
    captions = {
        VIEWS: _views_caption(recipe),
        **{f"{name}.png": text for name, text in method.captions.items()},
        CURVES: "Training curves: logged values and measurements of the monitor.",
        **plots.CAPTIONS,
    }
    return Facts(
        hf_ssl_version=__version__,
        date=current_date(),
        name=repo_id or folder_name(folder),
        repo_id=repo_id,
        title=recipe.publish.title or f"{method.title} {backbone['class_name']} on {data['name']}",
        license=recipe.publish.license,
        tags=list(recipe.publish.tags),
        method=_method_facts(recipe, trainer),
        backbone=backbone,
        recipe=RecipeFacts(
            name=recipe.name,
            sections=recipe.to_dict(),
            overrides=list(recipe.overrides),
            differences=recipe.differences() | _chosen_batch_size(trainer) | _chosen_range(recipe, trainer),
        ),
        views=recipe.views.to_dict(),
        data=data,
        training=_training_facts(recipe, trainer),
        monitor=_monitor_facts(trainer),
        environment=trainer.machine_of_training()["environment"],
        evaluation=None
        if measured.train is None or measured.test is None
        else evaluation_facts(recipe.data, recipe.evaluation, measured.train, measured.test),
        unmeasured=measured.skip_reason,
        results=measured.results,
        pictures={name: text for name, text in captions.items() if (folder / name).exists()},
        notes=[],
    )


def _views_caption(recipe: Recipe) -> str:
    caption, further = (
        "Augmented views of training images, one image per row",
        recipe.data.further_image_columns,
    )
    return f"{caption}, with the columns {', '.join(sorted(further))}." if further else f"{caption}."


def _chosen_batch_size(trainer: SSLTrainer) -> dict[str, Any]:
    """Return {"training.batch_size": size} if hf_ssl reduced the batch size on this machine, else {}."""
    key = "training.batch_size"
    return {key: trainer.choices[key]["value"]} if key in trainer.choices else {}


def _chosen_range(recipe: Recipe, trainer: SSLTrainer) -> dict[str, Any]:
    """Return {"data.value_range": values} if hf_ssl chose the values, else {}."""
    values = trainer.source.value_range
    return (
        {"data.value_range": None if values is None else list(values)}
        if recipe.data.value_range == "auto"
        else {}
    )


def _method_facts(recipe: Recipe, trainer: SSLTrainer) -> MethodFacts:
    method, config = METHODS[recipe.method["name"]], trainer.method.config
    own = {item.name for item in fields(config)} - {item.name for item in fields(SSLConfig)}
    return MethodFacts(
        name=recipe.method["name"],
        title=method.title,
        summary=method.summary,
        paper=method.paper,
        config={name: getattr(config, name) for name in sorted(own)},
    )


def _backbone_facts(recipe: Recipe, trainer: SSLTrainer, measured: EvaluationOutcome) -> BackboneFacts:
    encoder = trainer.method.exported_encoder
    if measured.results:
        pooling = measured.results["trained"]["pooling"]
    else:
        side = recipe.views.final_size
        image = torch.zeros(1, recipe.data.channels, side, side, device=trainer.args.device)
        with evaluation_mode(encoder):
            pooling = pooling_rule(encoder, encoder(pixel_values=image))
    joined = encoder if isinstance(encoder, ParallelEncoders) else None
    return BackboneFacts(
        class_name=type(encoder if joined is None else joined.parts[0]).__name__,
        model_type=encoder.config.model_type,
        config={key: value for key, value in recipe.backbone.items() if key != "model_type"},
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        feature_size=feature_size(encoder),
        image_size=recipe.views.final_size,
        channels=recipe.data.channels,
        pooling=pooling,
        parts=None if joined is None else describe_views(joined.views),
        base_model=None if recipe.init_from is None or local_folder(recipe.init_from) else recipe.init_from,
    )


def _data_facts(recipe: Recipe, trainer: SSLTrainer) -> DataFacts:
    name, hub_id = public_name(recipe.data)
    source = trainer.source
    found = source.cache.get(FOUND_VALUES)
    return DataFacts(
        name=name,
        hub_id=hub_id,
        config=recipe.data.name,
        split=recipe.data.split,
        revision=source.revision,
        images=source.num_rows,
        streaming=source.streaming,
        broken=trainer.broken.broken,
        license=source.dataset.info.license or None,
        further_columns=dict(source.further_columns),
        value_range=None if found is None else list(found.limits),
        found_values=None if found is None else list(found.found),
    )


def _training_facts(recipe: Recipe, trainer: SSLTrainer) -> TrainingFacts:
    args, state, machine = trainer.args, trainer.state, trainer.machine_of_training()
    images, rows = trainer.images_seen, trainer.source.num_rows
    micro_batch = args.batch_size // args.gradient_accumulation_steps  # of all processes
    seconds = trainer.stopwatch.seconds
    losses = [record["loss"] for record in state.log_history if "loss" in record]
    memory = [record["memory_gib"] for record in state.log_history if "memory_gib" in record]
    return TrainingFacts(
        steps=state.global_step,
        epochs=None if rows is None else images / (rows // micro_batch * micro_batch),
        batch_size=args.batch_size,
        images_seen=images,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        learning_rate_rule=args.learning_rate_rule,
        weight_decay=args.weight_decay,
        precision=machine["precision"],
        processes=machine["processes"],
        seed=args.seed,
        seconds=seconds,
        images_per_second=images / seconds if seconds else 0.0,
        final_loss=losses[-1] if losses and math.isfinite(losses[-1]) else None,
        resumed=trainer.resumed,
        choices={key: dict(choice) for key, choice in trainer.choices.items()},
        selection=args.metric_for_best_model if args.load_best_model_at_end else None,
        earlier=machine.get("earlier", []),  # older versions did not store it
        peak_memory_gib=max(memory, default=None),
    )


def _monitor_facts(trainer: SSLTrainer) -> MonitorFacts:
    history = [
        {key.removeprefix("eval_"): value for key, value in record.items() if key != "epoch"}
        for record in monitor_records(trainer.state.log_history)
    ]
    knn = trainer.monitor.knn if trainer.monitor is not None else None
    return MonitorFacts(
        history=history,
        alarm=trainer.collapse_alarm.last_message(trainer.state.log_history),
        test_images=None if knn is None else len(knn.tested),
    )


def evaluation_facts(
    data: DataConfig, evaluation: EvaluationConfig, train: LabeledImages, test: LabeledImages
) -> EvaluationFacts:
    """Return the facts of the labeled images.

    Args:
        data: the section `data`.
        evaluation: the section `evaluation`.
        train, test: the images.
    """
    data = evaluation.data(data)
    name, hub_id = public_name(data)
    train_split, test_split = evaluation.split_names
    return EvaluationFacts(
        name=name,
        hub_id=hub_id,
        config=data.name,
        revision=test.revision,
        train_split=train_split,
        test_split=test_split,
        broken=len(train.broken) + len(test.broken),
        shared=test.shared_with(train),
        unknown_classes=test.unknown_to(train),
    )


def evaluated_encoder(
    model: str, encoder: Any, evaluation: EvaluationFacts, image_size: int, device: torch.device
) -> dict[str, Any]:
    """Return the entry of an evaluated encoder (see `hf_ssl.cards.result_files`) without its results.

    If the encoder is in the output folder of a run, the entry contains the facts of its training.

    Args:
        model: folder or Hub id of the encoder.
        encoder: the encoder.
        evaluation: the labeled images.
        image_size: side in pixels of the images from the image processor.
        device: device of the evaluation.
    """
    folder = local_folder(model)
    entry: dict[str, Any] = {
        "date": current_date(),
        "hf_ssl_version": __version__,
        "model": encoder_name(model),
        "weights": encoder_fingerprint(encoder),
        "recipe": None,
        "overrides": [],
        "seed": None,
        "method": None,
        "backbone": encoder_facts(encoder, image_size),
        "data": None,
        "training": None,
        "collapse": None,
        "environment": environment(device),
        "evaluation": evaluation,
    }
    plain: dict[str, Any] = remove_private(entry | ({} if folder is None else recorded_training(folder)))
    return plain


def encoder_facts(encoder: Any, image_size: int) -> dict[str, Any]:
    """Return the facts of an encoder that distinguish runs: class, number of parameters, image size."""
    part = encoder.parts[0] if isinstance(encoder, ParallelEncoders) else encoder
    return {
        "class_name": type(part).__name__,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "image_size": image_size,
    }


def current_date() -> str:
    """Return the date and the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def public_name(data: DataConfig) -> tuple[str, str | None]:
    """Return the public part of the data's path, and the Hub id if the path is one.

    A local folder with the name of the built-in data set begins with "./".
    """
    kind, name = locate(data.path).kind, last_part(data.path)
    if kind == "hub":
        return data.path, data.path
    return (f"./{name}" if kind == "local" and name == DIGITS else name), None
