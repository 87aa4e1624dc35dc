# SPDX-License-Identifier: Apache-2.0
"""Configuration of SwAV."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig


@strict
class SwAVConfig(SSLConfig):
    """SwAV (Caron et al., arXiv:2006.09882). Defaults as in facebookresearch/swav with batches of 4096.

    Attributes:
        temperature: of the softmax over prototypes (0.1).
        epsilon: entropy of the assignments (0.05; 0.03 in some settings).
        sinkhorn_iterations: 3.
        prototypes: how many (3000).
        prototype_freeze_steps: optimiser steps at the start in which prototypes stay as they were drawn (313;
            5005 with batches of 256).
        queue_size: embeddings of earlier batches, for each global view, that are assigned along with the
            batch; 0 switches it off (3840 with batches of 256).
        queue_start_epoch: passes over the data before the queue is used (15). It is not used before it is
            full.
        projection_size, projection_hidden_size: of the projector: Linear, BatchNorm, ReLU, Linear.
    """

    model_type = "ssl_swav"

    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    prototypes: int = 3000
    prototype_freeze_steps: int = 313
    queue_size: int = 0
    queue_start_epoch: float = 15.0
    projection_size: int = 128
    projection_hidden_size: int = 2048

    def validate_temperature(self) -> None:
        """Logits are bounded by 1 / temperature."""
        if self.temperature < 0.003:
            raise ValueError(f"method.temperature must be at least 0.003, got {self.temperature}")

    def validate_assignment(self) -> None:
        """Prototypes share the images among them."""
        if self.epsilon <= 0 or self.sinkhorn_iterations < 1 or self.prototypes < 2 or self.queue_size < 0:
            raise ValueError(
                "method.epsilon must be positive, method.sinkhorn_iterations at least 1, method.prototypes "
                f"at least 2 and method.queue_size at least 0, got {self.epsilon}, "
                f"{self.sinkhorn_iterations}, {self.prototypes} and {self.queue_size}"
            )


AutoConfig.register(SwAVConfig.model_type, SwAVConfig)
