# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: image-based joint-embedding predictive architecture (arXiv:2301.08243).

Legend: B images, P patches of an image, K context patches, M target blocks, T patches of a block, D dims.
"""

from typing import Any

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForPreTraining
from transformers.models.vit.configuration_vit import ViTConfig

from hf_ssl.errors import UserError
from hf_ssl.losses import latent_smooth_l1, latent_squared_l2
from hf_ssl.methods.ijepa.configuration_ijepa import IJEPAConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.gather import min_over_processes
from hf_ssl.modeling.momentum import TeacherModel
from hf_ssl.modeling.outputs import RunProgress, SSLOutput
from hf_ssl.modeling.vit import (
    PatchPredictor,
    PatchSelectionModel,
    encode_patches,
    select_patches,
)
from hf_ssl.views.masks import block_size_numbers, first_patches, sample_multi_block_masks

_EVAL_BLOCK_SIZE_NUMBERS = (0.5, 0.5)
"""Numbers that select medium block sizes in eval mode. They make the measurements of a run comparable."""


class IJEPAForPreTraining(PatchSelectionModel, TeacherModel):
    """A predictor predicts the teacher's features of target blocks from the other patches of the image.

    The encoder computes only the context patches. The teacher receives the whole image. Its features,
    normalized within each patch, are the targets. Its EMA update comes after the optimizer's step, with the
    momentum of that step. The teacher is published. Positions are fixed sine-cosine tables, also in the
    encoder. If a checkpoint contains another table, the encoder keeps that table.

    Every step has one size of target blocks and one of context blocks. Contexts are truncated to the shortest
    of the batch of all processes, so the number of processes does not change the result. In the authors'
    code each process truncates its own batch, so contexts are a few patches longer with many processes.
    Weight decay does not apply to the mask token; in the authors' code it does.

    Encoders with special tokens (class token, registers) are supported. The predictor receives these tokens,
    but they are not targets.
    """

    config_class = IJEPAConfig
    exported = "teacher_backbone"
    mask_inputs = ("context_patches", "target_patches")

    def __init__(self, config: IJEPAConfig) -> None:
        super().__init__(config)
        self.predictor = IJEPAPredictor(self.backbone, config)
        self._block_size_numbers = _EVAL_BLOCK_SIZE_NUMBERS
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, IJEPAPredictor):
            init.trunc_normal_(module.mask_token, std=self.config.initializer_range)

    def before_step(self, progress: RunProgress) -> None:
        """Also select the sizes of this step's blocks."""
        super().before_step(progress)
        self._block_size_numbers = block_size_numbers(progress.step)

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return patch indices: `context_patches` (B, K) and `target_patches` (B, M, T).

        The step determines the sizes of blocks, which are medium in eval mode. The seeds determine their
        positions. Contexts are truncated to the shortest of these images. Then `forward` truncates them to
        the shortest of all processes.
        """
        target, context = self._block_size_numbers if self.training else _EVAL_BLOCK_SIZE_NUMBERS
        contexts, targets = sample_multi_block_masks(
            seeds,
            grid=self.grid,
            target=self.config.target_size(target),
            context=self.config.context_size(context),
            targets=self.config.target_blocks,
            minimum_patches=self.config.context_more_than + 1,
            reach_edges=self.config.blocks_reach_edges,
        )
        shortest = int(contexts.sum(axis=1).min())
        return {
            "context_patches": torch.from_numpy(first_patches(contexts, shortest)),
            "target_patches": torch.from_numpy(targets),
        }

    def synchronize_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Truncate contexts to the shortest one of all processes.

        With several processes, the host waits for the device.
        """
        if "context_patches" not in inputs:
            return inputs
        context = inputs["context_patches"]
        shortest = min_over_processes(context.shape[1], context.device)
        return inputs | {"context_patches": context[:, :shortest]}

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return predicted and true features (B, M, T, D) of the target blocks, and `features` (B, 1, D).

        `features` is the mean of the teacher's normalized features over the whole image.

        Raises:
            UserError: the inputs have no masks, or the images do not have the size of the position table.
        """
        missing = [name for name in self.mask_inputs if name not in inputs]
        if missing:
            raise UserError(
                f"{', '.join(missing)}: expected patch indices, got none; pass **sample_masks(seeds)"
            )
        images, targets = inputs["pixel_values"][:, 0], inputs["target_patches"]
        self.check_grid(images)
        context = encode_patches(self.backbone, images, inputs["context_patches"])
        features = self.teacher_features(images)
        return {
            "predictions": self.predictor(context, inputs["context_patches"], targets),
            "targets": select_patches(features, targets.flatten(1)).unflatten(1, targets.shape[1:]),
            "features": features.mean(1, keepdim=True),
        }

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        """Return the teacher's features (B, P, D) of images (B, C, H, W), normalized within each patch."""
        patches = encode_patches(self.teacher_backbone, images)[:, self.num_special_tokens :]
        return layer_norm(patches, patches.shape[-1:])

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the distance between predicted and true features that the config names."""
        name = self.config.distance
        distance = latent_smooth_l1 if name == "smooth_l1" else latent_squared_l2
        loss = distance(embeddings["predictions"], embeddings["targets"])
        return SSLOutput(loss=loss, terms={name: loss.detach()}, embeddings=embeddings["features"])

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `explained_variance`, the share of the targets' variance that predictions explain.

        The variance is over images and positions, and 1 means exact predictions. If it is high while features
        vary little, the predictor predicts only positions.
        """
        predictions, targets = (embeddings[name].float().flatten(0, 2) for name in ("predictions", "targets"))
        unexplained = (predictions - targets).square().mean() / targets.var(0, correction=0).mean()
        return {"explained_variance": 1 - unexplained.item()}


class IJEPAPredictor(PatchPredictor):
    """I-JEPA's predictor: predicts features of target blocks from the tokens of context patches.

    Args:
        encoder: the vision transformer whose tokens are the input.
        config: configuration of the method.
    """

    def __init__(self, encoder: PreTrainedModel, config: IJEPAConfig) -> None:
        size = config.predictor_hidden_size
        layer = ViTConfig(
            hidden_size=size,
            num_attention_heads=config.predictor_attention_heads or int(encoder.config.num_attention_heads),
            intermediate_size=4 * size,
            layer_norm_eps=1e-6,  # the authors' `vit_predictor`
        )
        layer._attn_implementation = config._attn_implementation
        super().__init__(encoder, layer, config.predictor_depth)
        self.features = nn.Linear(size, feature_size(encoder))

    def forward(self, context: Tensor, context_patches: Tensor, target_patches: Tensor) -> Tensor:
        """Return the predicted features (B, M, T, D).

        Args:
            context: the encoder's last hidden state: special tokens, then K context patches.
            context_patches: (B, K) int64 indices of context patches.
            target_patches: (B, M, T) int64 indices of the patches of target blocks.
        """
        hidden = self.features(self.hidden_states(context, context_patches, target_patches))
        return hidden.unflatten(0, target_patches.shape[:2])


AutoModelForPreTraining.register(IJEPAConfig, IJEPAForPreTraining)
