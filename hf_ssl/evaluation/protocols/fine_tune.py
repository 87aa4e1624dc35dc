# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: trains a classifier with labels: all parameters, only the head, or all but the first blocks.

For images with several labels, the loss is the binary cross entropy of each class. The result is the 11-point
mean average precision, as in Ericsson et al., 2021 (arXiv:2011.13377).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_name, check_values, counted
from hf_ssl.evaluation.augmented import AugmentedImages, crop_and_flip
from hf_ssl.evaluation.average_precision import mean_average_precision
from hf_ssl.evaluation.classifiers import ENCODER, NOTHING, new_classifier
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.encoders import pixel_values
from hf_ssl.evaluation.fine_tuning import RECIPES, Optimization, predict, train_classifier
from hf_ssl.evaluation.image_lists import class_sizes, draw_rows, possible_numbers, rows_hash
from hf_ssl.evaluation.inputs import HELD_OUT, Inputs, has_several_labels, hold_out
from hf_ssl.evaluation.label_trainer import OPTIMIZERS, check_rate, training_folder
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import (
    accuracy_result,
    by_setting,
    check_converged,
    is_right,
    metric_words,
    precision_result,
)

VERSION = 1
_WHERE = "evaluation.settings.fine_tune"


@dataclass
class Config:
    """Settings. Those that are null have the value of the recipe.

    Attributes:
        recipe: a key of `RECIPES`.
        freeze: "none": all parameters are trained; "all": only the head; a number K: all but the stem and the
            first K blocks.
        fractions: fractions of the training images whose labels are used, with balanced classes. Each gives a
            result.
        labels_per_class: numbers of labeled images of each class. Each gives a further result.
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        learning_rates: learning rates for this batch size. The best one of several on held-out training
            images is used.
        weight_decay: it does not apply to biases, gains, tokens and position tables.
        layer_decay: factor on the learning rate from each block to the one before it.
        mixup: parameter of the Beta distribution of mixup; 0 mixes no images.
        label_smoothing: probability that is divided among all classes.
        epochs, batch_size, warmup_epochs: settings of the training.
        smallest_crop: smallest fraction of the area of a random crop; 1 disables random crops.
        flip: probability of a horizontal flip.
        folder: folder for checkpoints. An interrupted run resumes, and a finished one is not repeated.
    """

    recipe: str = "simclr"
    freeze: str = NOTHING
    fractions: list[float] = field(default_factory=lambda: [1.0])
    labels_per_class: list[int] = field(default_factory=list)
    optimizer: str | None = None
    learning_rates: list[float] | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    mixup: float | None = None
    label_smoothing: float | None = None
    epochs: int | None = None
    batch_size: int = 256
    warmup_epochs: float | None = None
    smallest_crop: float = 0.08
    flip: float = 0.5
    folder: str | None = None

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        check_name(f"{where}.recipe", self.recipe, RECIPES, "a known recipe")
        if self.optimizer is not None:
            check_name(f"{where}.optimizer", self.optimizer, OPTIMIZERS, " or ".join(OPTIMIZERS))
        fractions, counts = list(self.fractions), list(self.labels_per_class)
        rates = None if self.learning_rates is None else list(self.learning_rates)
        freeze = self.freeze
        recipe = RECIPES[self.recipe]
        check_rate(where, "learning_rates", rates, self.optimizer, self.recipe, recipe.optimizer)
        epochs = min(recipe.epochs.values()) if self.epochs is None else self.epochs
        warmup = recipe.warmup_epochs if self.warmup_epochs is None else self.warmup_epochs
        known = freeze in (NOTHING, ENCODER) or (freeze.isdecimal() and int(freeze) > 0)

        def between(key: str, low: float, high: float, expected: str) -> tuple[Any, ...]:
            value = getattr(self, key)
            return key, value, value is None or low <= value <= high, expected

        check_values(
            where,
            ("freeze", freeze, known, "none, all or a number of blocks"),
            ("fractions", fractions, all(0 < each <= 1 for each in fractions), "numbers above 0, at most 1"),
            ("labels_per_class", counts, all(each > 0 for each in counts), "positive numbers"),
            ("fractions", fractions, bool(fractions or counts), "one or more", "[1]"),
            ("fractions", fractions, len(set(fractions)) == len(fractions), "different numbers"),
            ("labels_per_class", counts, len(set(counts)) == len(counts), "different numbers"),
            ("learning_rates", rates, rates is None or are_positive(rates), "one or more positive numbers"),
            between("weight_decay", 0, 1, "a number between 0 and 1"),
            between("mixup", 0, 100, "a number from 0 to 100"),
            between("label_smoothing", 0, 0.99, "a number from 0 to 0.99"),
            between("layer_decay", 1e-6, 1, "a number above 0, at most 1"),
            between("epochs", 1, 10**6, "a positive number"),
            between("warmup_epochs", 0, 10**6, "a number of at least 0"),
            ("warmup_epochs", warmup, warmup < epochs,
             f"fewer than the {counted(epochs, 'epoch')} of the training", f"{where}.warmup_epochs=0"),
            between("batch_size", 2, 10**6, "at least 2"),
            between("smallest_crop", 1e-6, 1, "a number above 0, at most 1"),
            between("flip", 0, 1, "a probability"),
        )  # fmt: skip

    def optimization(self, fraction: float, images: int) -> tuple[Optimization, list[float]]:
        """Return the settings of a training, and the learning rates to try.

        Args:
            fraction: fraction of the training images that have labels.
            images: number of labeled images.
        """
        recipe = RECIPES[self.recipe]
        batch_size = min(self.batch_size, images)
        rates = self.learning_rates or [rate * batch_size / 256 for rate in recipe.learning_rates]

        def chosen(key: str) -> Any:
            own = getattr(self, key)
            return getattr(recipe, key) if own is None else own

        epochs = next(number for largest, number in recipe.epochs.items() if fraction <= largest)
        keys = ("optimizer", "weight_decay", "layer_decay", "mixup", "label_smoothing", "warmup_epochs")
        settings = Optimization(
            learning_rate=min(rates),
            epochs=epochs if self.epochs is None else self.epochs,
            batch_size=batch_size,
            frozen=self.freeze,
            **{key: chosen(key) for key in keys},
        )
        return settings, sorted(rates)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy after fine-tuning with each fraction and each number of labels.

    For images with several labels, return the mean average precision after fine-tuning with all labels.

    Raises:
        UserError: no fraction or number can be measured, or two of them have equally many labeled images.
    """
    labels = inputs.train.labels
    if has_several_labels(labels):
        _check_several(config)
        return [train_and_test(Task.of(inputs, config), 1.0, np.arange(len(labels)))[1]]
    classes = len(class_sizes(labels))
    counts, fractions = possible_numbers(inputs, "fine_tune", config.labels_per_class, config.fractions)
    wanted = [(fraction, round(fraction * len(labels)), f"fraction {fraction:g}") for fraction in fractions]
    wanted += [(each * classes / len(labels), each * classes, f"{each} per class") for each in counts]
    numbers = [count for _, count, _ in wanted]
    check_values(
        _WHERE,
        ("fractions and labels_per_class", numbers, len(set(numbers)) == len(numbers),
         "different numbers of labeled images", "each number once"),
    )  # fmt: skip
    task = Task.of(inputs, config)

    def measure(fraction: float, count: int, labeled: str) -> ProtocolResult:
        result = train_and_test(task, fraction, draw_rows(labels, count, inputs.seed).numpy())[1]
        if labeled != "fraction 1":
            # The key contains the number of images, which differs between the data sets of a suite.
            result["details"]["labeled"] = labeled
        return result

    return inputs.measure_each(
        "fine-tuning",
        {counted(each[1], "labeled image"): partial(measure, *each) for each in wanted},
    )


def _check_several(config: Config) -> None:
    """Raise UserError for settings that are defined only for images with one label."""
    recipe = RECIPES[config.recipe]
    smoothing = recipe.label_smoothing if config.label_smoothing is None else config.label_smoothing
    fractions, counts = list(config.fractions), list(config.labels_per_class)
    expected = "for images with several labels"
    check_values(
        _WHERE,
        ("fractions", fractions, fractions == [1.0], f"[1.0] {expected}", f"{_WHERE}.fractions=[1.0]"),
        ("labels_per_class", counts, not counts, f"[] {expected}", f"{_WHERE}.labels_per_class=[]"),
        ("label_smoothing", smoothing, not smoothing, f"0 {expected}", f"{_WHERE}.label_smoothing=0"),
    )


class Task(NamedTuple):
    """What all trainings of one evaluation share.

    Attributes:
        inputs: the images and the encoder.
        config: the settings.
        images: the augmented training images.
        pixels: a processed image.
        classes: the class numbers of the training images, sorted. The classifier has one output for each.
        labels: (M,) indices of the training images in `classes`. For images with several labels: (M, K), see
            `Split`.
        native: see `new_classifier`.
    """

    inputs: Inputs
    config: Config
    images: AugmentedImages
    pixels: Tensor
    classes: Tensor
    labels: Tensor
    native: bool = True

    @classmethod
    def of(cls, inputs: Inputs, config: Config, native: bool = True) -> "Task":
        """Return the task of an evaluation."""
        preset = crop_and_flip(inputs.processor, inputs.train.images, config.smallest_crop, config.flip)
        images = AugmentedImages(inputs.train.images, preset, inputs.seed)
        pixels = pixel_values(inputs.processor, images.read(np.array([0])), inputs.device)
        labels = inputs.train.labels
        if has_several_labels(labels):
            classes = torch.arange(labels.shape[1])
        else:
            classes, labels = labels.unique(return_inverse=True)
        return cls(inputs, config, images, pixels, classes, labels, native)

    def train(self, rows: np.ndarray, settings: Optimization, advance: Callable[[int], object]) -> Any:
        """Return a classifier that was trained with the labels of some rows."""
        inputs = self.inputs
        classifier = new_classifier(
            inputs.encoder, len(self.classes), self.pixels, inputs.pooling, native=self.native
        )
        train_classifier(
            classifier, self.images, rows, self.labels, settings, where=_WHERE, seed=inputs.seed,
            device=inputs.device, dtype=inputs.dtype, folder=self._folder(classifier.model, rows, settings),
            advance=advance,
        )  # fmt: skip
        return classifier.model

    def _folder(self, model: Any, rows: np.ndarray, settings: Optimization) -> Path | None:
        """Return the folder of a training."""
        inputs, labels = self.inputs, self.labels[torch.from_numpy(rows)].numpy()
        words = (settings, self.images.preset, inputs.seed, inputs.dtype, inputs.pooling)
        return training_folder(self.config.folder, "fine_tune", words, model, self.images, (rows, labels))

    def select(
        self,
        rows: np.ndarray,
        settings: Optimization,
        rates: Sequence[float],
        advance: Callable[[int], object],
    ) -> dict[float, float]:
        """Return the accuracy, or the mean average precision, on held-out rows for each learning rate."""
        kept, chosen = (np.sort(rows[part.numpy()]) for part in hold_out(len(rows), self.inputs.seed))
        if len(kept) < 2:
            raise UserError(
                "fine_tune: expected at least 3 labeled images to select one of "
                f"{len(rates)} learning rates, got {len(rows)}; use one learning rate"
            )
        truth = self.labels[torch.from_numpy(chosen)].cpu()
        several = has_several_labels(truth)
        if several and not bool((truth == 1).any()):
            raise UserError(
                "fine_tune: expected labels in both parts of the training images, got none in the held-out "
                "ones; add images, or use one learning rate"
            )
        size = self.inputs.batch_size
        accuracies = {}
        for rate in rates:
            model = self.train(kept, replace(settings, learning_rate=rate), advance)
            batches = (self.images.read(chosen[at : at + size]) for at in range(0, len(chosen), size))
            scores = self.predict(model, batches, len(chosen))
            if several:  # a training that diverged is not selected, as for one label
                converged = bool(scores.isfinite().all())
                accuracies[rate] = mean_average_precision(scores, truth) if converged else 0.0
            else:
                accuracies[rate] = float(is_right(scores, truth).double().mean())
        return accuracies

    def predict(self, model: Any, batches: Any, count: int) -> Tensor:
        """Return the logits (N, number of `classes`) of N images without augmentation."""
        inputs = self.inputs
        return predict(
            model, inputs.processor, batches, count, len(self.classes), inputs.device, inputs.dtype
        )


def train_and_test(
    task: Task, fraction: float, rows: np.ndarray, *, is_run: bool = False
) -> tuple[Any, ProtocolResult]:
    """Return a classifier that was trained with the labels of some rows, and its test result.

    Args:
        task: the images, the encoder and the settings.
        fraction: fraction of the training images that these rows are.
        rows: row numbers of the labeled images.
        is_run: whether trainings with different seeds are runs of one experiment. The id of the result then
            does not depend on the seed.
    """
    inputs, config = task.inputs, task.config
    settings, rates = config.optimization(fraction, len(rows))
    validation: dict[float, float] = {}
    epochs = settings.epochs * (1 if len(rates) == 1 else len(rates) + 1)
    with inputs.progress("fine-tuning", epochs, "epoch") as bar:
        if len(rates) > 1:
            validation = task.select(rows, settings, rates, bar.update)
            settings = replace(settings, learning_rate=max(rates, key=lambda rate: validation[rate]))
        model = task.train(rows, settings, bar.update)
    test = inputs.test
    logits = task.predict(model, test.images.iter_batches(inputs.batch_size), len(test))
    check_converged(logits, settings.learning_rate, f"{_WHERE}.learning_rates")
    scores = logits
    if not has_several_labels(test.labels):
        scores = torch.full((len(test), inputs.classes), -torch.inf)
        scores[:, task.classes] = logits
    seed = None if is_run else inputs.seed
    return model, describe(inputs, config, settings, validation, rows, scores, type(model).__name__, seed)


def describe(
    inputs: Inputs,
    config: Config,
    settings: Optimization,
    validation: dict[float, float],
    rows: np.ndarray,
    scores: Tensor,
    kind: str,
    seed: int | None,
) -> ProtocolResult:
    """Return the result of a trained classifier.

    Args:
        inputs, config, settings: the training.
        validation: accuracy on held-out images for each learning rate; {} if there was only one rate.
        rows: row numbers of the labeled images.
        scores: (N, K) of the test images.
        kind: name of the class of the classifier.
        seed: the seed on which the id of the result depends, if any.
    """
    count, whole = len(rows), len(inputs.train)
    percent = "" if count == whole else f"{100 * count / whole:.3g} %"
    selected_on = f"{100 * HELD_OUT:g} % of the labeled images" if validation else None
    rate = f"learning rate {settings.learning_rate:g}"
    if validation:
        rate += f" (the best of {len(validation)} on a held-out {selected_on}; then trained on all)"
    parts = {NOTHING: "All parameters", ENCODER: "The head"}
    first = "block" if settings.frozen == "1" else f"{settings.frozen} blocks"
    trained = parts.get(settings.frozen, f"All but the stem and the first {first}")
    verb = "is" if settings.frozen == ENCODER else "are"
    extras = [
        f"weight decay {settings.weight_decay:g}",
        f"layer decay {settings.layer_decay:g}" * (settings.layer_decay != 1),
        f"mixup {settings.mixup:g}" * (settings.mixup > 0),
        f"label smoothing {settings.label_smoothing:g}" * (settings.label_smoothing > 0),
        f"warmup {counted(settings.warmup_epochs, 'epoch')}" * (settings.warmup_epochs > 0),
    ]
    name = {"sgd": "SGD with Nesterov momentum 0.9", "adamw": "AdamW"}[settings.optimizer]
    hashed = rows_hash([torch.from_numpy(rows)], inputs.train.labels)
    listed = f". Hash of the labeled rows: {hashed}" if percent else ""
    labeled = (
        f"{counted(count, 'labeled image')} with balanced classes ({percent})" if percent else "all labels"
    )
    tested = settings.learning_rate if not validation else sorted(validation)
    identity = asdict(settings) | {
        "learning_rate": tested, "images": count, "crop": config.smallest_crop, "flip": config.flip,
        "seed": seed,
    }  # fmt: skip
    what = "Fine-tuning" if settings.frozen != ENCODER else "Training of the head"
    make_result: Callable[..., ProtocolResult] = accuracy_result
    title, metric, loss = "Accuracy", "", ""
    if has_several_labels(inputs.test.labels):
        make_result = partial(precision_result, seed=inputs.seed)
        title, metric = "Mean average precision", ", mAP"
        loss = f". The loss is the binary cross entropy. The metric is the {metric_words(inputs.test.labels)}"
    return make_result(
        "fine_tune",
        VERSION,
        identity,
        scores,
        inputs.test.labels,
        key="fine_tune" if not percent else f"fine_tune_{count}",
        title=f"{title} after {what.lower()}" + (f", {percent} of the labels" if percent else ""),
        column=what.lower() + metric + (f", {percent} of the labels" if percent else ""),
        text=f"{what}, recipe of {RECIPES[config.recipe].source}. Here: {name}, {rate}, "
        f"{', '.join(filter(None, extras))}, {counted(settings.epochs, 'epoch')}, batch size "
        f"{settings.batch_size}, cosine schedule, random crops of at least {100 * config.smallest_crop:g} % "
        f"of the area, flips with probability {config.flip:g}. {trained} of {kind} {verb} trained on "
        f"{labeled} of the {inputs.train}. Tested on {inputs.test}{listed}{loss}",
        selection={"learning_rate": settings.learning_rate} if validation else {},
        selected_on=selected_on,
        details={
            "class": kind,
            "images": count,
            "rows_hash": hashed,
            "validation": by_setting(validation),
        },
    )
