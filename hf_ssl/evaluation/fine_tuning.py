# SPDX-License-Identifier: Apache-2.0
"""Trains image classifiers with labels, by transformers' own Trainer (layer 1).

Two processes compute the same as one up to rounding. They share the batches and synchronize BatchNorm. Both
images of a mixup are in the same process.

Legend: B images in a batch of all processes, M labeled images, N images, C channels, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_ssl.evaluation.augmented import AugmentedImages, EpochLoader, TrainBatch
from hf_ssl.evaluation.classifiers import Classifier
from hf_ssl.evaluation.encoders import dtype_of, pixel_values
from hf_ssl.evaluation.label_trainer import LabelTrainer, training_arguments
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import process_count, process_rank, sum_over_processes
from hf_ssl.precision import autocast


class Recipe(NamedTuple):
    """Published settings. `Config` of the protocol `fine_tune` explains those with the same names.

    Attributes:
        learning_rates: learning rates for 256 images. They are proportional to the batch size.
        epochs: {largest fraction of labels: number of epochs}, ascending.
        source: the paper, and the differences from it.
    """

    optimizer: str
    learning_rates: tuple[float, ...]
    weight_decay: float
    layer_decay: float
    mixup: float
    label_smoothing: float
    epochs: dict[float, int]
    warmup_epochs: float
    source: str


RECIPES = {
    "simclr": Recipe(
        "sgd", (0.05,), 0.0, 1.0, 0.0, 0.0, {0.01: 60, 1.0: 30}, 0.0,
        "SimCLR (2002.05709, section B.5; epochs also in 2006.10029), there with batches of 4,096 images",
    ),
    "byol": Recipe(
        "sgd", (0.00125, 0.0025, 0.005, 0.0125, 0.025), 0.0, 1.0, 0.0, 0.0, {1.0: 50}, 0.0,
        "BYOL (2006.07733, appendix C.2), there with batches of 1,024 images and also 30 epochs",
    ),
    "mae": Recipe(
        "adamw", (1e-3,), 0.05, 0.75, 0.8, 0.1, {1.0: 50}, 5.0,
        "MAE, ViT-L (2111.06377, FINETUNE.md), there with batches of 1,024 images and also with CutMix, "
        "RandAugment, random erasing and drop path",
    ),
    "scratch": Recipe(
        "sgd", (0.1,), 1e-4, 1.0, 0.0, 0.0, {1.0: 90}, 5.0,
        "supervised training of ResNet-50 (1706.02677), there with a learning rate that decreases in steps",
    ),
}  # fmt: skip
"""Name -> published settings. Source of SimCLR and BYOL: the papers; of MAE: the authors' code."""


