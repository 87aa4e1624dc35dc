# SPDX-License-Identifier: Apache-2.0
"""DINO: self-distillation with no labels (arXiv:2104.14294)."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForPreTraining

from hf_ssl.losses import dino_center, dino_cross_entropy
from hf_ssl.losses.upcasting import upcast
from hf_ssl.methods.dino.configuration_dino import DINOConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.configuration import scheduled_value
from hf_ssl.modeling.heads import MLPHead, WeightNormLinear
from hf_ssl.modeling.memory import Center, HostNumber
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import COLLAPSED_PROTOTYPES, RunProgress, SSLOutput, prototype_usage
from hf_ssl.modeling.parameter_groups import ParameterRule
from hf_ssl.modeling.vit import add_drop_path, without_drop_path


class DINOForPreTraining(MomentumModel):
    """A student predicts, from each view, the distribution that a momentum teacher outputs for another view.

    The student receives all views, and the teacher receives only the global views. The teacher's outputs are
    centered with a moving average over earlier batches and sharpened by a low temperature. Centering and
    sharpening together prevent collapse. The teacher's backbone is published. All views of one size are
    encoded together, as in the authors' code.
    """

    config_class = DINOConfig
    takes_local_views = True
    collapsed_below = COLLAPSED_PROTOTYPES
    student_teacher = (*MomentumModel.student_teacher, ("last_layer", "teacher_last_layer"))
    exported = "teacher_backbone"
    exported_projector = "teacher_projector"
    memory_inputs = ("teacher",)

    teacher_temperature: Tensor

    def __init__(self, config: DINOConfig) -> None:
        super().__init__(config)
        self.teacher_backbone = AutoModel.from_config(
            without_drop_path(config.backbone_config), trust_remote_code=False
        )
        add_drop_path(self.backbone, config.drop_path_rate)
        hidden = [config.projection_hidden_size] * (config.projection_layers - 1)
        sizes = [feature_size(self.backbone), *hidden, config.bottleneck_size]
        norm, bottleneck = config.projection_batch_norm, config.bottleneck_size
        self.projector = MLPHead(sizes, norm=norm, activation=nn.GELU, last_bias=True)
        self.teacher_projector = MLPHead(sizes, norm=norm, activation=nn.GELU, last_bias=True)
        fixed_norm = config.norm_last_layer
        self.last_layer = WeightNormLinear(bottleneck, config.output_size, fixed_norm=fixed_norm)
        self.teacher_last_layer = WeightNormLinear(bottleneck, config.output_size, fixed_norm=fixed_norm)
        self.center = Center(config.output_size)
        start = self._scheduled_temperature(0.0)
        self._teacher_temperature = HostNumber(self, "teacher_temperature", start)
        self.post_init()

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Return the rule that freezes the last layer in the first epochs."""
        return (ParameterRule(r"^last_layer\.", frozen_epochs=self.config.freeze_last_layer_epochs),)

    def _scheduled_temperature(self, epoch: float) -> float:
        config = self.config
        start, end = config.teacher_temperature_start, config.teacher_temperature
        warmup = config.teacher_temperature_warmup_epochs
        if epoch >= warmup:
            return end
        fraction = epoch / warmup if warmup < 1 else int(epoch) / max(1, math.ceil(warmup) - 1)
        return scheduled_value(start, end, "linear", fraction)

    def before_step(self, progress: RunProgress) -> None:
        """Also write the scheduled temperature of the teacher."""
        super().before_step(progress)
        self._teacher_temperature.write(self._scheduled_temperature(progress.epoch))

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the unit vectors before the last layer.

        They are (B, V, P) of the student and the teacher for global views. If there are local views, the
        result also has the student's (B, L, P).
        """
        student = self.unit_projections(inputs, "student")
        teacher = normalize(upcast(self.teacher_projections(inputs["pixel_values"])), dim=-1)
        return student | {"teacher": teacher}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean cross entropy between the student's views and the teacher's other views."""
        with torch.no_grad():
            teacher_ABK = self.teacher_last_layer(embeddings["teacher"].transpose(0, 1))
        loss = dino_cross_entropy(
            self.last_layer(self.join_views(embeddings, "student")),
            teacher_ABK,
            self.center.mean,
            student_temperature=self.config.student_temperature,
            teacher_temperature=self._teacher_temperature.value,
        )
        return SSLOutput(loss=loss, terms={"distillation": loss.detach()}, embeddings=embeddings["student"])

    @torch.no_grad()
    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Update the center by EMA.

        The last layer is linear, so its output for the mean equals the mean of its outputs.
        """
        mean_P = embeddings["teacher"].mean((0, 1))
        outputs_K = self.teacher_last_layer(mean_P)
        moved = dino_center(self.center.mean, outputs_K[None, None], momentum=self.config.center_momentum)
        self.center.mean.copy_(moved)

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `prototype_usage` for the teacher's largest centered outputs of the first view."""
        outputs = self.teacher_last_layer(embeddings["teacher"][:, 0]) - self.center.mean
        return prototype_usage(outputs.argmax(dim=-1), self.config.output_size)


AutoModelForPreTraining.register(DINOConfig, DINOForPreTraining)
