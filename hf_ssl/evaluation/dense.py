# SPDX-License-Identifier: Apache-2.0
"""Patch tokens and masks for the evaluation of dense features (layer 1).

The protocols for masks resize each image to a square, without a crop, so that the patches cover the complete
mask. For the test, the mask keeps its size, and predictions are upsampled to this size.

Legend: N images, B images in a batch, C channels, H, W pixels of a mask, S side of the square in pixels, h, w
rows and columns of patches, P = h * w patches, D features.
"""

from collections.abc import Iterable, Iterator
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.evaluation.encoders import checked_normalization, first_output
from hf_ssl.evaluation.features import extract_poolings
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.modeling.further_features import FurtherFeatures

IGNORED = 255
"""Class number of ignored pixels in PASCAL VOC and most other data sets."""


class SquareProcessor:
    """An image processor that resizes complete images to a square.

    Args:
        processor: the image processor of the encoder, which gives the mean and the standard deviation.
        side: S.
    """

    def __init__(self, processor: Any, side: int) -> None:
        self.processor, self.side = processor, side
        self._normalization: tuple[list[float], list[float]] | None = None

    def __call__(
        self, images: list[Tensor], *, device: torch.device | str = "cpu", **options: Any
    ) -> dict[str, Tensor]:
        """Return `pixel_values` (B, C, S, S) of uint8 images (C, H, W), resized bilinearly with antialias.

        Args:
            images: of any sizes.
            device: device of the result.
            options: arguments that only other processors use.

        Raises:
            UserError: `checked_normalization` raises.
        """
        size = (self.side, self.side)
        resized = [
            F.interpolate(image[None].to(device).float(), size, mode="bilinear", antialias=True)
            for image in images
        ]
        pixels = torch.cat(resized) / 255
        if self._normalization is None:
            self._normalization = checked_normalization(self.processor, pixels.shape[1])
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in self._normalization)
        return {"pixel_values": (pixels - mean) / std}


def patch_features(
    inputs: Inputs, split: Split, side: int | None, protocol: str
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the patch tokens (N, P, D) of the images of a split, and the sizes (H, W) of the images.

    For a convolutional network, the positions of its feature map are the tokens. The grid is a square.

    Args:
        inputs, split: the encoder and the images.
        side: S; None: the size of the images of the image processor.
        protocol: name for messages and progress bars.

    Raises:
        UserError: the encoder has no patch tokens, or does not accept images of this size.
    """
    encoder = inputs.encoder
    processor = SquareProcessor(inputs.processor, side or inputs.image_size)
    first = next(iter(split.images.iter_batches(1)))
    with FurtherFeatures(encoder, ["tokens"]) as further:
        _, outputs = first_output(encoder, processor, first, inputs.device)
        if "tokens" not in further.available(outputs):
            raise UserError(
                f"{protocol}: expected an encoder that returns patch tokens or a feature map, got "
                f"{type(encoder).__name__}; use a ViT, ResNet, ConvNeXt or Swin"
            )
    sizes: list[tuple[int, int]] = []

    def batches() -> Iterator[list[Tensor]]:
        for batch in split.images.iter_batches(inputs.batch_size):
            sizes.extend((image.shape[-2], image.shape[-1]) for image in batch)
            yield batch

    text = None if inputs.description is None else f"{inputs.description}, patch tokens, {split.name}"
    tokens = extract_poolings(
        encoder, processor, batches(), poolings=["tokens"], device=inputs.device, dtype=inputs.dtype,
        total=len(split), description=text,
    )["tokens"]  # fmt: skip
    grid_side(tokens, protocol)
    return tokens, sizes


def grid_side(tokens: Tensor, protocol: str) -> int:
    """Return h = w of patch tokens (N, P, D), or raise UserError if they do not form a square."""
    side = isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise UserError(
            f"{protocol}: expected a square grid of patch tokens, got {tokens.shape[1]}; use another encoder"
        )
    return side


def read_mask(split: Split, row: int, size: tuple[int, int]) -> Tensor:
    """Return the mask (H, W) uint8 of an image.

    Args:
        split: has the masks.
        row: number of the image.
        size: (H, W) of the image.

    Raises:
        UserError: the mask has another size than its image, or cannot be read.
    """
    mask = torch.as_tensor(split.targets["masks"][row])
    if tuple(mask.shape) != tuple(size):
        raise UserError(
            f"data.mask_column: expected a mask of the size of its image, {size[0]} x {size[1]} pixels, got "
            f"{' x '.join(map(str, mask.shape))} in image {row} of split {split.name}; resize it"
        )
    return mask


def nearest_pixels(values: Tensor, height: int, width: int) -> Tensor:
    """Return values (..., H, W), resized to (..., height, width) by nearest-neighbor interpolation.

    The distance is that of the centers of pixels, as in the mode "nearest-exact" of torch.
    """
    rows, columns = (
        ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new).long().to(values.device)
        for new, old in ((height, values.shape[-2]), (width, values.shape[-1]))
    )
    return values[..., rows[:, None], columns]


def check_ignored(where: str, ignored: Iterable[int]) -> list[int]:
    """Return the class numbers of ignored pixels, or raise UserError for one outside of 0 to 255."""
    numbers = list(ignored)
    if not all(0 <= number <= 255 for number in numbers):
        raise UserError(f"{where}.ignored: expected numbers from 0 to 255, got {numbers}")
    return numbers
