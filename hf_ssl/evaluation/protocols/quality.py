# SPDX-License-Identifier: Apache-2.0
"""Quality without labels: LiDAR and alignment, which need several augmented views of each image.

RankMe, alpha-ReQ and uniformity need no views. Every evaluation contains them in `statistics`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hf_ssl.errors import check_values, counted
from hf_ssl.evaluation.features import extract_features
from hf_ssl.evaluation.inputs import Inputs, read_rows
from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.results import ProtocolResult, Quality, result_id
from hf_ssl.evaluation.statistics import alignment, evenly_spaced, lidar
from hf_ssl.random import image_seeds
from hf_ssl.views import ViewPreset, augment, sample_parameters

VERSION = 1
PRESETS = ("recipe", "standard")


@dataclass
class Config:
    """Settings.

    Attributes:
        images: largest number of images, which are evenly spaced test images. The paper of LiDAR uses 1,000.
        views: views of each image. The paper uses 50; the time is proportional to this number.
        preset: "recipe" augments as the first view of the training did, if the evaluation belongs to a run,
            and otherwise as "standard". "standard" is `standard_preset`.
    """

    images: int = 1000
    views: int = 10
    preset: str = "recipe"

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        check_values(
            where,
            ("images", self.images, self.images >= 2, "at least 2"),
            ("views", self.views, self.views >= 2, "at least 2"),
            ("preset", self.preset, self.preset in PRESETS, f"one of {', '.join(PRESETS)}"),
        )


def standard_preset(size: int) -> ViewPreset:
    """Return a crop of 20 to 100 % of the area, a flip and the color jitter of MoCo v2, without blur."""
    return ViewPreset(
        size=size, scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0
    )  # with the usual probabilities of flip (0.5), jitter (0.8) and gray (0.2)


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Measure LiDAR and alignment, and store them in `inputs.quality`. Neither is an accuracy."""
    preset = inputs.preset if config.preset == "recipe" else None
    source = "the augmentation of the training" if preset is not None else "standard augmentation"
    preset = preset or standard_preset(inputs.image_size)
    if inputs.channels != 3:
        preset = replace(preset, saturation=0.0, hue=0.0, gray=0.0)
    # Without normalization: the image processor normalizes the views, as it does with every image.
    zeros, ones = (0.0,) * inputs.channels, (1.0,) * inputs.channels
    preset = replace(preset, count=config.views, second=None, local=None, mean=zeros, std=ones)
    rows = evenly_spaced(len(inputs.test), config.images)
    images = len(rows)
    with inputs.progress("views", images * config.views) as bar:
        features = extract_features(
            inputs.encoder,
            inputs.processor,
            _views(inputs, preset, rows, bar),
            pooling=inputs.pooling,
            device=inputs.device,
            dtype=inputs.dtype,
        )
    views = check_features(features, "quality, views").view(images, config.views, -1)
    settings = {"images": images, "preset": preset.to_dict(), "seed": inputs.seed}
    inputs.quality = Quality(
        id=result_id("quality", VERSION, settings),
        text=f"{counted(config.views, 'view')} of {counted(images, 'image')} of split {inputs.test.name}, "
        f"{source}, views of {preset.size} pixels",
        lidar=lidar(views),
        alignment=alignment(views[:, 0], views[:, 1]),
        images=images,
        views=config.views,
    )
    return []


def _views(inputs: Inputs, preset: ViewPreset, rows: Tensor, bar: object) -> Iterator[list[Tensor]]:
    """Yield the views of each image with one of these row numbers, as uint8 tensors, image after image."""
    for batch in read_rows(inputs.test.images, rows, inputs.batch_size):
        for row, image in batch:
            seeds = image_seeds(inputs.seed, 0, np.array([row], np.uint64))
            parameters = sample_parameters(seeds, preset, np.array([image.shape[-2:]]))
            pixels = augment(image[None], parameters).pixel_values[0]
            yield list((255 * pixels).round().clamp(0, 255).to(torch.uint8))
            bar.update(preset.count)  # type: ignore[attr-defined]
