# SPDX-License-Identifier: Apache-2.0
"""Trains, exports, evaluates and documents an encoder (layer 5).

The command line, scripts and notebooks all use these functions.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_ssl.building import build_model, build_trainer, draw_pictures, has_label_lists, open_labeled_splits
from hf_ssl.cards import append_result, remove_private, write_card, write_facts
from hf_ssl.cards.result_files import EVALUATED, EVALUATION, with_trained_reading
from hf_ssl.cards.text import ENCODERS, terminal_text
from hf_ssl.data import DataConfig, LabeledImages
from hf_ssl.data.targets import TARGETS
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation import (
    EncoderResult,
    EvaluationConfig,
    evaluate_encoder,
    evaluate_pixels,
    fastest_device,
    load_encoder,
)
from hf_ssl.evaluation.evaluate import check_protocols
from hf_ssl.evaluation.plots import write_plots
from hf_ssl.evaluation.protocols import DEFAULT_PROTOCOLS, PROTOCOLS, uses_image_labels
from hf_ssl.files import disk_errors_as_user_errors, write_json
from hf_ssl.modeling.backbones import with_new_weights
from hf_ssl.modeling.gather import (
    finish_communication,
    from_every_process,
    joined_processes,
    process_rank,
    wait_for_all,
)
from hf_ssl.output_folder import (
    is_finished,
    last_checkpoint,
    mark_output_folder,
    only_command,
    stored_choices,
    stored_revision,
)
from hf_ssl.progress import hidden_progress, progress
from hf_ssl.projector import LAYERS, load_projected_encoder, projector_settings
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recording import EvaluationOutcome, collect_facts, evaluated_encoder, evaluation_facts
from hf_ssl.trainer.trainer import SSLTrainer

logger = logging.getLogger(__name__)


def train(recipe: Recipe, callbacks: list[TrainerCallback] | None = None) -> SSLTrainer:
    """Train a recipe, and return the trainer. Nothing is exported.

    The run resumes from the last checkpoint in the output folder, if there is one.

    Args:
        recipe: the result of `hf_ssl.recipe.load_recipe`.
        callbacks: further transformers callbacks.

    Raises:
        UserError: the recipe or the data contain a mistake, or the folder contains another run. This error
            is also raised for a loss that is not finite, and if `training.on_collapse=stop` or
            `training.on_worse=stop` stopped the run.
        SystemExit, KeyboardInterrupt: the process received SIGTERM or Ctrl-C, and a checkpoint was saved.
    """
    args = recipe.training_arguments()
    with hidden_progress(args.hides_progress):
        checkpoint = last_checkpoint(recipe)
        stored = None if checkpoint is None else stored_choices(recipe)
        trainer = build_trainer(recipe, args, callbacks, stored)
        if trainer.source.count is not None and args.should_log:
            print(trainer.source.count)
        finished = checkpoint is not None and is_finished(checkpoint)
        if checkpoint is not None and not finished and args.should_log:
            _report_changed_images(recipe, trainer)
        wait_for_all()  # no process may write before all processes have read the folder
        with only_command(recipe.output_dir) if args.should_save else nullcontext():
            if args.should_save:
                mark_output_folder(recipe, trainer.choices, trainer.source.revision)
                with progress("drawing views.png"):
                    draw_pictures(recipe, trainer)
            if checkpoint is not None and finished:
                trainer.load_finished(checkpoint)
                for alarm in trainer.alarms:
                    alarm.message = alarm.last_message(trainer.state.log_history)
            else:
                if checkpoint is not None:
                    logger.warning("resuming from %s", checkpoint)
                trainer.train(None if checkpoint is None else str(checkpoint))
        if trainer.stop_reason is not None:
            raise UserError(trainer.stop_reason)
        return trainer


def _report_changed_images(recipe: Recipe, trainer: SSLTrainer) -> None:
    """Log a warning if the images changed since the earlier part of the run."""
    before, now = stored_revision(recipe), trainer.source.revision
    if before is not None and before != now:
        logger.warning(
            "data.path: the images in %s changed since the last part of the run (revision %s, now %s); "
            "the run resumes, but not exactly, because their order changed too",
            trainer.source.description, before, now,
        )  # fmt: skip


def pretrain(recipe: Recipe) -> dict[str, Any]:
    """Train, export and evaluate an encoder, and write its facts, results and card.

    Args:
        recipe: the result of `hf_ssl.recipe.load_recipe`.

    Returns:
        The facts of the run (`hf_ssl.cards.Facts`), which `facts.json` also contains. The result is empty in
        all processes but the main one.

    Raises:
        UserError: see `train`. The error is also raised if the disk is full.
    """
    transformers_logging.disable_progress_bar()  # hides the bars of loading and saving files
    several = has_label_lists(recipe.data, recipe.evaluation)
    chosen = recipe.is_overridden("evaluation.protocols")
    recipe = replace(recipe, evaluation=protocols_for_labels(recipe.evaluation, several, chosen))
    trainer = train(recipe)
    folder = recipe.output_dir
    with hidden_progress(trainer.args.hides_progress):
        with progress(f"exporting the encoder to {folder}"):
            trainer.save_model()
        trainer.broken.merge(from_every_process(trainer.broken.state_dict()))  # each one reads other images
        # A process may abort if it ends before its process group. Only the processes that write continue.
        finish_communication()
        trainer.accelerator.end_training()
        if not trainer.args.should_save:
            return {}
        measured = evaluate_run(recipe, trainer, folder)
        with progress("writing the card"):
            write_plots(folder, measured.results, ENCODERS, measured.test)
            facts = collect_facts(recipe, trainer, measured)
            write_facts(folder, facts)
            results = Path(recipe.evaluation.results_dir or folder / "results").expanduser()
            append_result(results, recipe.name, facts)
            write_card(folder, facts)
        if measured.results:
            print(terminal_text(measured.results))
        print(f"encoder, card and pictures are in {folder}")
        if trainer.args.push_to_hub and trainer.is_world_process_zero():
            trainer.publish_output()
        return dict(facts)


def protocols_for_labels(evaluation: EvaluationConfig, several: bool, chosen: bool) -> EvaluationConfig:
    """Return the settings of an evaluation with protocols for these labels, and log a changed setting.

    Args:
        evaluation: the settings.
        several: whether an image can have several labels.
        chosen: whether the user chose the protocols.

    Raises:
        UserError: the user chose protocols, and none of these protocols accepts the labels.
    """
    fitting = evaluation.for_labels(several, chosen)
    if fitting is not evaluation:
        logger.warning(
            "evaluation.protocols: %s replaces %s, because the images have several labels",
            ", ".join(fitting.protocols), ", ".join(evaluation.protocols),
        )  # fmt: skip
    if several:
        check_protocols(fitting, {"several", "boxes", *TARGETS})
    return fitting


def evaluate_run(recipe: Recipe, trainer: SSLTrainer, folder: Path) -> EvaluationOutcome:
    """Evaluate the exported encoder in `folder`, the encoder before training, and raw pixels.

    If the evaluation is not possible, log a warning and return the reason.
    """
    try:
        splits = open_labeled_splits(trainer.data, recipe.evaluation)
        return _evaluate_splits(recipe, trainer, folder, *splits)
    except UserError as error:
        logger.warning("the encoder is not evaluated; use hf-ssl evaluate later: %s", error)
        return EvaluationOutcome(skip_reason=str(error))


def _evaluate_splits(
    recipe: Recipe, trainer: SSLTrainer, folder: Path, train: LabeledImages, test: LabeledImages
) -> EvaluationOutcome:
    splits, evaluation = (train, test), recipe.evaluation
    encoder, processor = load_encoder(str(folder))
    options: dict[str, Any] = {
        "processor": processor, "device": trainer.args.device, "preset": recipe.views
    }  # fmt: skip
    results = {
        "trained": evaluate_encoder(encoder, *splits, evaluation, description="trained encoder", **options)
    }
    results |= _baselines(
        "untrained" if recipe.init_from is None else "start",
        lambda: build_model(recipe, trainer.args.seed, trainer.source).exported_encoder,
        evaluation.protocols,
        evaluation,
        splits,
        description="encoder before training",
        **options,
    )
    return EvaluationOutcome(results=results, train=train, test=test)


def _baselines(
    key: str,
    initial_encoder: Callable[[], Any],
    names: Sequence[str],
    evaluation: EvaluationConfig,
    splits: tuple[LabeledImages, LabeledImages],
    **options: Any,
) -> dict[str, EncoderResult]:
    """Return the results of an encoder before training, and of raw pixels if a protocol measures them.

    If one of the two cannot be measured, log a warning.

    Args:
        key: key of the encoder in the result.
        initial_encoder: returns the encoder.
        names: the protocols of the encoder. It is not evaluated without any.
        evaluation: settings of the evaluation. With `baselines=false`, the result is {}.
        splits: the images.
        options: further arguments of `evaluate_encoder`.
    """
    if not evaluation.baselines:
        return {}
    measure: dict[str, Callable[[], EncoderResult]] = {}
    if names:
        settings = replace(evaluation, protocols=list(names), cache=False)  # the weights are evaluated once
        measure[key] = lambda: evaluate_encoder(initial_encoder(), *splits, settings, **options)
    of_pixels = [PROTOCOLS[name] for name in evaluation.protocols if PROTOCOLS[name].of_pixels]
    if any(splits[0].kinds & splits[1].kinds & set(protocol.labels) for protocol in of_pixels):
        measure["raw_pixels"] = lambda: evaluate_pixels(evaluation, *splits)
    results = {}
    for name, measured in measure.items():
        try:
            results[name] = measured()
        except UserError as error:  # the numbers of the encoder stay
            logger.warning("%s: not measured: %s", ENCODERS[name], error)
    return results


def evaluate(
    model: str,
    data: DataConfig,
    evaluation: EvaluationConfig,
    output: Path | None = None,
    layer: str = "encoder",
    chosen: bool | None = None,
) -> dict[str, Any]:
    """Evaluate a vision encoder of transformers on labeled images, print a table and return the result.

    The evaluation uses the accelerator if there is one. Under torchrun or accelerate launch, the processes
    share the extraction of features and the trainings of the encoder. Up to rounding, the result equals that
    of one process.

    Args:
        model: a folder or the Hub id of an encoder with its image processor.
        data: the images, unless `evaluation.path` is set. `streaming` has no effect.
        evaluation: settings of the evaluation.
        output: folder for the results as `results.json` and for their pictures; None: no files.
        layer: "projector" also evaluates the projector's output, if `model` is an output folder.
        chosen: whether the user chose the protocols, which then stay also for images with several labels;
            None: they are chosen if they are not the default ones.

    Raises:
        UserError: the encoder cannot be loaded, the data have no labels, or a file cannot be written.
    """
    transformers_logging.disable_progress_bar()
    if output is not None:
        with disk_errors_as_user_errors(str(output)):
            output.mkdir(parents=True, exist_ok=True)
    with joined_processes(fastest_device().type):
        is_main = process_rank() == 0
        with hidden_progress(not is_main):
            results, evaluated, test = _evaluate(model, data, evaluation, layer, chosen)
    if is_main:
        print(terminal_text(results))
        print(f"revision of the images: {test.revision}")
    if is_main and output is not None:
        # A number that is not finite becomes null, so that the others are kept.
        write_json(output / EVALUATION, remove_private(results) | {EVALUATED: evaluated})
        written = write_plots(output, results, ENCODERS, test)
        print(f"{', '.join([EVALUATION, *written])} in {output}")
    return dict(results)


def _evaluate(
    model: str, data: DataConfig, evaluation: EvaluationConfig, layer: str, chosen: bool | None
) -> tuple[dict[str, EncoderResult], dict[str, Any], LabeledImages]:
    """Return the results of `evaluate`, the entry of `evaluated_encoder`, and the test images."""
    check_name("--layer", layer, LAYERS, "encoder or projector")
    with progress(f"loading {model}"):
        encoder, processor = load_encoder(model)
        projected = load_projected_encoder(model) if layer == "projector" else None
    # As for `eval_dataset`: these data are meant for the evaluation, which reads them without streaming.
    data = with_trained_reading(replace(data, streaming=False), model)
    splits = open_labeled_splits(data, evaluation)
    if chosen is None:
        chosen = list(evaluation.protocols) != list(DEFAULT_PROTOCOLS)
    evaluation = protocols_for_labels(evaluation, splits[0].has_several_labels, chosen)
    of_projector = (
        evaluation if projected is None else projector_settings(evaluation)
    )  # raises an error early
    device = fastest_device()
    measured = evaluate_encoder(encoder, *splits, evaluation, processor, device=device, description=model)
    results = {"encoder": measured}
    if projected is not None:
        words = f"{model}, projector"
        results["projector"] = evaluate_encoder(
            projected, *splits, of_projector, processor, device=device, description=words
        )
    kinds = splits[0].kinds & splits[1].kinds
    # Raw pixels are not a baseline for protocols of boxes and masks, which need feature maps.
    of_positions = [
        name
        for name in evaluation.protocols
        if kinds & set(PROTOCOLS[name].labels) and not uses_image_labels(name)
    ]
    results |= _baselines(
        "untrained",
        lambda: with_new_weights(encoder, evaluation.seed),
        of_positions,
        evaluation,
        splits,
        processor=processor,
        device=device,
        description=f"{model} without training",
    )
    images = evaluation_facts(data, evaluation, *splits)
    evaluated = evaluated_encoder(model, encoder, images, measured["image_size"], device)
    return results, evaluated, splits[1]


def demo(overrides: list[str], space: bool = False) -> dict[str, Any]:
    """Run `hf-ssl demo`: pretrain on the handwritten digits of scikit-learn, and return the facts.

    The demo needs no network and takes some minutes.

    Args:
        overrides: `section.key=value` for the recipe `demo`.
        space: whether to serve a page that demonstrates the encoder at the end, until Ctrl-C.
    """
    recipe = load_recipe("demo", overrides)
    print("pretraining on 8 x 8 pixel handwritten digits that come with scikit-learn; no labels are used")
    facts = pretrain(recipe)
    print(
        "With all labels, raw pixels of such small digits also reach an accuracy of about 0.98. "
        "The benefit of pretraining appears with few labels."
    )
    if space:
        serve_digits(recipe.output_dir, recipe.data, recipe.evaluation.test_split)
    return facts


def serve_digits(output: Path, data: DataConfig, examples_split: str) -> None:
    """Build the Space of the demo's encoder in its output folder and serve it until Ctrl-C.

    If packages for the Space are missing, the function only prints a message, because the training is
    complete.
    """
    from hf_ssl.space.serve import check_packages, run_space

    try:
        check_packages()
    except UserError as error:
        print(f"the page is not shown: {error}")
        return
    from hf_ssl.space.build import build_space  # imported here because it loads faiss

    space = output / "_space"  # publishing a run omits names with a leading underscore
    build_space(str(output), space, data, examples_split=examples_split, title="Handwritten digits")
    run_space(space)
