# SPDX-License-Identifier: Apache-2.0
"""The bases of methods whose teachers follow their students slowly."""

from typing import Any, ClassVar

import torch
import transformers.initialization as init
from torch import Tensor, nn

from hf_ssl.modeling.backbones import build_backbone, encode
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import SSLConfig
from hf_ssl.modeling.outputs import Progress
from hf_ssl.modeling.schedules import scheduled


class TeacherModel(SSLPreTrainedModel):
    """A method with a backbone and a teacher of it; its config has the fields `momentum`, `momentum_end` and
    `momentum_schedule` (see `scheduled`).

    A subclass with a head builds the head's teacher too and names both in `student_teacher`. Every teacher
    becomes `momentum * teacher + (1 - momentum) * student`, once for each optimiser step: parameters alone.
    Buffers (BatchNorm's running statistics) are the teacher's own, made by its own forward passes in training
    mode, as the authors of MoCo and BYOL have it.

    Attributes:
        teacher_moves: "after_step", or "before_step" where the authors move it at the beginning of the next
            forward pass (MoCo): the same weights with the momentum of the next step.
    """

    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = (("backbone", "teacher_backbone"),)
    teacher_moves: ClassVar[str] = "after_step"

    momentum: Tensor

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.teacher_backbone = build_backbone(config.backbone_config)
        settings: Any = config
        # Persistent, so that a checkpoint tells where its schedule was; what is computed with is the number,
        # since reading a tensor would wait for the device.
        self.register_buffer("momentum", torch.tensor(float(settings.momentum)))
        self._momentum = float(settings.momentum)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:  # where a checkpoint of an encoder holds none
            init.constant_(self.momentum, self._momentum)

    def before_step(self, progress: Progress) -> None:
        """Write the scheduled momentum, and move teachers where the method moves them first."""
        super().before_step(progress)
        self._momentum = self.scheduled_momentum(progress)
        self.momentum.fill_(self._momentum)
        if self.teacher_moves == "before_step":
            self.move_teachers()

    def after_step(self, progress: Progress) -> None:
        """Move teachers, unless they have been moved before the step."""
        super().after_step(progress)
        if self.teacher_moves == "after_step":
            self.move_teachers()

    def scheduled_momentum(self, progress: Progress) -> float:
        """The momentum of the step that follows."""
        config: Any = self.config
        return scheduled(config.momentum, config.momentum_end, config.momentum_schedule, progress.fraction)

    @torch.no_grad()
    def move_teachers(self) -> None:
        """One step of every teacher towards its student; no synchronisation with the host."""
        for student, teacher in self.student_teacher:
            leads: list[Tensor] = list(self.get_submodule(student).parameters())
            follows: list[Tensor] = list(self.get_submodule(teacher).parameters())
            torch._foreach_lerp_(follows, leads, 1 - self._momentum)


class MomentumModel(TeacherModel):
    """A method with a backbone, a projector, and a teacher of both. A subclass builds `projector` and
    `teacher_projector`, alike.
    """

    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = (
        ("backbone", "teacher_backbone"),
        ("projector", "teacher_projector"),
    )

    projector: nn.Module
    teacher_projector: nn.Module

    @torch.no_grad()
    def teach(self, images_BVCHW: Tensor) -> Tensor:
        """The teacher's projections (B, V, P) of images (B, V, C, H, W), without gradient."""
        return self.over_views(
            lambda images: self.teacher_projector(encode(self.teacher_backbone, images)), images_BVCHW
        )
