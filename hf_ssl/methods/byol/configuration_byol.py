# SPDX-License-Identifier: Apache-2.0
"""Configuration of BYOL."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, strict


@strict
class BYOLConfig(TeacherConfig):
    """BYOL (Grill et al., arXiv:2006.07733).

    Attributes:
        momentum, momentum_end, momentum_schedule: momentum of the target network, tau in the paper. The
            authors start at 0.996 (1000 epochs), 0.99 (100 and 300 epochs) or 0.97 (40 epochs). A cosine
            schedule ends at 1 (deepmind-research/byol).
        projection_size, projection_hidden_size: output and hidden width of the projector and the predictor.
            Both are Linear, BatchNorm, ReLU, Linear without bias.
        predictor_layers: number of Linear layers of the predictor (2). A single layer has no bias, as the
            learned linear predictor in the experiments of DirectPred (arXiv:2102.06810). 0: no predictor;
            the embeddings then collapse (table 5b of the paper).
    """

    model_type = "ssl_byol"
    may_be_missing = ("predictor_layers",)

    projection_size: int = 256
    projection_hidden_size: int = 4096
    predictor_layers: int = 2


AutoConfig.register(BYOLConfig.model_type, BYOLConfig)
