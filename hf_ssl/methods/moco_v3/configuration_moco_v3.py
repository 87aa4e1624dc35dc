# SPDX-License-Identifier: Apache-2.0
"""Configuration of MoCo v3."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_momentum


@strict
class MoCoV3Config(SSLConfig):
    """MoCo v3 (Chen et al., arXiv:2104.02057).

    The defaults are those of ResNet-50; the authors' ViTs have temperature 0.2, `projection_layers` 3 and
    `predictor_last_norm` true (facebookresearch/moco-v3).

    Attributes:
        temperature: of the softmax over similarities; the loss is multiplied by twice the temperature.
        momentum, momentum_end, momentum_schedule: of the teacher; 0.99 (300 epochs and less) or 0.996, to 1
            along a cosine.
        projection_size, projection_hidden_size, projection_layers: of the projector.
        predictor_last_norm: whether the predictor ends in a BatchNorm without gain and offset.
        freeze_patch_embedding: whether a vision transformer's patch embedding stays as it was drawn, which
            keeps its training from breaking down (section 4.2 of the paper). Other encoders are not touched.
    """

    model_type = "ssl_moco_v3"

    temperature: float = 1.0
    momentum: float = 0.99
    momentum_end: float = 1.0
    momentum_schedule: str = "cosine"
    projection_size: int = 256
    projection_hidden_size: int = 4096
    projection_layers: int = 2
    predictor_last_norm: bool = False
    freeze_patch_embedding: bool = True

    def validate_temperature(self) -> None:
        """Logits are bounded by 1 / temperature."""
        if self.temperature < 0.003:
            raise ValueError(f"method.temperature must be at least 0.003, got {self.temperature}")

    def validate_momentum(self) -> None:
        """The schedule must be known, its ends between 0 and 1."""
        check_momentum(self)


AutoConfig.register(MoCoV3Config.model_type, MoCoV3Config)
