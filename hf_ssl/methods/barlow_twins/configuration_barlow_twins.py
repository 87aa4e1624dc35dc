# SPDX-License-Identifier: Apache-2.0
"""Configuration of Barlow Twins."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig


@strict
class BarlowTwinsConfig(SSLConfig):
    """Barlow Twins (Zbontar et al., arXiv:2103.03230).

    Attributes:
        off_diagonal_weight: of what different dimensions have in common, lambda; 0.0051 (section 3.1).
        loss_scale: factor on the whole loss. 1 as in the authors' code since June 2021; solo-learn has 0.1 on
            CIFAR.
        projection_size, projection_layers: of the projector, whose layers are all as wide (8192 x 3).
        vector_learning_rate_scale: learning rate of biases and norms relative to that of weights: 0.0048 /
            0.2 in the authors' code.
    """

    model_type = "ssl_barlow_twins"

    off_diagonal_weight: float = 0.0051
    loss_scale: float = 1.0
    projection_size: int = 8192
    projection_layers: int = 3
    vector_learning_rate_scale: float = 0.024


AutoConfig.register(BarlowTwinsConfig.model_type, BarlowTwinsConfig)
