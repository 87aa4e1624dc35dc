# SPDX-License-Identifier: Apache-2.0
"""The base of every method: what is gathered, what is frozen, what is copied, and what happens around a
step.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import (
    build_backbone,
    encode,
    freeze_unused,
    hand_out_cls_token,
    initialize_as_timm,
)
from hf_ssl.modeling.configuration import SSLConfig
from hf_ssl.modeling.gather import gather
from hf_ssl.modeling.outputs import Progress, SSLOutput
from hf_ssl.modeling.rules import ParameterRule


class SSLPreTrainedModel(PreTrainedModel):
    """A method of self-supervised learning: a backbone, heads, and two halves of a forward pass.

    A subclass builds its heads in `__init__` (ending with `self.post_init()`) and defines `embed` and
    `objective`. It declares, where they differ from the defaults below, the class attributes:

    Attributes:
        couples_samples: the loss compares images with each other, so embeddings are gathered from all
            processes with gradient. Where the loss is a mean over images, averaging by DDP is exact already
            and this is False.
        minimum_views: views of an image that the loss needs.
        student_teacher: pairs of attribute names; a teacher starts as a copy of its student, is frozen, and
            is moved by the method.
        exported: name of the encoder that is published: the backbone, or its teacher.
        parameter_rules: how parameters are optimised where that differs from the trainer's defaults.
    """

    config_class = SSLConfig
    # Not "encoder": keys of native encoders begin with "encoder." and would be mistaken for the prefix.
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers' own form)
    # The loss is a mean over the batch, and the Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    couples_samples: ClassVar[bool] = False
    minimum_views: ClassVar[int] = 2
    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = ()
    exported: ClassVar[str] = "backbone"
    parameter_rules: ClassVar[tuple[ParameterRule, ...]] = ()

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)

    def post_init(self) -> None:
        """Initialise all weights, then copy teachers: a teacher copied earlier would be drawn anew and
        differ from its student.
        """
        super().post_init()
        initialize_as_timm(self.backbone)
        hand_out_cls_token(self.backbone)
        self.copy_teachers()
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; then freezes what is never trained (loading makes every parameter trainable)
        and, where the checkpoint holds no teacher (an encoder published by itself), copies the student."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if any(key.startswith("backbone.pooler.") for key in info["missing_keys"]):
            hand_out_cls_token(model.backbone)
        model.copy_teachers(missing=info["missing_keys"])
        model.freeze()
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def copy_teachers(self, missing: set[str] | None = None) -> None:
        """Make every teacher equal its student; with `missing`, only the teachers that keys of a checkpoint
        were missing for.
        """
        for student, teacher in self.student_teacher:
            if missing is None or any(key.startswith(f"{teacher}.") for key in missing):
                self.get_submodule(teacher).load_state_dict(self.get_submodule(student).state_dict())

    def freeze(self) -> None:
        """Stop gradients to whatever is never trained: teachers, and parts of the backbone that nothing
        reaches.
        """
        freeze_unused(self.backbone)
        for _, teacher in self.student_teacher:
            self.get_submodule(teacher).requires_grad_(False)

    @property
    def exported_encoder(self) -> PreTrainedModel:
        """The encoder that is published."""
        return cast(PreTrainedModel, self.get_submodule(self.exported))

    # The two halves of a forward pass.

    def embed(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Whatever the objective needs of these images, each tensor batch first (B, ...)."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """The loss of embeddings, gathered over all processes if the method couples samples; pure: no state
        is changed.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no objective")

    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
    ) -> SSLOutput:
        """Loss of a batch.

        Args:
            pixel_values: (B, V, C, H, W) global views, normalised.
            local_pixel_values: (B, L, C, h, w) local views.
            sample_index: (B,) row numbers in the data set.
        """
        self.check_views(pixel_values, local_pixel_values)
        return self.conclude(self.embed(pixel_values, local_pixel_values, sample_index))

    def conclude(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """The loss of this process's embeddings; in training, queues, banks and centres move afterwards.

        Apart from `embed` so that embeddings may be made in chunks and this is done once
        (`training.contrastive_chunk_size`).
        """
        if self.couples_samples:
            embeddings = {name: gather(tensor) for name, tensor in embeddings.items()}
        output = self.objective(embeddings)
        if self.training:
            self.remember(embeddings)
        return output

    def remember(self, embeddings: dict[str, Tensor]) -> None:
        """Called once for each batch in training, after the loss: the place where queues, banks and centres
        take over embeddings (those that `objective` got; detach them)."""

    def check_views(self, pixel_values: Tensor, local_pixel_values: Tensor | None) -> None:
        """Raise `UserError` if there are too few views for the method."""
        views = pixel_values.shape[1] + (0 if local_pixel_values is None else local_pixel_values.shape[1])
        if views < self.minimum_views:
            raise UserError(
                f"{type(self).__name__} needs at least {self.minimum_views} views of an image, got {views}"
            )

    # What embed is made of.

    def encode_views(self, images_BVCHW: Tensor) -> Tensor:
        """Features (B, V, D) of images (B, V, C, H, W) by the backbone."""
        return self.over_views(lambda images: encode(self.backbone, images), images_BVCHW)

    def over_views(self, function: Callable[[Tensor], Tensor], x_BV: Tensor) -> Tensor:
        """Apply a function of (N, ...) to (B, V, ...): all views in one batch, so that BatchNorm sees them
        together.
        """
        return function(x_BV.flatten(0, 1)).unflatten(0, x_BV.shape[:2])

    # Hooks around a step, called by SSLTrainer alone.

    def before_epoch(self, progress: Progress) -> None:
        """Called before the first batch of a pass; never again when a run resumes in the middle of one."""

    def before_step(self, progress: Progress) -> None:
        """Called before an optimiser step; the place where scheduled values are written to their buffers."""

    def after_backward(self, progress: Progress) -> None:
        """Called between the (clipped) gradients of a step and the optimiser."""

    def after_step(self, progress: Progress) -> None:
        """Called once for each optimiser step that was made, after it; the place where teachers move."""
