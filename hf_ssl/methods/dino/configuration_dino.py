# SPDX-License-Identifier: Apache-2.0
"""Configuration of DINO."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_momentum


@strict
class DINOConfig(SSLConfig):
    """DINO (Caron et al., arXiv:2104.14294). Defaults as in facebookresearch/dino for ViT-S/16.

    Attributes:
        output_size: "prototypes", over which both networks give a distribution (65536).
        student_temperature: 0.1.
        teacher_temperature: 0.04 (0.07 in the authors' longer runs).
        teacher_temperature_start, teacher_temperature_warmup_epochs: where the teacher's temperature begins,
            and how many passes over the data it takes to rise to `teacher_temperature` (0.04 and 0; 30).
        center_momentum: share of the old centre in the new (0.9).
        momentum, momentum_end, momentum_schedule: of the teacher (0.996 to 1 along a cosine).
        freeze_last_layer_epochs: passes over the data in which the last layer stays as it was drawn (1).
        norm_last_layer: whether the last layer's rows keep length 1; else their lengths are learned.
        projection_hidden_size, bottleneck_size, projection_layers: of the head's perceptron (2048, 256, 3).
        projection_batch_norm: BatchNorm between its layers (no).
        drop_path_rate: share of residual branches that the student drops in its last block, rising from 0 in
            the first; of vision transformers (0.1). The teacher drops none.
    """

    model_type = "ssl_dino"

    output_size: int = 65536
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_epochs: float = 0.0
    center_momentum: float = 0.9
    momentum: float = 0.996
    momentum_end: float = 1.0
    momentum_schedule: str = "cosine"
    freeze_last_layer_epochs: float = 1.0
    norm_last_layer: bool = True
    projection_hidden_size: int = 2048
    bottleneck_size: int = 256
    projection_layers: int = 3
    projection_batch_norm: bool = False
    drop_path_rate: float = 0.1

    def validate_temperatures(self) -> None:
        """Outputs are divided by them."""
        for key in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if (value := self.to_dict()[key]) < 0.003:
                raise ValueError(f"method.{key} must be at least 0.003, got {value}")

    def validate_head(self) -> None:
        """A distribution needs two outputs, a perceptron a layer."""
        if self.output_size < 2 or self.projection_layers < 1:
            raise ValueError(
                "method.output_size must be at least 2 and method.projection_layers at least 1, got "
                f"{self.output_size} and {self.projection_layers}"
            )

    def validate_shares(self) -> None:
        """Shares are between 0 and 1."""
        check_momentum(self)
        if not 0 <= self.center_momentum <= 1 or not 0 <= self.drop_path_rate < 1:
            raise ValueError(
                "method.center_momentum must be from 0 to 1 and method.drop_path_rate from 0 to below 1, got "
                f"{self.center_momentum} and {self.drop_path_rate}"
            )


AutoConfig.register(DINOConfig.model_type, DINOConfig)
