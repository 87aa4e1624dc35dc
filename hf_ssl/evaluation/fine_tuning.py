# SPDX-License-Identifier: Apache-2.0
"""Trains image classifiers with labels, by transformers' own Trainer (layer 1).

Two processes compute the same as one up to rounding: they share the batches, BatchNorm is synchronized, and
both images of a mixup are in the same process.

Legend: B images in a batch of all processes, M labeled images, N images, C channels, K classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from hf_ssl.evaluation.augmented import AugmentedImages, EpochLoader, TrainBatch
from hf_ssl.evaluation.classifiers import Classifier
from hf_ssl.evaluation.features import dtype_of, pixel_values
from hf_ssl.evaluation.label_trainer import LabelTrainer, training_arguments
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import process_count, process_rank, sum_over_processes
from hf_ssl.precision import autocast


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
        labels: class numbers of all rows of `images`.
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
        labels: class numbers of all rows.
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
            if share:
                loss = loss + share * F.cross_entropy(
                    logits, classes, reduction="sum", label_smoothing=smoothing
                )
        loss = loss * (process_count() / batch.size)
        return (loss, outputs) if return_outputs else loss


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