@dataclass(frozen=True)
class Optimization:
    """Settings of a training. All of them change its result.

    Attributes:
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        learning_rate: learning rate of the head after the warmup. It decays to zero by a cosine over the
            steps.
        weight_decay, layer_decay: see `Classifier.parameter_groups`.
        mixup: parameter alpha of the Beta distribution of mixup (1710.09412); 0 mixes no images.
        label_smoothing: probability that is divided equally among all classes.
        epochs, batch_size: B is smaller if there are fewer labeled images.
        warmup_epochs: epochs in which the learning rate rises from zero.
        frozen: see `Classifier.freeze`.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    layer_decay: float
    mixup: float
    label_smoothing: float
    epochs: int
    batch_size: int
    warmup_epochs: float
    frozen: str


def train_classifier(
    classifier: Classifier,
    images: AugmentedImages,
    rows: np.ndarray,
    labels: Tensor,
    settings: Optimization,
    *,
    where: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
    advance: Callable[[int], object] = lambda epochs: None,
) -> None:
    """Train a classifier in place. The model is on the device afterwards.

    The global random states of Python, NumPy and torch do not change. They determine only dropout during
    training, which starts with `seed`.

    Args:
        classifier: the classifier.
        images: the augmented training images.
        rows: row numbers of the M labeled images.
        labels: class numbers (M,) of all rows of `images`. For images with several labels: (M, K), 1: yes,
            0: no, -1: ignored.
        settings: settings of the training.
        where: section of the settings, for messages.
        seed: seed of all random choices.
        device: device of the computation.
        dtype: precision of autocast; None: float32.
        folder: folder for one checkpoint per epoch. If it contains one, the training resumes, and gives the
            same weights as without the interruption. None: no checkpoints.
        advance: called with 1 after each epoch.

    Raises:
        UserError: the encoder does not have the blocks that the settings name, or a process has no image.
    """
    classifier.freeze(settings.frozen, f"{where}.freeze")
    groups = classifier.parameter_groups(
        settings.learning_rate, settings.weight_decay, settings.layer_decay, f"{where}.layer_decay"
    )
    if process_count() > 1:
        synchronize_batch_norm(classifier.model)
    loader = images.loader(rows, settings.batch_size, device, pairs=settings.mixup > 0)
    with training_arguments(
        folder=folder,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        warmup_steps=round(settings.warmup_epochs * len(loader)),
        seed=seed,
        device=device,
        dtype=dtype,
    ) as args:
        FineTuner(classifier, args, loader, labels, settings, groups, advance).run(folder)


class FineTuner(LabelTrainer):
    """A `LabelTrainer` with the losses of fine-tuning.

    Args:
        classifier: the classifier.
        args: arguments of `training_arguments`.
        loader: the batches of this process.
        labels: labels of all rows, see `train_classifier`.
        settings: settings of the training.
        groups: parameter groups of the optimizer.
        advance: called with 1 after each epoch.
    """

    def __init__(
        self,
        classifier: Classifier,
        args: TrainingArguments,
        loader: EpochLoader,
        labels: Tensor,
        settings: Optimization,
        groups: list[dict[str, Any]],
        advance: Callable[[int], object],
    ) -> None:
        super().__init__(classifier.model, args, loader, settings.optimizer, groups, advance)
        self._labels, self._settings = labels.to(args.device), settings
        self._frozen = classifier.frozen_modules()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the share of this process in the cross entropy of the batch, times the number of processes.

        For images with several labels, this is the mean of the binary cross entropy over classes.

        DDP averages the gradients over the processes, so the gradient is that of the mean over all B images.
        """
        for module in self._frozen:  # the Trainer calls `train()` before each step
            module.eval()
        batch: TrainBatch = inputs
        pixels = batch.pixels(self.args.device)
        targets = self._labels[batch.rows.to(self.args.device)]
        partner, weight = targets, 1.0
        if self._settings.mixup:
            weight = mixup_weight(self._settings.mixup, self.args.seed, batch.number)
            order = neighbors(len(pixels), pixels.device)
            pixels, partner = torch.lerp(pixels[order], pixels, weight), targets[order]
        outputs = model(pixel_values=pixels)
        logits, smoothing = outputs.logits.float(), self._settings.label_smoothing
        loss = torch.zeros((), device=logits.device)
        for share, classes in ((weight, targets), (1 - weight, partner)):
            if share and classes.ndim == 2:
                loss = loss + share * binary_cross_entropy(logits, classes)
            elif share:
                loss = loss + share * F.cross_entropy(
                    logits, classes, reduction="sum", label_smoothing=smoothing
                )
        loss = loss * (process_count() / batch.size)
        return (loss, outputs) if return_outputs else loss


def binary_cross_entropy(logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Return the sum over images of the mean binary cross entropy of their classes.

    Args:
        logits_BK: (B, K).
        labels_BK: (B, K), 1: yes, 0: no, -1: the class is ignored. An ignored class adds zero to the mean
            over all K classes.
    """
    known = (labels_BK >= 0).to(logits_BK.dtype)
    targets = labels_BK.clamp_min(0).to(logits_BK.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits_BK, targets, weight=known, reduction="none")
    return entropy.mean(dim=1).sum()


def mixup_weight(alpha: float, seed: int, number: int) -> float:
    """Return the weight of the first image of each pair of a batch, which depends only on the arguments."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed % 2**64, number))))
    return float(generator.beta(alpha, alpha))


def neighbors(count: int, device: torch.device) -> Tensor:
    """Return the partners in mixup: 1, 0, 3, 2, ... The batch has a random order, so they are random images.

    Of an odd number of images, the last one is its own partner.
    """
    order = torch.arange(count, device=device)
    return (order ^ 1).where((order ^ 1) < count, order)


def predict(
    model: nn.Module,
    processor: Any,
    image_batches: Sequence[list[Tensor]] | Iterator[list[Tensor]],
    count: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the logits (N, K) of processed images, on the CPU. The processes share the batches.

    Args:
        model: a classifier of `new_classifier`.
        processor: the image processor of the encoder.
        image_batches: lists of uint8 tensors (C, H, W).
        count, classes: N and K.
        device: device of the model.
        dtype: precision of autocast; None: float32.
    """
    logits_NK = torch.zeros(count, classes, device=device)
    first = 0
    with evaluation_mode(model):
        for number, images in enumerate(image_batches):
            rows = slice(first, first + len(images))
            first = rows.stop
            if number % process_count() == process_rank():
                pixels = pixel_values(processor, images, device).to(dtype_of(model))
                with autocast(device, dtype):
                    logits_NK[rows] = model(pixel_values=pixels).logits.float()
    return sum_over_processes(logits_NK).cpu()
