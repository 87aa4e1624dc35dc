# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: the mean intersection over union (IoU) of a linear layer on frozen patch tokens.

As in DINOv2 (2304.07193, section 7.4), a BatchNorm and one linear layer map each patch token to the logits of
the classes. The logits are upsampled bilinearly. Differences: the tokens are cached, so the BatchNorm uses
the statistics of all training tokens, and there is no augmentation. The complete image is resized to a
square, without a crop and without sliding windows. Published numbers use larger images and augmentation, so
they are not comparable.

Legend: N images, K classes, P patches, D features, H, W pixels of a mask.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_values
from hf_ssl.errors import counted as words
from hf_ssl.evaluation.bootstrap import bootstrap_error
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.dense import (
    IGNORED,
    check_ignored,
    grid_side,
    nearest_pixels,
    patch_features,
    read_mask,
)
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs, Split, hold_out
from hf_ssl.evaluation.results import ProtocolResult, result_id
from hf_ssl.evaluation.scores import EDGE, by_setting, check_converged, is_at_edge
from hf_ssl.evaluation.segmentation import VOID, Heads, class_iou, mean_iou, pixel_counts, train_heads

VERSION = 1


@dataclass
class Config:
    """Settings.

    Attributes:
        size: side in pixels of the square to which images are resized; null: the size of the image processor.
            A larger size gives more patches. Convolutional networks and many transformers accept any size.
        learning_rates: initial learning rates. A head for each of them is trained on the same batches.
        epochs: number of epochs.
        batch_size: number of images in a batch.
        pixels: side of a patch in pixels at the size of the masks in the loss.
        classes: number of classes. A class number that is not below it raises an error; null: no check.
        ignored: class numbers of ignored pixels. With [0, 255], the background is ignored.
    """

    size: int | None = None
    learning_rates: list[float] = field(default_factory=lambda: [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1])
    epochs: int = 20
    batch_size: int = 16
    pixels: int = 4
    classes: int | None = None
    ignored: list[int] = field(default_factory=lambda: [IGNORED])

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        rates = list(self.learning_rates)
        numbers = [(key, getattr(self, key)) for key in ("epochs", "batch_size", "pixels")]
        check_values(
            where,
            ("size", self.size, self.size is None or self.size > 0, "a positive number or null"),
            ("learning_rates", rates, are_positive(rates), "one or more positive numbers"),
            *((key, number, number > 0, "a positive number") for key, number in numbers),
            ("classes", self.classes, self.classes is None or self.classes > 1, "at least 2 or null"),
        )
        check_ignored(where, self.ignored)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean IoU on the test images, with the pixel accuracy and the mean class accuracy.

    One head for each learning rate is trained on 90 % of the training images. A head with the best learning
    rate on the other 10 % is then trained on all training images. The standard error is that of a bootstrap
    over test images.

    Raises:
        UserError: the encoder has no patch tokens, a mask has another size than its image, there are fewer
            than two classes, or the training diverged.
    """
    device, name = inputs.device, "segmentation"
    train, test = (
        _Images(split, *patch_features(inputs, split, config.size, name))
        for split in (inputs.train, inputs.test)
    )
    side = grid_side(train.tokens, name) * config.pixels
    with inputs.progress("masks", len(train.sizes) + len(test.sizes)) as bar:
        small, seen = _read_masks(train, config, side, bar.update)
        seen_test = _read_masks(test, config, 1, bar.update)[1]
    for images, present in ((train, seen), (test, seen_test)):
        if not present.any():
            raise UserError(
                f"segmentation: expected pixels that count in the masks of split {images.split.name}, got "
                f"only {list(config.ignored)}; use another split, or evaluation.settings.segmentation.ignored"
            )
    counted = torch.nonzero(seen | seen_test)[:, 0]
    if len(counted) < 2:
        raise UserError(
            f"segmentation: expected masks with at least 2 classes, got {counted.tolist()}, without the "
            f"ignored {list(config.ignored)}; if these are classes, use "
            "evaluation.settings.segmentation.ignored=[]"
        )
    table = torch.full((256,), VOID, dtype=torch.int16)
    table[counted] = torch.arange(len(counted), dtype=torch.int16)
    targets, classes = table[small.long()], len(counted)
    kept, chosen = hold_out(len(targets), inputs.seed)
    generator = torch.Generator().manual_seed(inputs.seed)
    settings = (config.epochs, config.batch_size, generator)
    rates = sorted(set(config.learning_rates))
    with inputs.progress(name, 2 * config.epochs, "epoch") as bar:
        heads = train_heads(train.tokens, targets, classes, rates, *settings, kept, device, bar.update)
        found = mean_iou(train.counts(heads, chosen, table, classes).sum(dim=0)).nan_to_num(0.0).tolist()
        validation = dict(zip(rates, found, strict=True))
        best = max(rates, key=lambda rate: validation[rate])
        every = torch.arange(len(targets))
        heads = train_heads(train.tokens, targets, classes, [best], *settings, every, device, bar.update)
    check_converged(heads.weights, best, "evaluation.settings.segmentation.learning_rates")
    counts = test.counts(heads, torch.arange(len(test.sizes)), table, classes)[:, 0]
    return [_result(inputs, config, counts, counted, validation, train.tokens)]


class _Images(NamedTuple):
    """The split, the patch tokens (N, P, D) and the sizes (H, W) of some images."""

    split: Split
    tokens: Tensor
    sizes: list[tuple[int, int]]

    def counts(self, heads: Heads, rows: Tensor, table: Tensor, classes: int) -> Tensor:
        """Return `pixel_counts` of some images. The table (256,) maps class numbers to positions."""
        masks = (table[read_mask(self.split, row, self.sizes[row]).long()] for row in rows.tolist())
        tokens = (self.tokens[row] for row in rows.tolist())  # `self.tokens[rows]` would copy them all
        return pixel_counts(heads, tokens, masks, classes)


def _read_masks(
    images: _Images, config: Config, side: int, advance: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Return the resized masks (N, side, side), and which numbers the originals contain (256,).

    Ignored numbers are left out of the second tensor.

    Raises:
        UserError: a class number is not below `config.classes`.
    """
    small = torch.empty(len(images.sizes), side, side, dtype=torch.uint8)
    seen = torch.zeros(256, dtype=torch.bool)
    for row, size in enumerate(images.sizes):
        mask = read_mask(images.split, row, size)
        found = mask.flatten().bincount(minlength=256) > 0
        found[list(config.ignored)] = False
        if config.classes is not None and bool(found[config.classes :].any()):
            raise UserError(
                f"segmentation: expected class numbers below {config.classes} in the masks, got "
                f"{int(torch.nonzero(found)[-1])} in image {row} of split {images.split.name}; use "
                "evaluation.settings.segmentation.classes or ignored"
            )
        seen |= found
        small[row] = nearest_pixels(mask, side, side)
        advance(1)
    return small, seen


