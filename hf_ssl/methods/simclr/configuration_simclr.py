# SPDX-License-Identifier: Apache-2.0
"""Configuration of SimCLR."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, strict


@strict
class SimCLRConfig(SSLConfig):
    """SimCLR (Chen et al., arXiv:2002.05709).

    Attributes:
        temperature: temperature of the softmax over similarities. It is 0.1 on ImageNet and 0.5 on CIFAR-10
            (google-research/simclr, README).
        projection_size: output width of the projector.
        projection_hidden_size: width of the projector's hidden layers. None means the width of the features,
            as in the authors' code.
        projection_layers: number of the projector's layers. The paper has 2, and the authors' code has 3
            (`num_proj_layers`).
    """

    model_type = "ssl_simclr"

    temperature: float = 0.1
    projection_size: int = 128
    projection_hidden_size: int | None = None
    projection_layers: int = 3


AutoConfig.register(SimCLRConfig.model_type, SimCLRConfig)
