# SPDX-License-Identifier: Apache-2.0
"""torchvision's Faster R-CNN with a feature pyramid on an encoder (layer 1).

The pyramid of an encoder with stages is an FPN (1612.03144). A plain vision transformer gets the simple
feature pyramid of ViTDet (2203.16527). Missing levels are pooled from the last one. The pyramids contain
GroupNorm and LayerNorm, because the scale of the features differs between pretraining methods.

Legend: B images, C channels, H height and W width of an image, L levels of the pyramid.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from hf_ssl.evaluation.encoders import checked_normalization
from hf_ssl.evaluation.feature_maps import FeatureMaps
from hf_ssl.modeling.backbones import input_channels
from hf_ssl.precision import autocast

MOST_DETECTIONS = 100
"""Largest number of detections of an image, as in the COCO metrics."""
_SHAPES = (0.5, 1.0, 2.0)
_REGION_SIDE = 7


@dataclass(frozen=True)
class Architecture:
    """Settings of a detector. All of them change its result.

    Attributes:
        image_size: shorter side of the resized images in pixels. The longer side is at most 5/3 of it.
        smallest_stride: smallest stride of the pyramid in pixels.
        levels: L.
        anchor_scale: side of the square anchor of a level, in units of its stride.
        channels: C of the levels.
        head_size: number of units in each of the two hidden layers of the box head.
        proposals: number of proposals of the RPN for each test image; twice as many in training.
        sampled_regions: number of regions per image that train the box head.
        batch_statistics: whether the BatchNorm of a fine-tuned encoder normalizes with the statistics of the
            batch. Otherwise, and always in a frozen encoder, it uses the statistics of the pretraining.
    """

    image_size: int
    smallest_stride: int
    levels: int
    anchor_scale: float
    channels: int
    head_size: int
    proposals: int
    sampled_regions: int
    batch_statistics: bool


class SimplePyramid(nn.Module):
    """The pyramid of ViTDet from one map: strides of 1/4, 1/2, 1 and 2 times its stride.

    Args:
        width: channels of the map.
        stride: stride of the map in pixels.
        settings: the architecture.
    """

    def __init__(self, width: int, stride: float, settings: Architecture) -> None:
        super().__init__()
        scales: dict[float, nn.Module] = {
            0.25: nn.Sequential(
                nn.ConvTranspose2d(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU(),
                nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
            ),
            0.5: nn.ConvTranspose2d(width, width // 2, 2, 2),
            1.0: nn.Identity(),
            2.0: nn.MaxPool2d(2, 2),
        }  # fmt: skip
        widths = {0.25: width // 4, 0.5: width // 2, 1.0: width, 2.0: width}
        least = min(settings.smallest_stride / 2**0.5, 2 * stride)  # 3.5 pixels count as 4
        chosen = [scale for scale in scales if scale * stride >= least][: settings.levels]
        self.strides = [scale * stride for scale in chosen]
        self.scales = nn.ModuleList(scales[scale] for scale in chosen)
        size = settings.channels
        self.outputs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[scale], size, 1, bias=False), LayerNorm2d(size),
                nn.Conv2d(size, size, 3, padding=1, bias=False), LayerNorm2d(size),
            )
            for scale in chosen
        )  # fmt: skip

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the levels of one map (B, C, H, W)."""
        pairs = zip(self.scales, self.outputs, strict=True)
        return [output(scale(maps[0])) for scale, output in pairs]


