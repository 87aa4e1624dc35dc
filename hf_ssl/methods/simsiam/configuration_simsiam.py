# SPDX-License-Identifier: Apache-2.0
"""Configuration of SimSiam."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, strict


@strict
class SimSiamConfig(SSLConfig):
    """SimSiam (Chen and He, arXiv:2011.10566).

    Attributes:
        projection_size: hidden and output width of the projector (facebookresearch/simsiam: 2048).
        projection_layers: number of the projector's layers (3; 2 on CIFAR-10, appendix D of the paper).
        predictor_hidden_size: hidden width of the predictor, a quarter of `projection_size`.
        predictor_layers: number of Linear layers of the predictor (2). 0: no predictor, with which the
            embeddings collapse (table 1 of the paper).
        stop_gradient: whether the target receives no gradient. If it does, the embeddings collapse (figure 2
            of the paper).
        fixed_predictor_learning_rate: whether the predictor's learning rate is constant. The schedule lowers
            only the other learning rates.
    """

    model_type = "ssl_simsiam"
    may_be_missing = ("predictor_layers",)

    projection_size: int = 2048
    projection_layers: int = 3
    predictor_hidden_size: int = 512
    predictor_layers: int = 2
    stop_gradient: bool = True
    fixed_predictor_learning_rate: bool = True


AutoConfig.register(SimSiamConfig.model_type, SimSiamConfig)
