# SPDX-License-Identifier: Apache-2.0
"""Configuration of SimCLR."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig


@strict
class SimCLRConfig(SSLConfig):
    """SimCLR (Chen et al., arXiv:2002.05709).

    Attributes:
        temperature: of the softmax over similarities; 0.1 on ImageNet, 0.5 on CIFAR-10
            (google-research/simclr, README).
        projection_size: dimensions in which views are compared.
        projection_hidden_size: width of the projector's hidden layers; None takes the width of the
            features, as the authors do.
        projection_layers: 2 in the paper, 3 in the authors' code (`num_proj_layers`).
    """

    model_type = "ssl_simclr"

    temperature: float = 0.1
    projection_size: int = 128
    projection_hidden_size: int | None = None
    projection_layers: int = 3

    def validate_temperature(self) -> None:
        """The loss bounds logits by 1 / temperature."""
        if self.temperature < 0.003:
            raise ValueError(f"method.temperature must be at least 0.003, got {self.temperature}")


AutoConfig.register(SimCLRConfig.model_type, SimCLRConfig)