class StagePyramid(nn.Module):
    """torchvision's FPN with GroupNorm.

    Args:
        maps: the maps of the encoder.
        settings: the architecture.
    """

    def __init__(self, maps: FeatureMaps, settings: Architecture) -> None:
        super().__init__()
        self.count = min(settings.levels, len(maps.strides))
        self.strides = maps.strides[: self.count]
        self.fpn = FeaturePyramidNetwork(
            maps.channels[: self.count], settings.channels, norm_layer=_group_norm
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the levels of maps (B, C, H, W)."""
        named = OrderedDict((str(number), each) for number, each in enumerate(maps[: self.count]))
        return list(self.fpn(named).values())


class Body(nn.Module):
    """The encoder and the pyramid: `forward` returns {"0": (B, C, H, W), "1": ...} with L levels.

    Args:
        maps: the maps of the encoder.
        settings: the architecture.
        frozen: whether the encoder is frozen. A frozen encoder is always in evaluation mode.
        dtype: precision of the encoder under autocast; None: float32. The other parts compute in float32.
    """

    def __init__(
        self, maps: FeatureMaps, settings: Architecture, frozen: bool, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.maps, self.frozen, self.dtype = maps, frozen, dtype
        self.batch_statistics = settings.batch_statistics
        self.pyramid: Any = (
            SimplePyramid(maps.channels[-1], maps.strides[-1], settings)
            if maps.is_plain
            else StagePyramid(maps, settings)
        )
        self.out_channels = settings.channels
        self.own_levels = len(self.pyramid.strides)
        self.strides = list(self.pyramid.strides)
        while len(self.strides) < settings.levels:
            self.strides.append(2 * self.strides[-1])
        if frozen:
            for parameter in maps.encoder_parameters():
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Body":
        """Set the mode of all modules, except those that stay in evaluation mode."""
        super().train(mode)
        for module in self.maps.encoder.modules():
            fixed = isinstance(module, nn.modules.batchnorm._BatchNorm) and not self.batch_statistics
            if self.frozen or fixed:
                module.training = False
        return self

    def forward(self, pixel_values: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels of images (B, C, H, W)."""
        with autocast(pixel_values.device, self.dtype):
            maps = self.maps(pixel_values)
        levels = self.pyramid([each.float() for each in maps])
        while len(levels) < len(self.strides):
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        return OrderedDict((str(number), each) for number, each in enumerate(levels))


class Anchors(AnchorGenerator):
    """torchvision's anchors with the strides of the pyramid.

    torchvision would compute integer strides from the sizes of image and map: 3 instead of 3.5 pixels.

    Args:
        strides: strides of the levels in pixels.
        scale: side of the square anchor in units of the stride.
    """

    def __init__(self, strides: list[float], scale: float) -> None:
        sizes: Any = tuple((scale * stride,) for stride in strides)
        super().__init__(sizes, (_SHAPES,) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, [x1, y1, x2, y2] in pixels."""
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        grids = [list(each.shape[-2:]) for each in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class NearestLevel(LevelMapper):
    """torchvision's rule for the level of a region, also for strides that do not double from level to level.

    torchvision 0.29 counts the levels from the first to the last power of two. If a power of two is missing,
    it gives large regions a level that does not exist, and their features are zero.

    Args:
        strides: strides of the levels in pixels, ascending.
        scale, level: side of a region in pixels, and the logarithm of the stride of its level.
    """

    def __init__(self, strides: list[float], scale: int, level: int) -> None:
        numbers = [round(math.log2(stride)) for stride in strides]
        super().__init__(numbers[0], numbers[-1], scale, level)
        self.numbers = numbers

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """Return the level of each box, an index of `strides`. Of two equally near levels, the first one."""
        wanted = super().__call__(boxlists) + self.k_min
        numbers = torch.tensor(self.numbers, device=wanted.device)
        return (wanted[:, None] - numbers).abs().argmin(dim=1)


def new_detector(
    maps: FeatureMaps,
    processor: Any,
    classes: int,
    settings: Architecture,
    *,
    frozen: bool,
    dtype: torch.dtype | None = None,
) -> FasterRCNN:
    """Return a detector that contains the feature maps. New layers use the global random state.

    Args:
        maps: the maps of the encoder.
        processor: the image processor of the encoder, which gives the mean and the standard deviation.
        classes: number of classes. Class k of the data has the label k + 1, because 0 is the background.
        settings: the architecture.
        frozen, dtype: see `Body`.

    Raises:
        UserError: `checked_normalization` raises.
    """
    body = Body(maps, settings, frozen, dtype)
    mean, std = checked_normalization(processor, input_channels(body.maps.encoder.config))
    own = [str(number) for number in range(body.own_levels)]
    align = MultiScaleRoIAlign(own, _REGION_SIDE, 2)
    strides = body.strides[: body.own_levels]
    align.scales = [1 / stride for stride in strides]  # torchvision would round them to powers of two
    align.map_levels = NearestLevel(strides, align.canonical_scale, align.canonical_level)
    divisor = 2 * maps.divisor if maps.is_plain else math.ceil(strides[-1])
    return FasterRCNN(
        body,
        min_size=settings.image_size,
        max_size=round(settings.image_size * 5 / 3),
        image_mean=mean,
        image_std=std,
        size_divisible=divisor,
        rpn_anchor_generator=Anchors(body.strides, settings.anchor_scale),
        rpn_pre_nms_top_n_train=2 * settings.proposals,
        rpn_pre_nms_top_n_test=settings.proposals,
        rpn_post_nms_top_n_train=2 * settings.proposals,
        rpn_post_nms_top_n_test=settings.proposals,
        box_roi_pool=align,
        box_head=TwoMLPHead(settings.channels * _REGION_SIDE**2, settings.head_size),
        box_predictor=FastRCNNPredictor(settings.head_size, classes + 1),
        box_batch_size_per_image=settings.sampled_regions,
        box_detections_per_img=MOST_DETECTIONS,
    )


def _group_norm(channels: int) -> nn.GroupNorm:
    """Return GroupNorm with 32 groups. With few channels, there are fewer groups of at least 8 channels."""
    groups = next(count for count in range(min(32, max(1, channels // 8)), 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels)
