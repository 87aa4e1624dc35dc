# SPDX-License-Identifier: Apache-2.0
"""The configuration that all methods share."""

import copy
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

# Model classes whose pooler is a Linear and an activation on the CLS token, which no self-supervised method
# trains.
CLS_POOLER_TYPES = ("vit", "deit")


@strict
class SSLConfig(PreTrainedConfig):
    """Configuration of a method: an encoder, what the views are, and the method's own fields in a subclass.

    Attributes:
        backbone_config: any transformers vision config, as an object or a dict with its `model_type`; timm
            through `model_type="timm_wrapper"`. A ViT's pooler is set to hand out its CLS token unchanged.
        views: the preset of the views (`hf_ssl.views.ViewPreset`) as plain data: the home of what the
            network was shown.
    """

    model_type = "ssl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet")
    }

    backbone_config: dict | PreTrainedConfig | None = None
    views: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # A config object by now, whatever was given; the caller's own, perhaps a model's, must not change.
        self.backbone_config = backbone = copy.deepcopy(cast(Any, self.backbone_config))
        if backbone.model_type in CLS_POOLER_TYPES:
            backbone.pooler_act = "linear"
            backbone.pooler_output_size = backbone.hidden_size
