# SPDX-License-Identifier: Apache-2.0
"""Configuration of MoCo v3."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, strict


@strict
class MoCoV3Config(TeacherConfig):
    """MoCo v3 (Chen et al., arXiv:2104.02057).

    The defaults are those of the authors' ResNet-50. Their ViTs have temperature 0.2, `projection_layers` 3
    and `predictor_last_norm` True (facebookresearch/moco-v3).

    Attributes:
        temperature: temperature of the softmax over similarities. The loss is multiplied by twice the
            temperature.
        momentum, momentum_end, momentum_schedule: momentum of the teacher. It starts at 0.99 (up to 300
            epochs) or 0.996, and a cosine schedule ends at 1.
        projection_size, projection_hidden_size, projection_layers: output width, hidden width and number of
            layers of the projector. The predictor has the same widths.
        predictor_last_norm: whether a BatchNorm without gain and offset follows the predictor.
        freeze_patch_embedding: whether a vision transformer's patch embedding keeps its random initial
            weights. This makes training stable (section 4.2 of the paper). It does not affect other encoders.
        fixed_positions: whether a vision transformer has a fixed sine-cosine position table, whose first half
            encodes the row, as in the authors' `vits.py`. False and None: the learned table of transformers.
            True is possible for ViT, DeiT, DINOv2 and I-JEPA encoders.
    """

    model_type = "ssl_moco_v3"

    temperature: float = 1.0
    momentum: float = 0.99
    projection_size: int = 256
    projection_hidden_size: int = 4096
    projection_layers: int = 2
    predictor_last_norm: bool = False
    freeze_patch_embedding: bool = True
    fixed_positions: bool | None = None


AutoConfig.register(MoCoV3Config.model_type, MoCoV3Config)
