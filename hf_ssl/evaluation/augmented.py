# SPDX-License-Identifier: Apache-2.0
"""Batches of cropped and flipped training images, for protocols that train with the encoder (layer 1).

Batch b of an epoch is a pure function of the seed, the epoch and b. All processes together read the images
that one process would read.

Legend: M training images, B images in a batch of all processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_ssl.data import LabeledImages
from hf_ssl.data.batch import LoadedBatch, is_small, make_batch
from hf_ssl.data.loader import worker_options
from hf_ssl.errors import UserError
from hf_ssl.evaluation.encoders import checked_normalization, pixel_values
from hf_ssl.modeling.gather import own_share, process_count
from hf_ssl.random import image_seeds, permutation
from hf_ssl.resources import own_cores
from hf_ssl.views import ViewPreset

MOST_WORKERS = 8  # more do not make a loader of one device faster


@dataclass(frozen=True)
class TrainBatch:
    """The share of a batch that this process computes.

    Attributes:
        images: its images. `sample_index` contains their row numbers.
        number: number of the batch, counted from the start of the training.
        size: B.
    """

    images: LoadedBatch
    number: int
    size: int

    def pixels(self, device: torch.device) -> Tensor:
        """Return the augmented images (share of B, C, H, W), computed on the device."""
        return self.images.views(device).pixel_values[:, 0]

    @property
    def rows(self) -> Tensor:
        """The row numbers (share of B,) int64."""
        rows = self.images.sample_index
        assert rows is not None  # `AugmentedImages` sets them
        return rows

    def pin_memory(self) -> "TrainBatch":
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class BatchRows:
    """The rows of one batch of one process; `TrainBatch` explains the attributes."""

    rows: np.ndarray
    epoch: int
    number: int
    size: int


def epoch_batches(images: int, batch_size: int) -> int:
    """Return the number of batches of an epoch. Images that do not fill a batch are omitted.

    If there are fewer images than `batch_size`, they are one batch.
    """
    return images // min(batch_size, images)


class EpochSampler(Sampler[BatchRows]):
    """A batch sampler whose order depends only on the seed and the epoch, which `set_epoch` sets.

    `epoch_batches` explains the number of batches.

    Args:
        rows: the row numbers that are read.
        batch_size: images in a batch of all processes.
        seed: seed of the order.
        pairs: whether the share of each process has an even number of images, except that of the last one.

    Raises:
        UserError: a process would get no image of a batch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int, pairs: bool = False) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.size = min(batch_size, len(rows))
        unit = 2 if pairs else 1
        units, processes = -(-self.size // unit), process_count()
        if units <= (processes - 1) * -(-units // processes):
            raise UserError(
                f"batch_size: expected enough images for {processes} processes, got {self.size}; use fewer "
                "processes"
            )
        share = own_share(units)
        self.share = slice(unit * share.start, unit * share.stop)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next `iter()`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return epoch_batches(len(self.rows), self.size)

    def __iter__(self) -> Iterator[BatchRows]:
        order = self.rows[permutation(len(self.rows), self.seed, self.epoch)]
        for number in range(len(self)):
            batch = order[number * self.size : (number + 1) * self.size]
            yield BatchRows(batch[self.share], self.epoch, self.epoch * len(self) + number, self.size)


class AugmentedImages(Dataset[TrainBatch]):
    """The training images of an evaluation with one random view of each. It reads what `EpochSampler` yields.

    Args:
        images: `LabeledImages`, or other labeled data, which are kept in memory.
        preset: settings of the view.
        seed: seed of the augmentation.
    """

    def __init__(self, images: Any, preset: ViewPreset, seed: int) -> None:
        self.preset, self.seed = preset, seed
        self.images = images
        if not isinstance(images, LabeledImages):
            self.images = [image for batch in images.iter_batches(256) for image in batch]
        self.small = is_small(tuple(self.read(np.array([0]))[0].shape[1:]))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the images, see `LabeledImages.fingerprint`."""
        return getattr(self.images, "fingerprint", None)

    def read(self, rows: np.ndarray) -> list[Tensor]:
        """Return the images (C, H, W) uint8 of some rows, without augmentation."""
        if isinstance(self.images, LabeledImages):
            return self.images.read(rows)
        return [self.images[row] for row in rows.tolist()]

    def __getitems__(self, batch: BatchRows) -> TrainBatch:
        """Return a batch. torch's DataLoader calls this method."""
        seeds = image_seeds(self.seed, batch.epoch, batch.rows.astype(np.uint64))
        rows = torch.from_numpy(batch.rows)
        images = make_batch(self.read(batch.rows), seeds, self.preset, small=self.small, sample_index=rows)
        return TrainBatch(images, batch.number, batch.size)

    def loader(
        self, rows: np.ndarray, batch_size: int, device: torch.device, pairs: bool = False
    ) -> "EpochLoader":
        """Return a loader of batches of some rows; `EpochSampler` explains the arguments."""
        return EpochLoader.of(self, EpochSampler(rows, batch_size, self.seed, pairs), device, self.small)


class EpochLoader(DataLoader[Any]):
    """A loader whose epoch transformers' Trainer sets."""

    @classmethod
    def of(cls, images: Any, sampler: "EpochSampler", device: torch.device, is_fast: bool) -> "EpochLoader":
        """Return a loader for a model on a device. It has no worker processes if reading is fast."""
        workers = 0 if is_fast else min(own_cores() - 1, MOST_WORKERS)
        batches: Any = sampler  # with `BatchRows` instead of lists
        return cls(images, batch_sampler=batches, **worker_options(workers, device.type == "cuda"))

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next `iter()`."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def crop_and_flip(processor: Any, images: Any, smallest_crop: float, flip: float) -> ViewPreset:
    """Return the augmentation of the papers' probes: a random resized crop and a horizontal flip.

    Size, mean and standard deviation are those of the image processor of the encoder. The filter is bicubic
    if the processor resizes bicubically, and bilinear otherwise (also for timm, whose processors have no
    `resample`).

    Args:
        processor: the image processor.
        images: labeled images, of which one is processed to measure its size.
        smallest_crop: smallest fraction of the image's area that a crop keeps.
        flip: probability of the flip.

    Raises:
        UserError: the processed images are not squares, or `checked_normalization` raises.
    """
    first = next(iter(images.iter_batches(1)))
    height, size = pixel_values(processor, first, torch.device("cpu")).shape[-2:]
    if height != size:
        raise UserError(
            f"processor: expected square images for random crops, got {height} x {size} pixels; use a "
            "processor with square images, or protocols without crops"
        )
    bicubic = int(getattr(processor, "resample", None) or 0) == 3
    channels = first[0].shape[0]
    mean, std = checked_normalization(processor, channels)
    preset = ViewPreset(
        size=size,
        count=1,
        scale=(smallest_crop, 1.0),
        interpolation="bicubic" if bicubic else "bilinear",
        flip=flip,
        jitter=0.0,
        gray=0.0,
        blur=0.0,
        mean=tuple(mean),
        std=tuple(std),
    )
    preset.check(channels)
    return preset
