# SPDX-License-Identifier: Apache-2.0
"""Object detection: Faster R-CNN with a feature pyramid, on the frozen and on the fine-tuned encoder.

Published results of MoCo and PIRL are not comparable. They use the architecture C4 of Faster R-CNN, whose
head is the last stage of the ResNet, instead of a feature pyramid.
"""

import statistics
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_ssl.data.boxes import ImageObjects
from hf_ssl.errors import UserError, check_name, check_values, counted
from hf_ssl.evaluation.box_metrics import BoxScores, Detections, average_precision_error, box_scores
from hf_ssl.evaluation.box_metrics import require_packages as require_packages  # see `PROTOCOLS`
from hf_ssl.evaluation.detector import Architecture, new_detector
from hf_ssl.evaluation.detector_training import BoxImages, DetectorOptimization, detect, train_detector
from hf_ssl.evaluation.feature_maps import feature_maps
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.evaluation.label_trainer import OPTIMIZERS, check_rate, training_folder
from hf_ssl.evaluation.results import ProtocolResult, mean_error, result_id
from hf_ssl.modeling.eval_mode import unchanged_random_state
from hf_ssl.modeling.loading import normalization

VERSION = 1
_WHERE = "evaluation.settings.detection"
FROZEN, TUNED = "frozen", "tuned"
EXAMPLES = 8
"""Largest number of test images whose detections are stored in `details` and drawn in a picture."""
_LEAST_SCORE = 0.5  # of the drawn detections


