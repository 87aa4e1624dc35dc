# SPDX-License-Identifier: Apache-2.0
"""Configuration of DINO."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, check_fields, strict


@strict
class DINOConfig(TeacherConfig):
    """DINO (Caron et al., arXiv:2104.14294).

    The defaults are those of facebookresearch/dino for ViT-S/16.

    Attributes:
        output_size: number of outputs (prototypes), over which both networks have a distribution (65536).
        student_temperature: temperature of the student's softmax (0.1).
        teacher_temperature: temperature of the teacher's softmax after its warmup (0.04; 0.07 in the authors'
            longer runs).
        teacher_temperature_start, teacher_temperature_warmup_epochs: first temperature of the teacher, and
            number of epochs of its linear warmup to `teacher_temperature` (0.04 and 0; 30 epochs in the
            authors' longer runs). The temperature changes once per epoch. The last warmup epoch already uses
            `teacher_temperature`. A warmup of one epoch uses only `teacher_temperature_start`
            (`numpy.linspace` in main_dino.py). A warmup of less than one epoch changes the temperature at
            every step. The authors have no such warmup.
        center_momentum: momentum of the center's EMA update (0.9).
        momentum, momentum_end, momentum_schedule: momentum of the teacher (0.996 to 1, cosine schedule).
        freeze_last_layer_epochs: number of first epochs in which the last layer is frozen (1).
        norm_last_layer: whether the rows of the last layer keep length 1. If False, their lengths are
            learned.
        projection_hidden_size, bottleneck_size, projection_layers: hidden width, output width and number of
            layers of the projector (2048, 256, 3).
        projection_batch_norm: whether BatchNorm follows the projector's layers except the last (False).
        drop_path_rate: share of residual branches that the student drops in its last block (0.1). The share
            rises linearly from 0 in the first block. It needs a vision transformer. The teacher drops none.
    """

    model_type = "ssl_dino"

    output_size: int = 65536
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_epochs: float = 0.0
    center_momentum: float = 0.9
    freeze_last_layer_epochs: float = 1.0
    norm_last_layer: bool = True
    projection_hidden_size: int = 2048
    bottleneck_size: int = 256
    projection_layers: int = 3
    projection_batch_norm: bool = False
    drop_path_rate: float = 0.1

    def validate_head(self) -> None:
        """Raise `ValueError` for fewer than 2 outputs."""
        check_fields(("output_size", self.output_size, self.output_size >= 2, "at least 2"))

    def validate_shares(self) -> None:
        """Raise `ValueError` for a share outside of 0 to 1."""
        drop = self.drop_path_rate
        check_fields(("drop_path_rate", drop, 0 <= drop < 1, "a number from 0 to less than 1"))


AutoConfig.register(DINOConfig.model_type, DINOConfig)
