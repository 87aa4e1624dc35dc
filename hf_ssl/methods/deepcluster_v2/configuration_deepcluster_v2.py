# SPDX-License-Identifier: Apache-2.0
"""Configuration of DeepCluster v2."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_fields, strict


@strict
class DeepClusterV2Config(SSLConfig):
    """DeepCluster v2 (Caron et al., arXiv:2006.09882, appendix).

    The defaults are those of facebookresearch/swav.

    Attributes:
        temperature: temperature of the softmax over prototypes (0.1).
        prototypes: number of clusters of each head ([3000, 3000, 3000]). Head i clusters global view i
            modulo the number of global views.
        kmeans_iterations: number of k-means iterations at the beginning of each epoch (10).
        projection_size, projection_hidden_size: output and hidden width of the projector, which is Linear,
            BatchNorm, ReLU, Linear.
        num_samples: number of training images. The memory bank has one entry for each.
            `hf_ssl.building.build_model` sets this number.
    """

    model_type = "ssl_deepcluster_v2"

    temperature: float = 0.1
    prototypes: list[int] | tuple[int, ...] = (3000, 3000, 3000)
    kmeans_iterations: int = 10
    projection_size: int = 128
    projection_hidden_size: int = 2048
    num_samples: int = 0

    def validate_clusters(self) -> None:
        """Raise `ValueError` without heads, for fewer than 2 clusters, or without k-means iterations."""
        counts, iterations = list(self.prototypes), self.kmeans_iterations
        check_fields(
            ("prototypes", counts, min(counts, default=0) >= 2, "one or more numbers of at least 2"),
            ("kmeans_iterations", iterations, iterations >= 1, "at least 1"),
        )


AutoConfig.register(DeepClusterV2Config.model_type, DeepClusterV2Config)
