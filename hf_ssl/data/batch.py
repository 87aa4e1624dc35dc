# SPDX-License-Identifier: Apache-2.0
"""The batches of a loader: uint8 images with sampled augmentation parameters; and the broken images."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.views import Crops, ViewParameters, ViewPreset, Views, augment, crop, sample_parameters

logger = logging.getLogger(__name__)

SampleMasks = Callable[[np.ndarray], dict[str, Tensor]]
"""Samples masks or noise, further inputs of a method, from the seeds (B,) of a batch."""

HOST_INPUTS = ("patch_parameters", "rotations")
"""Inputs of methods that only the host reads. They stay there, because the host would wait for their copy."""

MAX_SMALL_SIDE = 96
"""Largest side of a small image, in pixels. Small images of one size are cropped on the device of the model,
other images by the workers of the loader."""

_MIN_STREAMED_IMAGES = 100
_FEW_BROKEN = 15
"""So many broken images never stop a run, unless they are most of the images."""


@dataclass(frozen=True)
class DeviceRows:
    """Images of a data set that is stored on the device of the model, chosen by their row numbers.

    Attributes:
        rows: (B,) int64 row numbers.
        size: height and width of all images.
        pixels: (N, C, H, W) uint8, all images of the data set. A batch from a worker has None; the loader
            sets the pixels in the main process.
    """

    rows: Tensor
    size: tuple[int, int]
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, samples: slice) -> "DeviceRows":
        return replace(self, rows=self.rows[samples])

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Tensor:
        """Return the pixels (B, C, H, W) on a device. Only row numbers are copied to the device of `pixels`.

        Raises:
            RuntimeError: `pixels` is None.
        """
        if self.pixels is None:
            raise RuntimeError("expected images that a loader stores on a device, got rows without pixels")
        found = self.pixels[self.rows.to(self.pixels.device, non_blocking=non_blocking)]
        return found.to(device, non_blocking=non_blocking)

    def pin_memory(self) -> "DeviceRows":
        return replace(self, rows=self.rows.pin_memory())


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch of one process: B images of C channels, H x W pixels.

    Attributes:
        images: (B, C, H, W) uint8, or the crops of all views, or rows of images on the device.
        parameters: the augmentation parameters of the views, for `views.augment`.
        seeds: (B,) uint64 on the host, from which all random numbers of an image are computed.
        sample_index: (B,) int64 row numbers; None for a stream.
        broken: "where: reason" of each image that could not be read and was replaced or skipped.
        position: position of the stream of this process after this batch, as JSON data; None for map-style
            data.
        mirrored: channels whose values a horizontal flip reverses.
        labels: (B,) int64 class numbers of a stream, -1 for an image without a label; None if the loader was
            created without `label_column`, and for map-style data.
    """

    images: Tensor | Crops | DeviceRows
    parameters: ViewParameters
    seeds: np.ndarray
    sample_index: Tensor | None = None
    broken: list[str] = field(default_factory=list)
    position: dict[str, Any] | None = None
    mirrored: tuple[int, ...] = ()
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, samples: slice) -> "LoadedBatch":
        """Return some of the images; the tensors share the memory of this batch."""
        return replace(
            self,
            images=self.images[samples],
            parameters=self.parameters[samples],
            seeds=self.seeds[samples],
            sample_index=None if self.sample_index is None else self.sample_index[samples],
            labels=None if self.labels is None else self.labels[samples],
        )

    def split(self, size: int) -> "list[LoadedBatch]":
        """Return parts of at most `size` images; the tensors share the memory of this batch."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def views(self, device: torch.device | str | int) -> Views:
        """Return the augmented views of the images, computed on `device`."""
        # A copy from pinned memory to a GPU does not block. Later operations on the GPU run after it.
        images = self.images.to(device, non_blocking=torch.device(device).type == "cuda")
        return augment(images, self.parameters, self.mirrored)

    def inputs(
        self, device: torch.device | str | int, sample_masks: "SampleMasks | None" = None
    ) -> dict[str, Tensor]:
        """Return the arguments of a method's `forward`, computed on `device`.

        Args:
            device: where to compute the views.
            sample_masks: the method's function that samples masks or noise from the seeds.
        """
        views, index = self.views(device), self.sample_index
        named = {
            "pixel_values": views.pixel_values,
            "local_pixel_values": views.local_pixel_values,
            "sample_index": None if index is None else index.to(device, non_blocking=True),
        }
        masks = {} if sample_masks is None else sample_masks(self.seeds)
        moved = {
            name: value if name in HOST_INPUTS else value.to(device, non_blocking=True)
            for name, value in masks.items()
        }
        return {name: value for name, value in named.items() if value is not None} | moved

    def pin_memory(self) -> "LoadedBatch":
        index, labels = self.sample_index, self.labels
        return replace(
            self,
            images=self.images.pin_memory(),
            parameters=self.parameters.pin_memory(),
            sample_index=None if index is None else index.pin_memory(),
            labels=None if labels is None else labels.pin_memory(),
        )


class ProcessShare(NamedTuple):
    """The part of each batch that one process reads.

    Attributes:
        seed: seed of the run, below 2**64.
        batch_size: number of images in a micro-batch of this process.
        rank: number of this process.
        world_size: number of processes.
    """

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def images(self) -> int:
        """Return the number of images in a batch of all processes."""
        return self.batch_size * self.world_size

    def batches(self, rows: int) -> int:
        """Return the number of whole batches of all processes in an epoch of this number of rows."""
        return rows // self.images


def make_batch(
    images: list[Tensor] | Tensor | DeviceRows,
    seeds: np.ndarray,
    preset: ViewPreset,
    *,
    small: bool,
    **fields: Any,
) -> LoadedBatch:
    """Sample the augmentation parameters of B images, and crop the images if the device does not.

    Args:
        images: B tensors (C, H, W) uint8, or one tensor (B, C, H, W); or rows of images on the device.
        seeds: (B,) uint64.
        preset: the views.
        small: whether the inspected images of this data set are small and of one size. If a batch contains
            other images, this function crops it even if `small` is True.
        fields: further fields of `LoadedBatch`.
    """
    if isinstance(images, DeviceRows):
        sizes = np.tile(images.size, (len(images), 1))
        return LoadedBatch(images, sample_parameters(seeds, preset, sizes), seeds, **fields)
    sizes = np.array([tuple(image.shape[1:]) for image in images])
    parameters = sample_parameters(seeds, preset, sizes)
    if small and (sizes == sizes[0]).all() and is_small(sizes[0]):
        whole = torch.stack(images) if isinstance(images, list) else images
        return LoadedBatch(whole, parameters, seeds, **fields)
    return LoadedBatch(crop(list(images), parameters), parameters, seeds, **fields)


def is_small(size: Sequence[int] | np.ndarray | None) -> bool:
    """Return whether `size` (height, width) is that of small images; False for None (different sizes)."""
    return size is not None and max(size) <= MAX_SMALL_SIDE


class UnreadableData(UserError):
    """Data from which a loader cannot make another batch."""


@dataclass(frozen=True)
class WorkerFailure:
    """The reason why a worker cannot make another batch. The worker returns it instead of a batch.

    If the worker raised the error, torch would raise it again with the traceback of the worker as its text.
    """

    reason: str


def batch_or_error(batch: LoadedBatch | WorkerFailure) -> LoadedBatch:
    """Return the batch.

    Raises:
        UnreadableData: the worker returned a failure.
    """
    if isinstance(batch, WorkerFailure):
        raise UnreadableData(batch.reason)
    return batch


class BrokenCounter:
    """Counts images that cannot be read. An image counts once, even if several epochs try to read it.

    Args:
        max_fraction: largest share of all images that may be broken (`data.max_broken_fraction`). Fewer than
            16 broken images are always allowed if they are at most half of the images, except with 0.
        num_images: number of images in the data; None for a stream of unknown length. For such a stream, the
            share refers to the images read so far. It is checked from 100 images on, with a tolerance of
            three standard deviations.
    """

    def __init__(self, max_fraction: float, num_images: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.num_images = num_images
        self.read = 0
        self._found: dict[str, None] = {}

    @property
    def broken(self) -> int:
        """Number of different images that could not be read."""
        return len(self._found)

    def add(self, batch: LoadedBatch | WorkerFailure) -> None:
        """Count the images of a batch.

        `batch` can be a failure only if another loader wraps the training loader, as that of accelerate does.

        Raises:
            UserError: more images are broken than `max_fraction` allows, or `batch` is a failure.
        """
        batch = batch_or_error(batch)
        self.count(len(batch), batch.broken)

    def count(self, good: int, broken: list[str]) -> None:
        """Count images that were read, and messages about broken images.

        Raises:
            UserError: more images are broken than `max_fraction` allows.
        """
        self.read += good + len(broken)
        for message in broken:
            if message not in self._found:
                self._found[message] = None
                logger.warning("skipped a broken image: %s", message)
        if broken and self.broken > self._allowed():
            total = self.read if self.num_images is None else self.num_images
            share = min(1.0, math.ceil(100 * self.broken / total) / 100)
            raise UserError(
                f"data.max_broken_fraction: expected a share of at most {self.max_fraction:g} broken images, "
                f"got {self.broken} of {total} images (the last one is {broken[-1]}); to skip them, use "
                f"data.max_broken_fraction={max(2 * self.max_fraction, share):g}"
            )

    def _allowed(self) -> float:
        """Return the number of broken images that are allowed now."""
        few = _FEW_BROKEN if self.max_fraction > 0 else 0
        if self.num_images is not None:
            return max(self.max_fraction * self.num_images, min(few, self.num_images / 2))
        if self.read < _MIN_STREAMED_IMAGES:
            return math.inf
        expected = self.max_fraction * self.read
        return max(expected + 3 * math.sqrt(expected), few)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as JSON data."""
        return {"read": self.read, "found": list(self._found)}

    def merge(self, states: Iterable[dict[str, Any]]) -> None:
        """Replace the counts by the sums of all processes, this one included, of their `state_dict`."""
        states = list(states)
        self.read = sum(int(state["read"]) for state in states)
        self._found = dict.fromkeys(message for state in states for message in state["found"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts. Old states contain no messages, so their broken images are counted again."""
        self.read, self._found = int(state["read"]), dict.fromkeys(state.get("found", ()))