class Recipe(NamedTuple):
    """Settings for a kind of encoder. `Config` explains the fields with the same names.

    Attributes:
        learning_rate: learning rate for `batch_size` images. It is proportional to the batch size.
        source: the source of the settings, and the differences from it.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int
    image_size: int
    anchor_scale: float
    channels: int
    head_size: int
    proposals: int
    sampled_regions: int
    source: str


RECIPES = {
    "fpn": Recipe(
        "sgd", 0.02, 1e-4, 12, 16, 800, 8.0, 256, 1024, 1000, 512,
        "Faster R-CNN with FPN (1612.03144), schedule 1x of Detectron2, there without GroupNorm and Nesterov "
        "momentum, with shorter sides of 640 to 800 pixels in training, with frozen first stages, and with a "
        "learning rate that decreases in steps",
    ),
    "vitdet": Recipe(
        "adamw", 1e-4, 0.1, 100, 64, 1024, 8.0, 256, 1024, 1000, 512,
        "ViTDet (2203.16527), there with a learning rate that decreases in steps, large-scale jitter to "
        "longer sides of 1024 pixels, layer decay, drop path, attention in windows and a convolutional head",
    ),
    "small": Recipe(
        "adamw", 5e-4, 0.05, 12, 4, 192, 4.0, 64, 256, 200, 64,
        "hf_ssl, for a few hundred images and CPUs",
    ),
}  # fmt: skip
"""Name of a recipe -> its settings."""


@dataclass
class Config:
    """Settings. Null means the value of the recipe.

    Attributes:
        recipe: a key of `RECIPES`. Null: "vitdet" for a vision transformer without stages, else "fpn".
        modes: "frozen": the encoder is frozen; "tuned": the encoder is fine-tuned. Each mode gives a result.
        seeds: number of trainings of each mode. Their seeds are `evaluation.seed`, `evaluation.seed` + 1, ...
        optimizer: sgd (Nesterov momentum 0.9) or adamw.
        learning_rate: learning rate after the warmup, for this batch size.
        weight_decay: weight decay, which does not apply to biases, gains, tokens and position tables.
        epochs: number of epochs.
        batch_size: number of images in a batch.
        flip: probability of a horizontal flip.
        image_size: shorter side of the resized images in pixels. The longer side is at most 5/3 of it.
        smallest_stride: smallest stride of the pyramid in pixels. Maps with a smaller stride are left out.
        levels: number of levels of the pyramid. Each level has twice the stride of the level before it.
        anchor_scale: side of the square anchor of a level, in units of its stride.
        channels: channels of each level.
        head_size: number of units in each of the two hidden layers of the box head.
        proposals: number of proposals of the RPN for each test image; twice as many in training.
        sampled_regions: number of regions per image that train the box head.
        batch_statistics: whether the BatchNorm of a fine-tuned encoder normalizes with the statistics of the
            batch. Otherwise, and always in a frozen encoder, it uses the statistics of the pretraining.
        folder: folder for checkpoints. An interrupted training resumes, and a finished one is not repeated.
    """

    recipe: str | None = None
    modes: list[str] = field(default_factory=lambda: [FROZEN, TUNED])
    seeds: int = 1
    optimizer: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    flip: float = 0.5
    image_size: int | None = None
    smallest_stride: int = 4
    levels: int = 5
    anchor_scale: float | None = None
    channels: int | None = None
    head_size: int | None = None
    proposals: int | None = None
    sampled_regions: int | None = None
    batch_statistics: bool = False
    folder: str | None = None

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        if self.recipe is not None:
            check_name(f"{where}.recipe", self.recipe, RECIPES, "a known recipe")
        if self.optimizer is not None:
            check_name(f"{where}.optimizer", self.optimizer, OPTIMIZERS, " or ".join(OPTIMIZERS))
        for mode in self.modes:
            check_name(f"{where}.modes", mode, (FROZEN, TUNED), f"{FROZEN}, {TUNED} or both")
        modes = list(self.modes)

        def at_least(key: str, low: float) -> tuple[Any, ...]:
            value = getattr(self, key)
            is_valid = value is None or low <= value < 10**6
            return key, value, is_valid, f"a number of at least {low} and below 1,000,000"

        check_values(
            where,
            ("modes", modes, 0 < len(modes) == len(set(modes)), f"{FROZEN}, {TUNED} or both"),
            at_least("seeds", 1),
            at_least("learning_rate", 1e-12),
            at_least("weight_decay", 0),
            at_least("epochs", 1),
            at_least("batch_size", 1),
            ("flip", self.flip, 0 <= self.flip <= 1, "a probability"),
            at_least("image_size", 16),
            at_least("smallest_stride", 1),
            ("levels", self.levels, 1 <= self.levels <= 8, "a number from 1 to 8"),
            at_least("anchor_scale", 0.5),
            at_least("channels", 1),
            at_least("head_size", 1),
            at_least("proposals", 10),
            at_least("sampled_regions", 4),
        )

    def resolved(self, is_plain: bool, images: int) -> tuple[Architecture, DetectorOptimization, str]:
        """Return the settings of the detector and of its training, and their source in words.

        Args:
            is_plain: whether the encoder is a vision transformer without stages.
            images: number of training images.

        Raises:
            UserError: the optimizer is not that of the recipe, and the learning rate is null.
        """
        name = self.recipe or ("vitdet" if is_plain else "fpn")
        recipe = RECIPES[name]
        check_rate(_WHERE, "learning_rate", self.learning_rate, self.optimizer, name, recipe.optimizer)

        def chosen(key: str) -> Any:
            own = getattr(self, key)
            return getattr(recipe, key) if own is None else own

        sizes = ("image_size", "anchor_scale", "channels", "head_size", "proposals", "sampled_regions")
        architecture = Architecture(
            smallest_stride=self.smallest_stride,
            levels=self.levels,
            batch_statistics=self.batch_statistics,
            **{key: chosen(key) for key in sizes},
        )
        batch_size = min(chosen("batch_size"), images)
        rate = recipe.learning_rate * batch_size / recipe.batch_size
        optimization = DetectorOptimization(
            optimizer=chosen("optimizer"),
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            weight_decay=chosen("weight_decay"),
            epochs=chosen("epochs"),
            batch_size=batch_size,
            flip=self.flip,
        )
        return architecture, optimization, recipe.source


@dataclass
class Task:
    """The data and the settings that all trainings of one evaluation share.

    Attributes:
        inputs: the images and the encoder.
        config: the settings.
        train, test: the objects of the images of each split.
        class_names: names of the classes.
        architecture, optimization, source: the settings of `Config.resolved`.
    """

    inputs: Inputs
    config: Config
    train: list[ImageObjects]
    test: list[ImageObjects]
    class_names: list[str]
    architecture: Architecture
    optimization: DetectorOptimization
    source: str

    @classmethod
    def of(cls, inputs: Inputs, config: Config) -> "Task":
        """Return the task of an evaluation, after a check of the boxes and of the encoder."""
        maps = feature_maps(inputs.encoder, config.smallest_stride)
        train, test = (_read_objects(inputs, split) for split in (inputs.train, inputs.test))
        settings = config.resolved(maps.is_plain, len(train))
        return cls(inputs, config, train, test, inputs.train.images.class_names, *settings)

    def run(self, mode: str, seed: int) -> list[Detections]:
        """Train a detector, and return its detections in the test images."""
        inputs, frozen = self.inputs, mode == FROZEN
        # In float16, gradients would need a scaled loss.
        dtype = None if inputs.dtype is torch.float16 and not frozen else inputs.dtype
        with unchanged_random_state(inputs.device):
            torch.manual_seed(seed)
            maps = feature_maps(inputs.encoder, self.config.smallest_stride)
            detector = new_detector(
                maps, inputs.processor, len(self.class_names), self.architecture, frozen=frozen, dtype=dtype
            ).to(inputs.device)
        images = BoxImages(inputs.train.images, self.train, self.optimization.flip, seed)
        with inputs.progress(f"detection, {mode}, seed {seed}", self.optimization.epochs, "epoch") as bar:
            train_detector(
                detector, images, self.optimization, where=_WHERE, device=inputs.device,
                folder=self._folder(detector, mode, seed), advance=bar.update,
            )  # fmt: skip
        with inputs.progress(f"detection, {mode}, test images", len(self.test)) as bar:
            return detect(
                detector, inputs.test.images, self.optimization.batch_size, inputs.device, bar.update
            )

    def _folder(self, detector: Any, mode: str, seed: int) -> Path | None:
        """Return the folder of a training."""
        inputs = self.inputs
        words = (mode, seed, inputs.dtype, *normalization(inputs.processor, inputs.channels))
        settings = (*words, self.architecture, self.optimization)
        labels = (np.arange(len(self.train)), *(each for image in self.train for each in image))
        images = inputs.train.images
        return training_folder(self.config.folder, "detection", settings, detector, images, labels)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the average precision on the test images for each mode.

    Raises:
        UserError: the encoder has no feature maps, a box is wrong, or a training diverged.
    """
    task = Task.of(inputs, config)
    seeds = [inputs.seed + number for number in range(config.seeds)]

    def measure(mode: str) -> ProtocolResult:
        found = {seed: task.run(mode, seed) for seed in seeds}
        scores = {seed: box_scores(each, task.test) for seed, each in found.items()}
        return _describe(task, mode, found, scores)

    return inputs.measure_each("object detection", {mode: partial(measure, mode) for mode in config.modes})


