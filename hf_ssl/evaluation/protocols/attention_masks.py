# SPDX-License-Identifier: Apache-2.0
"""Segmentation from attention: the Jaccard index of masks from the attention of the last block.

As in DINO (2104.14294, section 4.2.2 and figure 4), each head gives a mask. It is the smallest set of patches
that has 60 % of the attention of the class token. The figure reports the best head. Neither the paper nor its
code states how this head is selected. Naseer et al. (2105.10497) select it in each image by the test mask.
Such a selection uses the ground truth. Therefore, the main number here is that of one head, which is selected
on training images. The number with the best head of each test image is a second result with its own column.

Differences from the code of Naseer et al.: ignored pixels belong neither to the intersection nor to the
union. The patches are compared with the mask at its own size. Their code compares each class of an
image separately, as `objects: classes` does here.

Legend: N images, O objects of an image, A heads, h, w rows and columns of patches, H, W pixels of a mask.
"""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_name, check_values
from hf_ssl.evaluation.attention import attention_maps, patch_size, threshold_attention
from hf_ssl.evaluation.dense import IGNORED, SquareProcessor, check_ignored, nearest_pixels, read_mask
from hf_ssl.evaluation.encoders import pixel_values
from hf_ssl.evaluation.inputs import Inputs, Split, read_rows
from hf_ssl.evaluation.results import ProtocolResult, mean_error, result_id
from hf_ssl.evaluation.statistics import evenly_spaced

VERSION = 1
OBJECTS = ("foreground", "classes")


