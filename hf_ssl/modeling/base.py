# SPDX-License-Identifier: Apache-2.0
"""The base of every method: what is gathered, what is frozen, what is copied, and what happens around a
step.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
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
from hf_ssl.modeling.heads import WeightNormLinear
from hf_ssl.modeling.memory import Memory
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
        minimum_views, maximum_views: views of an image that the loss needs and takes.
        backbone_types: model types of the backbones that it can train; None where any will do.
        needs_sample_index: it remembers something of every image, so images need a row number, which those of
            a stream have not. Its config has `num_samples`, how many images there are.
        begins_with_a_pass: all images are embedded and remembered once before the first step.
        takes_local_views: whether smaller views beside the global ones (multi-crop) mean anything to it.
        student_teacher: pairs of attribute names; a teacher starts as a copy of its student, is frozen, and
            is moved by the method.
        exported: name of the encoder that is published: the backbone, or its teacher.
        remembered: names of the embeddings that `remember` takes over.
        collapsed_below: measurements of the monitor, its own or the method's, with the value below which the
            method has collapsed.
        views_share_statistics: whether BatchNorm normalises all views of one size together. Where it is
            False each view goes through layers with BatchNorm by itself, as in authors' loops.
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
    maximum_views: ClassVar[int | None] = None
    backbone_types: ClassVar[tuple[str, ...] | None] = None
    needs_sample_index: ClassVar[bool] = False
    begins_with_a_pass: ClassVar[bool] = False
    takes_local_views: ClassVar[bool] = False
    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = ()
    exported: ClassVar[str] = "backbone"
    remembered: ClassVar[tuple[str, ...]] = ()
    collapsed_below: ClassVar[dict[str, float]] = {"embedding_std": 0.05, "embedding_rank": 2.0}
    views_share_statistics: ClassVar[bool] = True

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

    def initialize_weights(self) -> None:
        """As in transformers; then `_init_weights` is asked about the whole model, which transformers passes
        over where all parameters belong to parts of it.
        """
        super().initialize_weights()
        self._init_weights(self)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, Memory | WeightNormLinear):
            module.initialize()

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
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """How parameters are optimised where that differs from the trainer's defaults."""
        return ()

    @property
    def exported_encoder(self) -> PreTrainedModel:
        """The encoder that is published."""
        return cast(PreTrainedModel, self.get_submodule(self.exported))

    # The two halves of a forward pass, and what is drawn for it.

    def draw(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """What the method draws for images beside their views (masks, noise): further arguments of `forward`,
        batch first, on the CPU.

        A function of the seeds and of what `before_step` wrote, so that it is the same for any number of
        processes, after a resumption and when it is called again; `hf_ssl.views.uniforms` makes numbers, and
        those from `hf_ssl.views.FOR_METHODS` on are free.

        Args:
            seeds: (B,) uint64, one for each image and pass over the data.
        """
        return {}

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
        self.check_views(
            pixel_values.shape[1], 0 if local_pixel_values is None else local_pixel_values.shape[1]
        )
        return self.conclude(self.embed(pixel_values, local_pixel_values, sample_index))

    def conclude(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """The loss of this process's embeddings; in training, queues, banks and centres move afterwards.

        Apart from `embed` so that embeddings may be made in chunks and this is done once
        (`training.contrastive_chunk_size`).
        """
        if self.couples_samples:
            embeddings = {name: gather(tensor) for name, tensor in embeddings.items()}
        output = self.objective(embeddings)
        if self.training and self.remembered:
            kept = {name: embeddings[name].detach() for name in self.remembered}
            if not self.couples_samples:
                kept = {name: gather(tensor) for name, tensor in kept.items()}
            self.remember(kept)
        return output

    def remember(self, embeddings: dict[str, Tensor]) -> None:
        """Called once for each batch in training, after the loss: the place where queues, banks and centres
        move.

        Args:
            embeddings: those that `remembered` names, of all processes, without gradient.
        """

    @classmethod
    def check_views(cls, global_views: int, local_views: int) -> None:
        """Raise `UserError` if the method cannot be trained with so many views of an image."""
        count, most = global_views + local_views, cls.maximum_views
        name = cls.__name__.removesuffix("ForPreTraining")
        if local_views and not cls.takes_local_views:
            raise UserError(f"views.local: {name} takes no local views, got {local_views}")
        if count < cls.minimum_views or (most is not None and count > most):
            wanted = f"exactly {most}" if most == cls.minimum_views else f"at least {cls.minimum_views}"
            raise UserError(f"views.count: {name} needs {wanted} views of an image, got {count}")

    @classmethod
    def check_streaming(cls, streaming: bool) -> None:
        """Raise `UserError` if the method cannot be trained on a stream and this is one."""
        if cls.needs_sample_index and streaming:
            name = cls.__name__.removesuffix("ForPreTraining")
            raise UserError(
                f"data.streaming: {name} remembers every image and needs data.streaming=false; methods with "
                "a queue (MoCo, SwAV) take streams"
            )

    def check_source(self, streaming: bool, num_rows: int | None) -> None:
        """Raise `UserError` if this model cannot be trained on such data."""
        self.check_streaming(streaming)
        config: Any = self.config
        if self.needs_sample_index and config.num_samples != num_rows:
            raise UserError(
                f"config.num_samples: expected {num_rows}, the number of images, got {config.num_samples}"
            )

    # What embed is made of.

    def encode_views(self, images_BVCHW: Tensor) -> Tensor:
        """Features (B, V, D) of images (B, V, C, H, W) by the backbone."""
        return self.over_views(lambda images: encode(self.backbone, images), images_BVCHW)

    def over_views(self, function: Callable[[Tensor], Tensor], x_BV: Tensor) -> Tensor:
        """Apply a function of (N, ...) to (B, V, ...): all views in one batch, or each by itself where
        BatchNorm must not see them together.
        """
        if self.views_share_statistics or not self._normalizes_batches():
            return function(x_BV.flatten(0, 1)).unflatten(0, x_BV.shape[:2])
        return torch.stack([function(view) for view in x_BV.unbind(1)], dim=1)

    def _normalizes_batches(self) -> bool:
        return self.training and any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules()
        )

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """What the monitor records of this method beside what it measures of all: named numbers.

        Args:
            embeddings: of the probe, in eval mode, as `embed` makes them.
        """
        return {}

    def pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures that a run leaves of what the method does with some images, by the name of their file:
        each (B, V, C, H, W) with V tiles in a row, normalised like the views. Called in eval mode.

        Args:
            inputs: arguments of `forward`.
        """
        return {}

    # Hooks around a step, called by SSLTrainer alone.

    def before_epoch(self, progress: Progress) -> None:
        """Called before the first batch of a pass; never again when a run resumes in the middle of one."""

    def before_step(self, progress: Progress) -> None:
        """Called before an optimiser step; the place where scheduled values are written to their buffers."""

    def after_backward(self, progress: Progress) -> None:
        """Called between the (clipped) gradients of a step and the optimiser."""

    def after_step(self, progress: Progress) -> None:
        """Called once for each optimiser step that was made, after it; the place where teachers move."""