def _read_objects(inputs: Inputs, split: Split) -> list[ImageObjects]:
    """Return the objects of the images of a split, with boxes clipped to the image."""
    sizes = []
    with inputs.progress(f"sizes of the {split.name} images", len(split)) as bar:
        for batch in split.images.iter_batches(inputs.batch_size):
            sizes += [tuple(image.shape[1:]) for image in batch]
            bar.update(len(batch))
    found: list[ImageObjects] = split.images.objects.inside(np.array(sizes))
    if not any((~each.crowd).any() for each in found):
        raise UserError(
            f"detection: expected boxes in the images of split {split.name}, got none in {len(found)} "
            "images; use another split, or data.label_column=NAME"
        )
    return found


def _describe(
    task: Task, mode: str, found: dict[int, list[Detections]], scores: dict[int, BoxScores]
) -> ProtocolResult:
    """Return the result of a mode from the detections and scores of each seed."""
    inputs, names = task.inputs, task.class_names
    architecture, optimization = task.architecture, task.optimization

    def mean(values: Any) -> float:
        return statistics.fmean(values)

    values = [each.ap for each in scores.values()]
    first = next(iter(scores))
    sampled = average_precision_error(found[first], task.test, inputs.seed)
    error, error_text = sampled, "a bootstrap over test images"
    if len(values) > 1:
        error, error_text = mean_error(values), f"the mean over {counted(len(values), 'seed')}"
    identity = asdict(architecture) | asdict(optimization) | {"mode": mode, "seeds": list(scores)}
    trained = "frozen" if mode == FROZEN else "fine-tuned"
    classes = sorted(set.intersection(*(set(each.classes) for each in scores.values())))
    return ProtocolResult(
        protocol="detection",
        id=result_id("detection", VERSION, identity),
        key=f"detection_{mode}",
        metric="average_precision",
        title=f"Box AP of Faster R-CNN, {trained} encoder",
        column=f"box AP, {trained}",
        text=f"Average precision of COCO (IoU 0.50 to 0.95) by Faster R-CNN with a feature pyramid on the "
        f"{trained} encoder, mean of {counted(len(values), 'training run')}. Recipe: {task.source}. Here: "
        f"{optimization.optimizer}, learning rate {optimization.learning_rate:g}, weight decay "
        f"{optimization.weight_decay:g}, {counted(optimization.epochs, 'epoch')}, batch size "
        f"{optimization.batch_size}, cosine schedule, flips with probability {optimization.flip:g}, shorter "
        f"side {architecture.image_size} pixels, {architecture.channels} channels. Trained on "
        f"{inputs.train} and tested on {inputs.test}. The standard error is that of {error_text}. Published "
        "results of the C4 architecture (MoCo, PIRL) are not comparable",
        value=mean(values),
        standard_error=error,
        metrics={"ap50": mean(each.ap50 for each in scores.values())}
        | {"ap75": mean(each.ap75 for each in scores.values())}
        | {f"ap_{names[k]}": mean(each.classes[k] for each in scores.values()) for k in classes},
        selection={},
        selected_on=None,
        details={
            "mode": mode,
            "settings": identity,
            "seeds": {str(seed): {"ap": s.ap, "ap50": s.ap50, "ap75": s.ap75} for seed, s in scores.items()},
            "bootstrap_error": sampled,
            "classes": list(names),
            "boxes": {"train": _count(task.train), "test": _count(task.test)},
            "examples": _examples(found[first]),
        },
    )


def _count(objects: list[ImageObjects]) -> int:
    return sum(len(each.boxes) for each in objects)


def _examples(found: list[Detections]) -> list[dict[str, Any]]:
    """Return the detections in some test images: {row, boxes: [x1, y1, x2, y2, class, score]}."""
    rows = sorted({round(row) for row in np.linspace(0, len(found) - 1, min(EXAMPLES, len(found)))})
    return [
        {
            "row": row,
            "boxes": [
                [*(round(side, 1) for side in box), number, round(score, 3)]
                for box, number, score in zip(*(each.tolist() for each in found[row]), strict=True)
                if score >= _LEAST_SCORE
            ],
        }
        for row in rows
    ]