@dataclass
class Config:
    """Settings.

    Attributes:
        mass: share of the attention in the mask of a head.
        size: side in pixels of the square to which images are resized; null: the size of the image processor.
        objects: "foreground": all pixels of other classes than the background are one object; "classes": the
            value of an image is the mean over its classes, each of which has its own best head.
        background: class number of the background.
        ignored: class numbers of ignored pixels.
        train_images: largest number of training images that select the head, evenly spaced in the split.
    """

    mass: float = 0.6
    size: int | None = None
    objects: str = "foreground"
    background: int = 0
    ignored: list[int] = field(default_factory=lambda: [IGNORED])
    train_images: int = 500

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        check_name(f"{where}.objects", self.objects, OBJECTS, "foreground or classes")
        check_values(
            where,
            ("mass", self.mass, 0 < self.mass <= 1, "a share above 0 and at most 1"),
            ("size", self.size, self.size is None or self.size > 0, "a positive number or null"),
            ("background", self.background, 0 <= self.background <= 255, "a number from 0 to 255"),
            ("train_images", self.train_images, self.train_images > 0, "a positive number"),
        )
        check_ignored(where, self.ignored)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean Jaccard index of two selections: the best head on training images, and the best head
    of each test image.

    Raises:
        UserError: the encoder has no attention maps, `size` is not a multiple of the patch size, a mask has
            another size than its image, or fewer than two images of a split have an object.
    """
    patch = patch_size(inputs.encoder)  # raises for an encoder without attention maps
    if (side := config.size or inputs.image_size) % patch:
        raise UserError(
            f"evaluation.settings.attention_masks.size: expected a multiple of the patch size {patch}, got "
            f"{side}; use {max(1, round(side / patch)) * patch}"
        )
    train = head_scores(inputs, inputs.train, config, config.train_images)
    test = head_scores(inputs, inputs.test, config)
    head = int(train.fixed.mean(dim=0).argmax())
    size = config.size or inputs.image_size
    objects = (
        "all pixels of objects" if config.objects == "foreground" else "the pixels of each class (averaged)"
    )
    missing = len(inputs.test) - len(test.fixed)
    without = f". Test images without an object are left out ({missing:,})" if missing else ""
    text = (
        f"Jaccard index between {objects} and the patches with {100 * config.mass:g} % of the attention of "
        f"the {train.query} in the last block. Whole images are resized to {size} x {size} pixels."
    )
    settings = asdict(config)
    return [
        _result(
            settings,
            test.fixed[:, head],
            key="attention_jaccard",
            title="Jaccard index of attention masks",
            column="attention masks, one head",
            text=f"{text} The head {head + 1} of {train.fixed.shape[1]} had the highest value on "
            f"{len(train.fixed):,} training images. Tested on {inputs.test}{without}",
            metrics={
                "mean_of_heads": float(test.fixed.mean()),
                "whole_image": float(test.whole.mean()),  # of a mask of all patches
            },
            selection={"head": head},
            selected_on=f"{len(train.fixed):,} training images",
            details={
                "train_jaccard": train.fixed.mean(dim=0).tolist(),
                "test_jaccard": test.fixed.mean(dim=0).tolist(),
            },
        ),
        _result(
            settings,
            test.best,
            key="attention_jaccard_best_head",
            title="Jaccard index of attention masks of the best head of each test image",
            column="attention masks, best head by test mask",
            text=f"{text} The best one of {train.fixed.shape[1]} heads is selected for each test image by "
            f"its mask, as in publications, so the value is too optimistic. Tested on {inputs.test}{without}",
            metrics={},
            selection={"head": "the best one of each test image"},
            selected_on="the masks of the test images",
            details={},
        ),
    ]


def _result(settings: dict[str, object], values: Tensor, **others: object) -> ProtocolResult:
    """Return a result with the mean of the values (N,) of the images."""
    result = others | {
        "protocol": "attention_masks",
        "metric": "jaccard_index",
        "id": result_id("attention_masks", VERSION, settings | {"key": others["key"]}),
        "value": float(values.mean()),
        "standard_error": mean_error(values.tolist()),
    }
    return ProtocolResult(**result)  # type: ignore[typeddict-item]


@dataclass
class HeadScores:
    """Jaccard indices of the images with an object, float64.

    Attributes:
        fixed: (N, A), for each head.
        best: (N,), for the best head of each object, averaged over the objects of the image.
        whole: (N,), for a mask of all patches.
        query: the query of the attention, "class token" or "mean of the patches".
    """

    fixed: Tensor
    best: Tensor
    whole: Tensor
    query: str


def head_scores(inputs: Inputs, split: Split, config: Config, most: int | None = None) -> HeadScores:
    """Return the Jaccard indices of images of a split.

    Args:
        inputs, split, config: the encoder, the images and the settings.
        most: largest number of images, which are evenly spaced; None: all.

    Raises:
        UserError: fewer than two images have an object, or a mask has another size than its image.
    """
    processor = SquareProcessor(inputs.processor, config.size or inputs.image_size)
    wanted = evenly_spaced(len(split), len(split) if most is None else most)
    rows: list[tuple[Tensor, float, Tensor]] = []
    query = ""
    with inputs.progress(f"attention masks, {split.name}", len(wanted)) as bar:
        for chosen in read_rows(split.images, wanted, min(inputs.batch_size, 32)):
            pixels = pixel_values(processor, [image for _, image in chosen], inputs.device)
            maps = attention_maps(inputs.encoder, pixels)
            query = maps.query
            for (number, image), kept in zip(
                chosen, threshold_attention(maps.heads, config.mass), strict=True
            ):
                mask = read_mask(split, number, (image.shape[-2], image.shape[-1]))
                if (scores := object_scores(kept, mask, config)) is not None:
                    rows.append((scores.mean(dim=0), float(scores.amax(dim=1).mean()), _whole(mask, config)))
            bar.update(len(chosen))
    if len(rows) < 2:
        raise UserError(
            f"attention masks: expected at least 2 images of split {split.name} with pixels of objects, got "
            f"{len(rows)}; use other masks, or evaluation.settings.attention_masks.background or ignored"
        )
    fixed, best, whole = zip(*rows, strict=True)
    return HeadScores(torch.stack(fixed), torch.tensor(best, dtype=torch.float64), torch.stack(whole), query)


def object_masks(mask: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return the masks of the objects (O, H, W), and the pixels that are not ignored (H, W), both bool."""
    ignored = torch.tensor(list(config.ignored), dtype=mask.dtype)
    counted = ~torch.isin(mask, ignored)
    shown = counted & (mask != config.background)
    if config.objects == "foreground":
        return shown[None][: int(shown.any())], counted
    numbers = mask[shown].unique()
    return mask[None] == numbers[:, None, None], counted


def object_scores(kept: Tensor, mask: Tensor, config: Config) -> Tensor | None:
    """Return the Jaccard indices (O, A) of each object and each head; None if the mask has no objects.

    Args:
        kept: (A, h, w) bool, the patches in the mask of each head.
        mask: (H, W) uint8.
        config: the settings.
    """
    objects, counted = object_masks(mask, config)
    if not len(objects):
        return None
    predicted = (nearest_pixels(kept, *mask.shape) & counted).flatten(1).double()
    truth = objects.flatten(1).double()
    intersection = truth @ predicted.T
    return intersection / (truth.sum(dim=1)[:, None] + predicted.sum(dim=1) - intersection)


def _whole(mask: Tensor, config: Config) -> Tensor:
    """Return the Jaccard index of a mask of all patches, as a scalar tensor."""
    scores = object_scores(torch.ones(1, 1, 1, dtype=torch.bool), mask, config)
    return torch.zeros((), dtype=torch.float64) if scores is None else scores.mean()
