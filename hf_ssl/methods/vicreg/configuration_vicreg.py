# SPDX-License-Identifier: Apache-2.0
"""Configuration of VICReg."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, strict


@strict
class VICRegConfig(SSLConfig):
    """VICReg (Bardes, Ponce and LeCun, arXiv:2105.04906).

    Attributes:
        invariance_weight, variance_weight, covariance_weight: weights of the three terms of the loss (25, 25
            and 1, section 4.2).
        projection_size, projection_layers: width and number of the expander's layers (8192 and 3).
    """

    model_type = "ssl_vicreg"

    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    projection_size: int = 8192
    projection_layers: int = 3


AutoConfig.register(VICRegConfig.model_type, VICRegConfig)
