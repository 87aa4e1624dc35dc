# SPDX-License-Identifier: Apache-2.0
"""Configuration of CMC."""

import copy
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.errors import UserError, check_name
from hf_ssl.modeling.configuration import BankConfig, check_fields, check_unused
from hf_ssl.views.color_spaces import COLOR_SPACES, ColorViews
from hf_ssl.views.preset import ViewPreset

GRAPHS = ("full", "core")
LOSSES = ("info_nce", "nce", "softmax")
_REDUCTION = 4  # a bottleneck of transformers' ResNet has a quarter of the channels of its output


@strict
class CMCConfig(BankConfig):
    """CMC (Tian et al., arXiv:1906.05849).

    The encoder of the config is the published one. Each color view has a narrow encoder: its
    `embedding_size` and `hidden_sizes` are shares of the published ones.

    Attributes:
        color_space: "ydbdr" (PyContrast), "lab" (the paper; such an encoder cannot be published), "ycbcr" or
            "rgb".
        channel_groups: how many consecutive channels form each view, such as [1, 2] for Y and DbDr. None
            means [1, 1, 1] for "rgb" and [1, 2] for the others.
        gradient_view: whether the magnitude of the gradient is a further, last view. Its encoder is as wide
            as that of the first view. It is not a part of the published encoder.
        graph: "full" contrasts all pairs of views (L_F), "core" only the first view with each other one
            (L_C). They are equal for two views.
        loss: "info_nce" has the other images of the batch as negatives, so it also works with a stream. With
            "nce" (noise-contrastive estimation, the default of the authors' code) and "softmax" (cross
            entropy), the negatives are random rows of a memory bank. Each view has its own bank. The authors'
            code has 16,384 negatives, and its banks start as `bank_start: uniform`. `negatives` and the
            settings of the banks are only for these two losses.
        temperature: temperature of the softmax over similarities (0.07).
        projection_size: output width of each head (128).
        projection_layers: number of layers of each head: 1 in CMC, 2 in the variant v2 of PyContrast.
        projection_hidden_size: width of the hidden layers of the heads. None means the width of the features.
    """

    model_type = "ssl_cmc"

    color_space: str = "ydbdr"
    channel_groups: list[int] | tuple[int, ...] | None = None
    gradient_view: bool = False
    graph: str = "full"
    loss: str = "info_nce"
    temperature: float = 0.07
    projection_size: int = 128
    projection_layers: int = 1
    projection_hidden_size: int | None = None

    def validate_views_and_encoder(self) -> None:
        """Raise `ValueError` for an unknown name, or for channels that form no two views.

        The function also raises it for a ResNet that cannot be divided, and for one without RGB images.
        """
        check_name("method.color_space", self.color_space, COLOR_SPACES, "a known color space")
        groups = self.groups
        is_division = min(groups, default=0) >= 1 and sum(groups) == 3
        views = len(groups) + self.gradient_view
        check_fields(
            ("graph", self.graph, self.graph in GRAPHS, f"one of {', '.join(GRAPHS)}"),
            ("loss", self.loss, self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("channel_groups", list(groups), is_division, "numbers of at least 1 with the sum 3"),
            ("channel_groups", list(groups), views >= 2, "at least two groups without gradient_view"),
            ("projection_layers", self.projection_layers, self.projection_layers >= 1, "at least 1"),
        )
        if self.loss == "info_nce":
            of_banks = ["negatives", "bank_momentum", "bank_start", "bank_precision"]
            check_unused(self, of_banks, "method.loss=info_nce")
        if self.projection_layers == 1:
            check_unused(self, ["projection_hidden_size"], "method.projection_layers=1")
        if cast(Any, self.backbone_config).model_type == "resnet":
            narrow_configs(self.backbone_config, groups)

    @property
    def groups(self) -> tuple[int, ...]:
        """Return how many channels each color view has."""
        if self.channel_groups is None:
            return COLOR_SPACES[self.color_space].groups
        return tuple(self.channel_groups)

    @property
    def color_views(self) -> ColorViews:
        """Return the division of normalized images into color views."""
        preset: Any = ViewPreset.from_dict(self.views or {})
        return ColorViews(self.color_space, self.groups, tuple(preset.mean), tuple(preset.std))


def narrow_configs(full: Any, groups: tuple[int, ...]) -> list[PreTrainedConfig]:
    """Return the config of a narrow ResNet for each group of channels.

    Each width of the full ResNet is the sum of the widths of the narrow ones. These differ by at most 1, or
    by 4 in a ResNet of bottlenecks, because the channels inside a bottleneck must add up, too.

    Args:
        full: config of a `ResNetModel`.
        groups: numbers of channels.

    Raises:
        UserError: the images have other than 3 channels, or a width cannot be divided.
    """
    if full.num_channels != 3:
        raise UserError(
            f"data.channels: expected 3, because CMC divides the colors of an image, got {full.num_channels}"
        )
    unit = _REDUCTION if full.layer_type == "bottleneck" else 1
    widths = {"embedding_size": [full.embedding_size], "hidden_sizes": list(full.hidden_sizes)}
    for key, sizes in widths.items():
        for size in sizes:
            if size % unit or size < unit * len(groups):
                kind = "number" if unit == 1 else f"multiple of {unit}"
                raise UserError(
                    f"backbone.{key}: expected a {kind} of at least {unit * len(groups)} with "
                    f"layer_type={full.layer_type}, because {len(groups)} narrow encoders share the "
                    f"channels, got {size}"
                )
    configs = []
    for number, channels in enumerate(groups):
        narrow = copy.deepcopy(full)
        narrow.num_channels = channels
        shares = {
            key: [_share(size, unit, number, len(groups)) for size in sizes] for key, sizes in widths.items()
        }
        narrow.embedding_size, narrow.hidden_sizes = shares["embedding_size"][0], shares["hidden_sizes"]
        same = [each.embedding_size == each.hidden_sizes[0] for each in (narrow, full)]
        if not full.downsample_in_first_stage and same[0] != same[1]:  # the first block needs no shortcut
            raise UserError(
                "backbone.embedding_size: expected a size that differs from hidden_sizes[0] by at least "
                f"{unit * len(groups)} or by nothing, so that the narrow encoders also differ, got "
                f"{full.embedding_size} and {full.hidden_sizes[0]}"
            )
        configs.append(narrow)
    return configs


def _share(size: int, unit: int, number: int, count: int) -> int:
    """Return the share of one narrow encoder; the first ones get the remainder."""
    each, rest = divmod(size // unit, count)
    return unit * (each + (number < rest))


AutoConfig.register(CMCConfig.model_type, CMCConfig)
