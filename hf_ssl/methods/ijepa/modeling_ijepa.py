# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: predicting features of hidden blocks (arXiv:2301.08243)."""

from typing import Any

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor
from torch.nn.functional import layer_norm
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import latent_smooth_l1
from hf_ssl.methods.ijepa.configuration_ijepa import IJEPAConfig
from hf_ssl.methods.ijepa.predictor import IJEPAPredictor
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.gather import least_over_processes
from hf_ssl.modeling.momentum import TeacherModel
from hf_ssl.modeling.outputs import Progress, SSLOutput
from hf_ssl.modeling.positions import fix_positions, patch_grid
from hf_ssl.modeling.tokens import TOKEN_TYPES, encode_tokens, select, special_tokens
from hf_ssl.views.masks import first_patches, multi_block, size_numbers

# Sizes of blocks outside of training: in the middle, so that measurements of a run can be compared.
_MEASURED = (0.5, 0.5)


class IJEPAForPreTraining(TeacherModel):
    """From some of an image's patches, a predictor tells the features that a teacher has at others.

    The context encoder computes nothing but the context's patches. The teacher sees the whole image; its
    features, normalised within each patch, are the targets. It moves after the optimiser's step, with the
    momentum of that step, and it is what is published. Positions are fixed sine-cosine tables, the encoder's
    too (a checkpoint's own table stays as it is).

    Every step has one size of target blocks and one of context blocks, and contexts are truncated to the
    shortest of the batch. The batch is that of all processes together, so that their number changes nothing;
    in the authors' code each process truncates its own, and contexts are some patches longer where
    processes are many. Unlike there, weight decay spares the mask token.

    An encoder with special tokens (CLS, registers) is trained too: they stand beside the context's patches,
    and the predictor sees them; they are nobody's target.
    """

    config_class = IJEPAConfig
    backbone_types = TOKEN_TYPES
    minimum_views = 1
    maximum_views = 1
    exported = "teacher_backbone"

    def __init__(self, config: IJEPAConfig) -> None:
        super().__init__(config)
        self.special = special_tokens(self.backbone)
        self.grid = patch_grid(self.backbone)
        heads = config.predictor_attention_heads or int(self.backbone.config.num_attention_heads)
        self.predictor = IJEPAPredictor(config, feature_size(self.backbone), heads, self.special, self.grid)
        self._size_numbers = _MEASURED
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, IJEPAPredictor):
            init.trunc_normal_(module.mask_token, std=self.config.initializer_range)
        if module is self:  # comes last, after the encoder has initialised itself; its teacher is a copy
            fix_positions(self.backbone)

    def freeze(self) -> None:
        """Also the encoder's position table."""
        super().freeze()
        backbone: Any = self.backbone
        backbone.embeddings.position_embeddings.requires_grad_(False)

    def before_step(self, progress: Progress) -> None:
        """Choose the sizes of this step's blocks, besides what every teacher needs."""
        super().before_step(progress)
        self._size_numbers = size_numbers(progress.step)

    def draw(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """`context_patches` (B, K) and `target_patches` (B, M, T), numbers of patches.

        Sizes of blocks are those of the step, or medium ones in eval mode; places follow from the seeds.
        Contexts are truncated to the shortest of these images, and by `forward` to that of all processes.
        """
        target, context = self._size_numbers if self.training else _MEASURED
        contexts, targets = multi_block(
            seeds,
            grid=self.grid,
            target=self.config.target_size(target),
            context=self.config.context_size(context),
            targets=self.config.target_blocks,
            more_than=self.config.context_more_than,
            reach_edges=self.config.blocks_reach_edges,
        )
        shortest = int(contexts.sum(axis=1).min())
        return {
            "context_patches": torch.from_numpy(first_patches(contexts, shortest)),
            "target_patches": torch.from_numpy(targets),
        }

    def embed(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
        context_patches: Tensor | None = None,
        target_patches: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predicted and actual features (B, M, T, D) of the target blocks, and `features` (B, 1, D), the mean
        of the teacher's normalised features over the whole image.
        """
        images = pixel_values[:, 0]
        if context_patches is None or target_patches is None:
            raise UserError("I-JEPA needs context_patches and target_patches, which `draw(seeds)` makes")
        context = encode_tokens(self.backbone, images, context_patches)
        taught = self.teach(images)
        return {
            "predictions": self.predictor(context, context_patches, target_patches),
            "targets": select(taught, target_patches.flatten(1)).unflatten(1, target_patches.shape[1:]),
            "features": taught.mean(1, keepdim=True),
        }

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor:
        """The teacher's features (B, P, D) of all patches of images (B, C, H, W), each patch's normalised."""
        patches = encode_tokens(self.teacher_backbone, images)[:, self.special :]
        return layer_norm(patches, patches.shape[-1:])

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Mean smooth L1 distance between predicted and actual features."""
        loss = latent_smooth_l1(embeddings["predictions"], embeddings["targets"])
        terms = {"smooth_l1": loss.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=embeddings["features"])

    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
        context_patches: Tensor | None = None,
        target_patches: Tensor | None = None,
    ) -> SSLOutput:
        """Loss of a batch; several processes that train use as many context patches as the one with the
        fewest, for which the host waits for the device.

        Args:
            pixel_values: (B, 1, C, H, W) images, normalised.
            local_pixel_values: none are taken.
            sample_index: not used.
            context_patches: (B, K) numbers, row by row, of the patches that the context encoder sees.
            target_patches: (B, M, T) numbers of the patches of each block that is predicted.
        """
        self.check_views(
            pixel_values.shape[1], 0 if local_pixel_values is None else local_pixel_values.shape[1]
        )
        if self.training and context_patches is not None:
            shortest = least_over_processes(context_patches.shape[1], pixel_values.device)
            context_patches = context_patches[:, :shortest]
        return self.conclude(
            self.embed(pixel_values, local_pixel_values, sample_index, context_patches, target_patches)
        )

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """`explained_variance`: share of the targets' variance over images and places that predictions
        explain, 1 where they are exact. Together with a low spread of features it tells that only places are
        predicted.
        """
        predictions, targets = (embeddings[name].float().flatten(0, 2) for name in ("predictions", "targets"))
        unexplained = (predictions - targets).square().mean() / targets.var(0, correction=0).mean()
        return {"explained_variance": 1 - unexplained.item()}


AutoModelForPreTraining.register(IJEPAConfig, IJEPAForPreTraining)
