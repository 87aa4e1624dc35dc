# SPDX-License-Identifier: Apache-2.0
"""Configuration of Barlow Twins."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, strict


@strict
class BarlowTwinsConfig(SSLConfig):
    """Barlow Twins (Zbontar et al., arXiv:2103.03230).

    Attributes:
        off_diagonal_weight: weight of the off-diagonal term, lambda in the paper (0.0051, section 3.1).
        loss_scale: factor on the whole loss. The authors' code has used 1 since June 2021, and solo-learn
            uses 0.1 on CIFAR.
        projection_size, projection_layers: width and number of the projector's layers (8192 and 3).
        vector_learning_rate_scale: learning rate of biases and normalization layers divided by that of
            weights. The authors' code uses 0.0048 / 0.2.
    """

    model_type = "ssl_barlow_twins"

    off_diagonal_weight: float = 0.0051
    loss_scale: float = 1.0
    projection_size: int = 8192
    projection_layers: int = 3
    vector_learning_rate_scale: float = 0.024


AutoConfig.register(BarlowTwinsConfig.model_type, BarlowTwinsConfig)
