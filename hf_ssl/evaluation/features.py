# SPDX-License-Identifier: Apache-2.0
"""Extraction of features with a frozen encoder: one feature vector per image (layer 1).

Legend: B images in a batch, N images in total, C channels, H height, W width, D features.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.allocation import kept_memory
from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import check_patch_grid
from hf_ssl.evaluation.encoders import device_of, dtype_of, is_convolutional, pixel_values
from hf_ssl.modeling.configuration import size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.further_features import FurtherFeatures
from hf_ssl.modeling.image_encoders import image_encoder
from hf_ssl.modeling.pooling import FEATURES, LAST_BLOCKS, POOLINGS, Pooling, pool
from hf_ssl.precision import autocast
from hf_ssl.progress import progress

FULL_TOKENS = 2**28  # bytes of tokens that are kept in float32
_HALF_MAX = torch.finfo(torch.float16).max
WIDEST = "cls_last4_mean"
COLUMNS = {
    "cls": (LAST_BLOCKS - 1, LAST_BLOCKS),
    "cls_mean": (LAST_BLOCKS - 1, LAST_BLOCKS + 1),
    "cls_last4": (0, LAST_BLOCKS),
}
"""Feature -> its first and last columns in the widest feature, in units of D."""


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
    """Return the features (N, D) that a frozen encoder computes in evaluation mode and without gradient.

    The call does not change the encoder's weights, the training flags of its modules or the global random
    state. If `device` is given, the encoder stays on it.

    Args:
        model: a transformers vision encoder, or a module with the same input `pixel_values` and output.
        processor: the encoder's image processor.
        image_batches: lists of uint8 tensors (C, H, W), of any size.
        pooling: see `pool`; "auto" follows `pooling_rule`.
        device: device of the computation; None: the device of the encoder.
        dtype: torch.bfloat16 or torch.float16 for autocast, which rounds the features to about three digits
            and is faster on suitable hardware only (`hf_ssl.precision`). None: the precision of the encoder.
        total: number of images, if known, for the progress bar. If it is None, the features need twice the
            memory while they are concatenated.
        description: text of the progress bar, which appears after 1.5 seconds; None: no bar.

    Returns:
        float32 (N, D), on the CPU.

    Raises:
        UserError: there is no image, there are more than `total`, the images are not uint8 tensors, or
            `device_of` raises.
    """
    return extract_poolings(
        image_encoder(model),
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
    poolings: Sequence[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    total: int | None = None,
    description: str | None = None,
    processes: int = 1,
) -> dict[str, Tensor]:
    """Return the features (N, D) for each pooling and each further feature from one pass.

    Args:
        poolings: values of `Pooling`, and names of `FEATURES` that the encoder has. "tokens" (N, P, D) are in
            half precision if they take more than 256 MiB.
        processes: number of processes that share the `total` images, for the progress bar.
        Others: as for `extract_features`.

    Raises:
        UserError: the tokens would take more than half of the free memory, or `extract_features` raises.
    """
    device, weights = device_of(model, device), dtype_of(model)
    memory_format = torch.channels_last if is_convolutional(model) else torch.contiguous_format
    # The widest feature contains the others, as columns.
    wide = WIDEST if WIDEST in poolings else None
    rows = {name: _Rows(total) for name in poolings if wide is None or name not in COLUMNS}
    if wide is not None:
        rows[wide] = _Rows(total)
    further_names = [name for name in rows if name in FEATURES and name not in POOLINGS]
    with FurtherFeatures(model, further_names) as further, evaluation_mode(model):
        with kept_memory(device.type), progress(description, total) as bar:
            for images in image_batches:
                if not len(images):
                    continue
                pixels = pixel_values(processor, images, device).to(weights, memory_format=memory_format)
                with autocast(device, dtype):
                    outputs = model(pixel_values=pixels, **size_arguments(model, pixels))
                    read = {name: further.read(outputs, name) for name in further_names}
                for name, found in rows.items():
                    given = read[name] if name in read else pool(outputs, cast(Pooling, name), model)
                    found.append(given)
                bar.update(processes * len(images))
    features = {name: found.tensor() for name, found in rows.items()}
    if wide is not None:
        size = features[wide].shape[1] // (LAST_BLOCKS + 1)
        for name in poolings:
            if name in COLUMNS:
                first, end = COLUMNS[name]
                features[name] = features[wide][:, first * size : end * size]
    return {name: features[name] for name in poolings}


class PatchGrid(nn.Module):
    """An encoder of images whose feature is the mean feature of a grid of patches, as in the papers of CPC.

    Args:
        encoder: a vision encoder of transformers. It encodes each patch separately.
        patch, stride: side of a patch and distance of neighboring patches, in pixels.
        pooling: pooling of the feature of a patch, see `pool`.
    """

    def __init__(self, encoder: Any, patch: int, stride: int, pooling: Pooling = "auto") -> None:
        super().__init__()
        self.encoder, self.patch, self.stride, self.pooling = encoder, patch, stride, pooling

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return `pooler_output` (B, D) of images (B, C, H, W).

        Raises:
            UserError: the grid does not cover the images.
        """
        patch, stride = self.patch, self.stride
        check_patch_grid(patch, stride, *pixel_values.shape[-2:])
        windows = pixel_values.unfold(2, patch, stride).unfold(3, patch, stride).permute(0, 2, 3, 1, 4, 5)
        patches = windows.flatten(0, 2)
        # The patches have more pixels than the images, so they are encoded in several passes.
        at_once = max(1, pixel_values[:, 0].numel() // patch**2)
        arguments = size_arguments(self.encoder, patches)
        outputs = (self.encoder(pixel_values=part, **arguments) for part in patches.split(at_once))
        encoded = torch.cat([pool(each, self.pooling, self.encoder) for each in outputs])
        return {"pooler_output": encoded.unflatten(0, (len(pixel_values), -1)).mean(1)}


def raw_pixels(
    image_batches: Iterable[list[Tensor]],
    size: int,
    *,
    total: int | None = None,
    description: str | None = None,
) -> Tensor:
    """Return the pixels of each image as features, a baseline for every encoder.

    The shortest edge is resized to `size` (bilinear, antialiased). The center crop is scaled to [0, 1] and
    flattened, and the mean of each image is subtracted. Without this subtraction, the cosine mainly compares
    brightness. Raw, dataset-centered and image-centered pixels were compared on five data sets. The
    image-centered form had the best overall accuracy (CIFAR-10, 10,000 images, 20-NN: 0.31, 0.38, 0.40).

    Args:
        image_batches: lists of uint8 tensors (C, H, W), of any size and all with the same number of channels.
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
    """Return the resized center crop of one uint8 image, float32 (C, size, size) from 0 to 255."""
    height, width = image.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    middle = image[:, top : top + edge, left : left + edge].float()
    if edge == size:
        return middle
    # Cropping before resizing gives the same image with less computation.
    return F.interpolate(middle[None], (size, size), mode="bilinear", antialias=True)[0]


class _Rows:
    """Collects batches of rows. If their number is known, memory holds them only once."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.count = 0
        self.store: Tensor | None = None
        self.parts: list[Tensor] = []

    def append(self, batch: Tensor) -> None:
        first, self.count = self.count, self.count + len(batch)
        batch = self._stored(batch).cpu()
        if self.total is None:
            self.parts.append(batch)
            return
        if self.count > self.total:
            raise UserError(f"images: expected {self.total}, got at least {self.count}")
        if self.store is None:
            with torch.inference_mode(False):  # A caller can train a head on a normal tensor.
                self.store = torch.empty(self.total, *batch.shape[1:], dtype=batch.dtype)
        self.store[first : self.count] = batch

    def _stored(self, batch: Tensor) -> Tensor:
        """Return rows in float32, or many tokens in float16, which keeps three digits.

        Raises:
            UserError: the tokens need too much memory.
        """
        if batch.ndim < 3 or self.store is not None:
            kept = self.store.dtype if self.store is not None else torch.float32
            return _half(batch) if kept == torch.float16 else batch.float()
        images = self.count if self.total is None else self.total
        numbers = images * batch[0].numel()
        if 4 * numbers <= FULL_TOKENS:
            return batch.float()
        free = psutil.virtual_memory().available // 2
        if 2 * numbers > free:
            shape = " x ".join(str(size) for size in batch.shape[1:])
            raise UserError(
                f"evaluation: expected tokens of at most {free / 2**30:.1f} GiB, half of the free memory, "
                f"got {2 * numbers / 2**30:.1f} GiB for {images:,} images ({shape} numbers); lower "
                "evaluation.max_train_images"
            )
        return _half(batch)

    def tensor(self) -> Tensor:
        if self.count == 0:
            raise UserError("images: expected at least one, got no image")
        if self.store is not None:
            return self.store[: self.count]
        kinds = {part.dtype for part in self.parts}
        return torch.cat([part.half() for part in self.parts] if len(kinds) > 1 else self.parts)


def _half(batch: Tensor) -> Tensor:
    """Return numbers in float16. Finite numbers are clipped to its range. Infinity stays infinite."""
    return torch.where(batch.isinf(), batch, batch.clamp(-_HALF_MAX, _HALF_MAX)).half()
