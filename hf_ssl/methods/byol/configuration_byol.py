# SPDX-License-Identifier: Apache-2.0
"""Configuration of BYOL."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_momentum


@strict
class BYOLConfig(SSLConfig):
    """BYOL (Grill et al., arXiv:2006.07733).

    Attributes:
        momentum, momentum_end, momentum_schedule: of the target network, called tau there; 0.996 (1000
            epochs), 0.99 (100 and 300), 0.97 (40), to 1 along a cosine (deepmind-research/byol).
        projection_size, projection_hidden_size: of projector and predictor, which are built alike: Linear,
            BatchNorm, ReLU, Linear without bias.
    """

    model_type = "ssl_byol"

    momentum: float = 0.996
    momentum_end: float = 1.0
    momentum_schedule: str = "cosine"
    projection_size: int = 256
    projection_hidden_size: int = 4096

    def validate_momentum(self) -> None:
        """The schedule must be known, its ends between 0 and 1."""
        check_momentum(self)


AutoConfig.register(BYOLConfig.model_type, BYOLConfig)
