# SPDX-License-Identifier: Apache-2.0
"""Trains a detector with transformers' Trainer, and detects objects (layer 1).

The batches and flips depend only on the seed and the epoch. The detector samples regions with torch's global
random state, which the Trainer seeds and stores in checkpoints. Therefore, a training in one process can be
repeated and resumed exactly. Several processes share the batches, but sample other regions than one process.

Legend: B images in a batch of all processes, M training images, N images, D detections of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_ssl.data.boxes import ImageObjects
from hf_ssl.evaluation.augmented import BatchRows, EpochLoader, EpochSampler
from hf_ssl.evaluation.box_metrics import Detections
from hf_ssl.evaluation.detector import MOST_DETECTIONS
from hf_ssl.evaluation.label_trainer import LabelTrainer, training_arguments
from hf_ssl.evaluation.scores import check_converged
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import process_count, process_rank, sum_over_processes
from hf_ssl.modeling.parameter_groups import optimizer_groups
from hf_ssl.random import image_seeds, uniforms

_LONGEST_WARMUP = 500
_SMALL_SET = 2000


@dataclass(frozen=True)
class DetectorOptimization:
    """Settings of a training. All of them change its result.

    Attributes:
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        learning_rate: learning rate after the warmup, which takes 10 % of the steps, but at most 500 steps.
            It then decays to zero along a cosine.
        weight_decay: weight decay, which does not apply to biases, gains, tokens and position tables.
        epochs: number of epochs.
        batch_size: B. It is smaller if there are fewer images.
        flip: probability of a horizontal flip.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int
    flip: float


@dataclass(frozen=True)
class BoxBatch:
    """The part of a batch that this process computes.

    Attributes:
        images: images (C, H, W) uint8 of any size.
        targets: for each image, its `boxes` (O, 4) float32 [x1, y1, x2, y2] and `labels` (O,) int64 from 1.
        size: B.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    size: int

    def pin_memory(self) -> "BoxBatch":
        return BoxBatch([image.pin_memory() for image in self.images], self.targets, self.size)


class BoxImages(Dataset[BoxBatch]):
    """The training images with their boxes, randomly flipped. `EpochSampler` yields the indices of batches.

    Args:
        images: the M training images, a `LabeledImages`.
        objects: the objects of each image.
        flip: probability of a horizontal flip.
        seed: seed of the flips and of the order.
    """

    def __init__(self, images: Any, objects: Sequence[ImageObjects], flip: float, seed: int) -> None:
        self.images, self.objects, self.flip, self.seed = images, objects, flip, seed

    def __len__(self) -> int:
        return len(self.objects)

    def __getitems__(self, batch: BatchRows) -> BoxBatch:
        """Return a batch. torch's DataLoader calls this method."""
        seeds = image_seeds(self.seed, batch.epoch, batch.rows.astype(np.uint64))
        flipped = uniforms(seeds, 0, 1)[:, 0] < self.flip
        images, targets = [], []
        for row, image, is_flipped in zip(
            batch.rows.tolist(), self.images.read(batch.rows), flipped, strict=True
        ):
            own = self.objects[row]
            boxes = torch.from_numpy(own.boxes[~own.crowd])
            if is_flipped:
                image = image.flip(-1)
                left, top, right, bottom = boxes.unbind(1)
                boxes = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], dim=1)
            images.append(image)
            targets.append({"boxes": boxes, "labels": torch.from_numpy(own.classes[~own.crowd] + 1)})
        return BoxBatch(images, targets, batch.size)

    def loader(self, batch_size: int, device: torch.device) -> EpochLoader:
        """Return a loader of the batches of this process."""
        sampler = EpochSampler(np.arange(len(self)), batch_size, self.seed)
        return EpochLoader.of(self, sampler, device, len(self) < _SMALL_SET)


def train_detector(
    detector: nn.Module,
    images: BoxImages,
    settings: DetectorOptimization,
    *,
    where: str,
    device: torch.device,
    folder: Path | None = None,
    advance: Callable[[int], object] = lambda epochs: None,
) -> None:
    """Train a detector in place. The global random states do not change.

    Args:
        detector: a detector of `new_detector`.
        images: the training images.
        settings: settings of the training.
        where: section of the settings, for messages.
        device: device of the computation.
        folder: folder for one checkpoint per epoch. If it contains one, the training resumes, and gives the
            same weights as without the interruption. None: no checkpoints.
        advance: called with 1 after each epoch.

    Raises:
        UserError: the training diverged, or a process has no images.
    """
    body: Any = detector.backbone
    if process_count() > 1 and body.batch_statistics and not body.frozen:
        synchronize_batch_norm(body)
    loader = images.loader(settings.batch_size, device)
    steps = settings.epochs * len(loader)
    with training_arguments(
        folder=folder,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        warmup_steps=min(_LONGEST_WARMUP, steps // 10),
        seed=images.seed,
        device=device,
        dtype=None,  # the detector itself selects the parts that use autocast
    ) as args:
        groups = optimizer_groups(detector, settings.learning_rate, settings.weight_decay)
        trainer = DetectorTrainer(detector, args, loader, settings.optimizer, groups, advance)
        trainer.where, trainer.learning_rate = where, settings.learning_rate
        trainer.run(folder)


class DetectorTrainer(LabelTrainer):
    """A `LabelTrainer` with the losses of a detector.

    Attributes:
        where: section of the settings, for messages.
        learning_rate: the one in the settings.
    """

    where = ""
    learning_rate = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this process's part of the loss of the batch, times the number of processes.

        All processes raise UserError if the loss of one process is not finite. Otherwise, the other processes
        would wait for that process.
        """
        batch: BoxBatch = inputs
        device = self.args.device
        targets = [{name: each.to(device) for name, each in target.items()} for target in batch.targets]
        losses = model(_pixels(batch.images, device), targets)
        loss = torch.stack(list(losses.values())).sum() * (process_count() * len(batch.images) / batch.size)
        summed = sum_over_processes(loss.detach())
        check_converged(summed, self.learning_rate, f"{self.where}.learning_rate")
        return (loss, losses) if return_outputs else loss


def detect(
    detector: nn.Module, images: Any, batch_size: int, device: torch.device, advance: Callable[[int], object]
) -> list[Detections]:
    """Return the detections of N images. The processes share the batches.

    Args:
        detector: a trained detector.
        images: a `LabeledImages`.
        batch_size: number of images that are processed together.
        device: device of the detector.
        advance: called with the number of images after each batch.
    """
    table = torch.zeros(len(images), MOST_DETECTIONS, 7, dtype=torch.float64, device=device)
    first = 0
    with evaluation_mode(detector):
        for number, batch in enumerate(images.iter_batches(batch_size)):
            if number % process_count() == process_rank():
                for row, each in enumerate(detector(_pixels(batch, device)), first):
                    count = len(each["scores"])
                    table[row, :count, :4] = each["boxes"].double()
                    table[row, :count, 4] = each["labels"].double() - 1
                    table[row, :count, 5] = each["scores"].double()
                    table[row, :count, 6] = 1
            first += len(batch)
            advance(len(batch))
    rows = sum_over_processes(table).cpu()
    chosen = [row[row[:, 6] > 0] for row in rows]
    return [Detections(row[:, :4].float(), row[:, 4].long(), row[:, 5].float()) for row in chosen]


def _pixels(images: list[Tensor], device: torch.device) -> list[Tensor]:
    """Return uint8 images (C, H, W) as float32 in [0, 1] on a device."""
    return [image.to(device, non_blocking=True).float() / 255 for image in images]
