# SPDX-License-Identifier: Apache-2.0
"""What the loader hands to the trainer: uint8 pixels and what was drawn for them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ssl.views import Crops, ViewParameters, ViewPreset, Views, augment, crop, sample_parameters

Draw = Callable[[np.ndarray], dict[str, Tensor]]

SMALL = 96
"""Images of one size up to this side are cropped on the model's device, larger ones in the loader."""


@dataclass(frozen=True)
class HeldRows:
    """Images of a data set that lies on the model's device, whose pixels are taken when they are needed.

    Attributes:
        rows: (B,) int64 row numbers.
        size: height and width of all images.
        pixels: (N, C, H, W) uint8, all images; None while the batch is on its way from a worker.
    """

    rows: Tensor
    size: tuple[int, int]
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, samples: slice) -> "HeldRows":
        return replace(self, rows=self.rows[samples])

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Tensor:
        """The pixels (B, C, H, W); only row numbers travel to where they lie."""
        if self.pixels is None:
            raise RuntimeError("these rows came from a loader that does not hold their images")
        found = self.pixels[self.rows.to(self.pixels.device, non_blocking=non_blocking)]
        return found.to(device, non_blocking=non_blocking)

    def pin_memory(self) -> "HeldRows":
        return replace(self, rows=self.rows.pin_memory())


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch of one process. Legend: B batch, C channels, H, W sides.

    Attributes:
        images: (B, C, H, W) uint8, the crops of stage one, or the rows of images on the device.
        parameters: what `views.augment` needs to finish the views.
        seeds: (B,) uint64 on the host, of everything that is drawn for an image.
        sample_index: (B,) int64 row numbers; None for a stream.
        broken: "where: reason" for each image that could not be read and was replaced or skipped.
        position: after this batch, of a stream of this process, in terms that JSON knows; else None.
    """

    images: Tensor | Crops | HeldRows
    parameters: ViewParameters
    seeds: np.ndarray
    sample_index: Tensor | None = None
    broken: list[str] = field(default_factory=list)
    position: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, samples: slice) -> "LoadedBatch":
        """Some of the images, as views of this batch's memory."""
        images = self.images
        if isinstance(images, Crops):
            local = None if images.local_crops is None else images.local_crops[samples]
            part: Tensor | Crops | HeldRows = Crops(images.global_crops[samples], local)
        else:
            part = images[samples]
        index = None if self.sample_index is None else self.sample_index[samples]
        seeds = self.seeds[samples]
        return LoadedBatch(part, self.parameters[samples], seeds, index, self.broken, self.position)

    def split(self, size: int) -> "list[LoadedBatch]":
        """Parts of at most `size` images, as views of this batch's memory."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def views(self, device: torch.device | str | int) -> Views:
        """The views of these images, made on `device`."""
        # out of pinned memory a copy to a GPU does not wait, and what is queued behind it sees it finished
        images = self.images.to(device, non_blocking=torch.device(device).type == "cuda")
        return augment(images, self.parameters)

    def inputs(self, device: torch.device | str | int, draw: "Draw | None" = None) -> dict[str, Tensor]:
        """The model's batch of this one, made on `device`: the arguments of a method's `forward`.

        Args:
            device: where the views are made.
            draw: the method's, for what it draws beside views (`SSLPreTrainedModel.draw`).
        """
        views, index = self.views(device), self.sample_index
        named = {
            "pixel_values": views.pixel_values,
            "local_pixel_values": views.local_pixel_values,
            "sample_index": None if index is None else index.to(device, non_blocking=True),
        }
        drawn = {} if draw is None else draw(self.seeds)
        moved = {name: value.to(device, non_blocking=True) for name, value in drawn.items()}
        return {name: value for name, value in named.items() if value is not None} | moved

    def pin_memory(self) -> "LoadedBatch":
        index = self.sample_index
        return replace(
            self,
            images=self.images.pin_memory(),
            parameters=self.parameters.pin_memory(),
            sample_index=None if index is None else index.pin_memory(),
        )


@dataclass(frozen=True)
class Failure:
    """What a worker hands on in place of a batch when it cannot go on.

    Were it raised there, it would arrive here wrapped in the text of the worker's traceback.
    """

    reason: str


def assemble(
    images: list[Tensor] | Tensor | HeldRows,
    seeds: np.ndarray,
    preset: ViewPreset,
    *,
    small: bool,
    **rest: Any,
) -> LoadedBatch:
    """Draws the parameters of a batch, and crops unless that is left to the device.

    Args:
        images: B tensors (C, H, W) uint8, or one (B, C, H, W); or rows that lie on the device.
        seeds: (B,) uint64.
        preset: the views.
        small: whether this data set's images are small and of one size. A batch that is not as expected is
            cropped here all the same.
        rest: further fields of `LoadedBatch`.
    """
    if isinstance(images, HeldRows):
        sizes = np.tile(images.size, (len(images), 1))
        return LoadedBatch(images, sample_parameters(seeds, preset, sizes), seeds, **rest)
    sizes = np.array([tuple(image.shape[1:]) for image in images])
    parameters = sample_parameters(seeds, preset, sizes)
    if small and (sizes == sizes[0]).all() and sizes.max() <= SMALL:
        whole = torch.stack(images) if isinstance(images, list) else images
        return LoadedBatch(whole, parameters, seeds, **rest)
    return LoadedBatch(crop(list(images), parameters), parameters, seeds, **rest)
