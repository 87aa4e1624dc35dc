# SPDX-License-Identifier: Apache-2.0
"""The base configuration of all methods, and the schedules that configurations name."""

import copy
import math
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

CLS_POOLER_TYPES = ("vit", "deit")
"""Model types whose pooler is a Linear layer and an activation on the class token. No method trains it."""

SCHEDULES = ("constant", "linear", "cosine")


@strict
class SSLConfig(PreTrainedConfig):
    """Base configuration of a method. A subclass adds the fields of the method.

    Attributes:
        backbone_config: any transformers vision config, as an object or a dict with its `model_type`; timm
            through `model_type="timm_wrapper"`. A ViT's pooler is changed to return its class token.
        views: the augmentation preset (`hf_ssl.views.ViewPreset`) as plain data. It is stored here so that a
            checkpoint records the augmentations.
    """

    model_type = "ssl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet")
    }

    backbone_config: dict | PreTrainedConfig | None = None
    views: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # This is always a config object here. It is copied because the caller's own must not change.
        self.backbone_config = backbone = copy.deepcopy(cast(Any, self.backbone_config))
        if backbone.model_type in CLS_POOLER_TYPES:
            backbone.pooler_act = "linear"
            backbone.pooler_output_size = backbone.hidden_size


def scheduled_value(start: float, end: float, schedule: str, fraction: float) -> float:
    """Return a value between `start` (at `fraction` 0) and `end` (at `fraction` 1).

    Args:
        schedule: "constant" (always `start`), "linear", or "cosine" (half a period).
        fraction: completed share of the run, 0 to 1.
    """
    if schedule == "constant":
        return start
    weight = fraction if schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
    return start + (end - start) * weight


def check_fields(*fields: tuple[str, Any, bool, str]) -> None:
    """Raise `ValueError` for the first field with a value outside of its range.

    Args:
        fields: (name of the field, its value, whether the value is valid, the expected values in words).
    """
    for key, value, valid, expected in fields:
        if not valid:
            raise ValueError(f"method.{key}: expected {expected}, got {value}")


def check_momentum(config: Any) -> None:
    """Raise `ValueError` for a momentum outside of 0 to 1 or an unknown schedule."""
    for key in ("momentum", "momentum_end"):
        if not 0 <= (value := config.to_dict()[key]) <= 1:
            raise ValueError(f"method.{key}: expected a number from 0 to 1, got {value}")
    if config.momentum_schedule not in SCHEDULES:
        raise ValueError(
            f"method.momentum_schedule: expected one of {', '.join(SCHEDULES)}, "
            f"got {config.momentum_schedule!r}"
        )


def check_temperature(config: Any, *keys: str) -> None:
    """Raise `ValueError` for a temperature below 0.003.

    `nt_xent` has the same limit. With a smaller temperature, its exponentials would underflow in float64.
    """
    for key in keys or ("temperature",):
        if (value := config.to_dict()[key]) < 0.003:
            raise ValueError(f"method.{key}: expected at least 0.003, got {value}")
