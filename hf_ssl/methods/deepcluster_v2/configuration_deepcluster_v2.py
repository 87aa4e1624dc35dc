# SPDX-License-Identifier: Apache-2.0
"""Configuration of DeepCluster v2."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig


@strict
class DeepClusterV2Config(SSLConfig):
    """DeepCluster v2 (Caron et al., arXiv:2006.09882, appendix). Defaults as in facebookresearch/swav.

    Attributes:
        temperature: of the softmax over prototypes (0.1).
        prototypes: clusters of each head; heads take the global views in turn ([3000, 3000, 3000]).
        kmeans_iterations: at the beginning of each pass over the data (10).
        projection_size, projection_hidden_size: of the projector: Linear, BatchNorm, ReLU, Linear.
        num_samples: images of the training data, each of which has a place in memory; `hf_ssl.run` fills it
            in.
    """

    model_type = "ssl_deepcluster_v2"

    temperature: float = 0.1
    prototypes: list[int] | tuple[int, ...] = (3000, 3000, 3000)
    kmeans_iterations: int = 10
    projection_size: int = 128
    projection_hidden_size: int = 2048
    num_samples: int = 0

    def validate_temperature(self) -> None:
        """Logits are bounded by 1 / temperature."""
        if self.temperature < 0.003:
            raise ValueError(f"method.temperature must be at least 0.003, got {self.temperature}")

    def validate_clusters(self) -> None:
        """Images are divided among clusters."""
        if not self.prototypes or min(self.prototypes) < 2 or self.kmeans_iterations < 1:
            raise ValueError(
                "method.prototypes must hold numbers of at least 2 and method.kmeans_iterations must be at "
                f"least 1, got {list(self.prototypes)} and {self.kmeans_iterations}"
            )


AutoConfig.register(DeepClusterV2Config.model_type, DeepClusterV2Config)
