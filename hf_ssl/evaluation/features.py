# SPDX-License-Identifier: Apache-2.0
"""From images to features: one row of numbers an image, taken from a frozen encoder.

Legend: B images in a batch, N images in all, C channels, H height, W width, T tokens, D features.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.pooling import Pooling, pool
from hf_ssl.progress import progress


def is_convolutional(model: nn.Module) -> bool:
    """Whether images in `channels_last` order pay: a transformer's one convolution is its patch embedding."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def pixel_values(processor: Any, images: list[Tensor], device: torch.device) -> Tensor:
    """The processor's float32 (B, C, H, W) of uint8 (C, H, W) images, on `device`.

    Images of one size move in one copy, and are enlarged there. The layout is said aloud, because a guess
    takes an image three pixels high for one with its channels last.
    """
    # This check does not import the class, because the import loads timm.
    timm_wrapper = sys.modules.get("transformers.models.timm_wrapper.image_processing_timm_wrapper")
    if timm_wrapper is not None and isinstance(processor, timm_wrapper.TimmWrapperImageProcessor):
        # timm's transforms accept only PIL images and one option
        photos = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return processor(photos, return_tensors="pt")["pixel_values"].to(device)
    if len({image.shape for image in images}) == 1:
        images = list(torch.stack(images).to(device, non_blocking=True).unbind())
    processed = processor(images, return_tensors="pt", input_data_format="channels_first", device=device)
    return processed["pixel_values"]


def extract_features(
    model: nn.Module,
    processor: Any,
    image_batches: Iterable[list[Tensor]],
    *,
    pooling: Pooling = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    total: int | None = None,
    description: str | None = None,
) -> Tensor:
    """Features of images by a frozen encoder, in eval mode and without gradient.

    The encoder's weights, its modules' training flags and the global random state are the same afterwards;
    with `device` given, the encoder stays on it.

    Args:
        model: a transformers vision encoder (or anything that takes `pixel_values` and returns such an
            output).
        processor: the encoder's image processor.
        image_batches: lists of uint8 tensors (C, H, W), of any size.
        pooling: see `pool`; "auto" follows `pooling_rule`.
        device: where to compute; None: where the encoder is.
        dtype: torch.bfloat16 or torch.float16 computes under autocast (about twice as fast, features rounded
            to about three digits); None: in the encoder's own precision.
        total: number of images, where it is known: for the progress bar, and to hold the features once in
            memory.
        description: text of the progress bar, which appears after two seconds; None: no bar.

    Returns:
        float32 (N, D), on the CPU.

    Raises:
        UserError: there is no image, or there are more than `total`.
    """
    return extract_poolings(
        model,
        processor,
        image_batches,
        poolings=[pooling],
        device=device,
        dtype=dtype,
        total=total,
        description=description,
    )[pooling]


def extract_poolings(
    model: nn.Module,
    processor: Any,
    image_batches: Iterable[list[Tensor]],
    *,
    poolings: Sequence[Pooling],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    total: int | None = None,
    description: str | None = None,
) -> dict[Pooling, Tensor]:
    """As `extract_features`, for several poolings in one pass: float32 (N, D) for each."""
    device = torch.device(device) if device is not None else next(model.parameters()).device
    model.to(device)
    memory_format = torch.channels_last if is_convolutional(model) else torch.contiguous_format
    rows = {pooling: _Rows(total) for pooling in poolings}
    with evaluation_mode(model), progress(description, total) as bar:
        for images in image_batches:
            if not images:
                continue
            pixels = pixel_values(processor, images, device).contiguous(memory_format=memory_format)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                outputs = model(pixel_values=pixels)
            for pooling, found in rows.items():
                found.append(pool(outputs, pooling, model))
            bar.update(len(images))
    return {pooling: found.tensor() for pooling, found in rows.items()}


def raw_pixels(
    image_batches: Iterable[list[Tensor]],
    size: int,
    *,
    total: int | None = None,
    description: str | None = None,
) -> Tensor:
    """The baseline that every encoder must beat: the pixels themselves as features.

    Shortest edge to `size` (bilinear, antialiased), centre crop, [0, 1], flattened, and each image's own mean
    removed: without that, the cosine compares little but brightness. Of the raw, dataset-centred and
    image-centred forms the last was the strongest on the whole over five data sets (CIFAR-10, 10,000 images,
    20-NN: 0.31, 0.38, 0.40).

    Args:
        image_batches: lists of uint8 tensors (C, H, W), of any size and of one number of channels.
        size: side in pixels.
        total, description: as for `extract_features`.

    Returns:
        float32 (N, C * size * size).

    Raises:
        UserError: there is no image, or there are more than `total`.
    """
    rows = _Rows(total)
    with progress(description, total) as bar:
        for images in image_batches:
            if not images:
                continue
            pixels = torch.stack([_square(image, size) for image in images]).flatten(1) / 255
            rows.append(pixels - pixels.mean(dim=1, keepdim=True))
            bar.update(len(images))
    return rows.tensor()


def _square(image: Tensor, size: int) -> Tensor:
    """float32 (C, size, size), in 0 to 255: the middle of one uint8 image."""
    height, width = image.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    middle = image[:, top : top + edge, left : left + edge].float()
    if edge == size:
        return middle
    # Cropping first gives the same picture for less work.
    return F.interpolate(
        middle[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]


class _Rows:
    """Collects batches of rows; where their number is known, without holding them twice."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.count = 0
        self.store: Tensor | None = None
        self.parts: list[Tensor] = []

    def append(self, batch: Tensor) -> None:
        batch = batch.float().cpu()
        first, self.count = self.count, self.count + len(batch)
        if self.total is None:
            self.parts.append(batch)
            return
        if self.count > self.total:
            raise UserError(f"expected {self.total} images, got at least {self.count}.")
        if self.store is None:
            with torch.inference_mode(False):  # an ordinary tensor: a caller may train a head on it
                self.store = torch.empty(self.total, batch.shape[1])
        self.store[first : self.count] = batch

    def tensor(self) -> Tensor:
        if self.count == 0:
            raise UserError("there is no image to take features from.")
        return torch.cat(self.parts) if self.store is None else self.store[: self.count]
