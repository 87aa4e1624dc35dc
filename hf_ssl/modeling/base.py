# SPDX-License-Identifier: Apache-2.0
"""The base of every method: what is gathered, what is frozen, what is copied, and what happens around a
step.
"""

from collections.abc import Callable
from typing import Any, cast

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
from hf_ssl.modeling.declared import Declared
from hf_ssl.modeling.gather import gather
from hf_ssl.modeling.heads import WeightNormLinear
from hf_ssl.modeling.memory import Memory
from hf_ssl.modeling.outputs import Progress, SSLOutput
from hf_ssl.modeling.rules import ParameterRule


class SSLPreTrainedModel(Declared, PreTrainedModel):
    """A method of self-supervised learning: a backbone, heads, and two halves of a forward pass.

    A subclass builds its heads in `__init__` (ending with `self.post_init()`) and defines `embed` and
    `objective`. It declares what `Declared` lists.
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

    @torch.no_grad()
    def start_from(self, encoder: PreTrainedModel) -> None:
        """Take over the weights of a trained encoder, for the teachers too; heads stay new.

        Raises:
            UserError: the encoder is another one than the backbone.
        """
        wanted, given = self.backbone.state_dict(), encoder.state_dict()
        other = sorted(wanted.keys() ^ given.keys())
        other += [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
        if other:
            raise UserError(f"backbone.init_from: the encoder does not fit the backbone at {other[0]}")
        self.backbone.load_state_dict(given)
        hand_out_cls_token(self.backbone)
        self.copy_teachers()

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
        processes, after a resumption and when it is called again; `hf_ssl.random.uniforms` makes numbers, and
        those from `hf_ssl.random.FIRST_METHOD_NUMBER` on are free.

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