def _result(
    inputs: Inputs,
    config: Config,
    counts: Tensor,
    numbers: Tensor,
    validation: dict[float, float],
    tokens: Tensor,
) -> ProtocolResult:
    """Return the result.

    Args:
        inputs, config: the images and the settings.
        counts: (N, 3, K), numbers of pixels of the test images.
        numbers: (K,), the class numbers in the masks.
        validation: {learning rate: mean IoU on held-out images}.
        tokens: the training tokens.
    """
    rates, best = list(validation), max(validation, key=lambda rate: validation[rate])
    at_edge = is_at_edge(rates, best)
    total, of_epochs = counts.sum(dim=0), words(config.epochs, "epoch")
    iou, pixels = class_iou(total), int(total[2].sum())
    side, grid = config.size or inputs.image_size, grid_side(tokens, "segmentation")
    return ProtocolResult(
        protocol="segmentation",
        id=result_id("segmentation", VERSION, asdict(config) | {"seed": inputs.seed}),
        key="segmentation_miou",
        metric="mean_iou",
        title="Mean intersection over union of a linear segmentation head",
        column="segmentation mIoU",
        text=f"a linear layer on {grid} x {grid} frozen, standardized patch tokens gives the logits of "
        f"{len(numbers)} classes. Whole images are resized to {side} x {side} pixels. Logits are upsampled "
        f"bilinearly to the size of the mask. Optimizer: AdamW, {of_epochs}, batch size "
        f"{config.batch_size}, cosine schedule, without augmentation. The learning rate "
        f"{best:g}{EDGE * at_edge} had the highest value on a held-out {SELECTED_ON} ({len(rates)} tested). "
        f"The final layer was trained on all {inputs.train} and tested on {inputs.test}, without ignored "
        "pixels",
        value=float(mean_iou(total)),
        standard_error=_standard_error(counts, inputs.seed),
        metrics={
            "pixel_accuracy": int(total[0].sum()) / pixels,
            "mean_class_accuracy": float((total[0].double() / total[2]).nanmean()),
        },
        selection={"learning_rate": best},
        selected_on=SELECTED_ON,
        details={
            "at_edge": at_edge,
            "validation_miou": validation[best],
            "validation": by_setting(validation),
            "class_iou": {
                str(number): None if math.isnan(value) else value
                for number, value in zip(numbers.tolist(), iou.tolist(), strict=True)
            },
            "patches": tokens.shape[1],
        },
    )


def _standard_error(counts: Tensor, seed: int) -> float:
    """Return the bootstrap error of the mean IoU over test images, from `pixel_counts` (N, 3, K)."""
    flat = counts.double().flatten(1)

    def value(rows: np.ndarray) -> float:
        times = torch.from_numpy(np.bincount(rows, minlength=len(counts))).double()
        return float(mean_iou((times @ flat).unflatten(0, counts.shape[1:])))

    return bootstrap_error(value, len(counts), seed)
