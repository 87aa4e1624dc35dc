# SPDX-License-Identifier: Apache-2.0
"""Base classes of methods with a momentum encoder: a teacher whose weights are an EMA of its student's."""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel

from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.batch_norm import is_batch_norm
from hf_ssl.modeling.configuration import TeacherConfig, scheduled_value
from hf_ssl.modeling.eval_mode import caches_weights
from hf_ssl.modeling.memory import HostNumber
from hf_ssl.modeling.outputs import RunProgress


class TeacherModel(SSLPreTrainedModel):
    """A method with a backbone and a momentum encoder.

    The config is a `TeacherConfig`. A subclass with a head also builds the head's teacher and names both in
    `student_teacher`.

    The EMA update of each teacher is `momentum * teacher + (1 - momentum) * student`, once for each optimizer
    step, for parameters only. Buffers (BatchNorm's running statistics) are the teacher's own. They come from
    its forward passes in training mode, as in the authors' code of MoCo and BYOL.

    A teacher has no dropout and no stochastic depth, so its targets are not random. The encoders of the
    papers have neither, or only the student has stochastic depth (DINO). Some encoders of transformers have
    stochastic depth by default, such as Swin, SegFormer and EfficientNet.

    Attributes:
        ema_update: when the EMA update runs. The default is "after_step". "before_step" is for methods whose
            authors update at the beginning of the next forward pass (MoCo). Both average the same student
            weights, but "before_step" uses the momentum of the next step.
    """

    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = (("backbone", "teacher_backbone"),)
    ema_update: ClassVar[str] = "after_step"

    momentum: Tensor

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        self.teacher_backbone = AutoModel.from_config(config.backbone_config, trust_remote_code=False)
        self._momentum = HostNumber(self, "momentum", float(config.momentum))

    def post_init(self) -> None:
        """Also set the mode of the teachers."""
        super().post_init()
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules. In training mode, only BatchNorm of teachers is in training mode."""
        super().train(mode)
        for _, teacher in self.student_teacher:
            for module in self.get_submodule(teacher).modules():
                module.training = mode and (is_batch_norm(module) or caches_weights(module))
        return self

    def before_step(self, progress: RunProgress) -> None:
        """Write the scheduled momentum, and update teachers if the method updates them first."""
        super().before_step(progress)
        config: Any = self.config
        momentum = scheduled_value(
            config.momentum, config.momentum_end, config.momentum_schedule, progress.fraction
        )
        self._momentum.write(momentum)
        if self.ema_update == "before_step":
            self.update_teachers()

    def after_step(self, progress: RunProgress) -> None:
        """Update teachers, unless they were updated before the step."""
        super().after_step(progress)
        if self.ema_update == "after_step":
            self.update_teachers()

    @torch.no_grad()
    def update_teachers(self) -> None:
        """Make the EMA update of every teacher, without synchronization with the host."""
        for student, teacher in self.student_teacher:
            sources: list[Tensor] = list(self.get_submodule(student).parameters())
            targets: list[Tensor] = list(self.get_submodule(teacher).parameters())
            torch._foreach_lerp_(targets, sources, 1 - self._momentum.value)


class MomentumModel(TeacherModel):
    """A method with a backbone, a projector, and a teacher of both.

    A subclass builds `projector` and `teacher_projector` with the same layers.
    """

    student_teacher = (*TeacherModel.student_teacher, ("projector", "teacher_projector"))

    projector: nn.Module
    teacher_projector: nn.Module

    @torch.no_grad()
    def teacher_projections(self, images_BVCHW: Tensor) -> Tensor:
        """Return the teacher's projections (B, V, P) of images (B, V, C, H, W), without gradient."""
        return self.apply_to_views(
            lambda images: self.teacher_projector(encode(self.teacher_backbone, images)), images_BVCHW
        )
