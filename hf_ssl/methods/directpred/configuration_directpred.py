# SPDX-License-Identifier: Apache-2.0
"""Configuration of DirectPred and DirectCopy."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_momentum


@strict
class DirectPredConfig(SSLConfig):
    """DirectPred (Tian, Chen and Ganguli, arXiv:2102.06810) and DirectCopy (Wang et al., arXiv:2110.04947).

    Attributes:
        exponent: of the correlation matrix's eigenvalues in the predictor: 0.5 is DirectPred, 1 DirectCopy.
        epsilon: added to every eigenvalue of the predictor, whose largest is 1 before it
            (facebookresearch/luckmatters: 0.01; the paper: 0.1).
        correlation_momentum: share of the old correlation matrix that is kept with each batch, rho (0.3).
        update_frequency: optimiser steps between two settings of the predictor (1).
        momentum, momentum_end, momentum_schedule: of the target network; 0.996 throughout.
        projection_size, projection_hidden_size: of the projector: Linear, BatchNorm without gain and offset,
            ReLU, Linear.
    """

    model_type = "ssl_directpred"

    exponent: float = 0.5
    epsilon: float = 0.01
    correlation_momentum: float = 0.3
    update_frequency: int = 1
    momentum: float = 0.996
    momentum_end: float = 0.996
    momentum_schedule: str = "constant"
    projection_size: int = 128
    projection_hidden_size: int = 512

    def validate_momentum(self) -> None:
        """The schedule must be known, its ends between 0 and 1."""
        check_momentum(self)

    def validate_predictor(self) -> None:
        """The predictor's settings lie where they mean something."""
        if self.exponent <= 0 or self.epsilon < 0 or self.update_frequency < 1:
            raise ValueError(
                "method.exponent must be positive, method.epsilon at least 0 and method.update_frequency at "
                f"least 1, got {self.exponent}, {self.epsilon} and {self.update_frequency}"
            )


AutoConfig.register(DirectPredConfig.model_type, DirectPredConfig)
