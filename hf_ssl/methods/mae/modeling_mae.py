# SPDX-License-Identifier: Apache-2.0
"""MAE: masked autoencoder (arXiv:2111.06377)."""

import math
from typing import Any

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import masked_patch_mse
from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.methods.mae.decoder import MAEDecoder
from hf_ssl.methods.mae.patches import patchify, unpatchify
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.modeling.positions import fix_positions, patch_grid
from hf_ssl.modeling.tokens import TOKEN_TYPES, encode_tokens, select, special_tokens
from hf_ssl.random import FIRST_METHOD_NUMBER, uniforms


class MAEForPreTraining(SSLPreTrainedModel):
    """A vision transformer sees a quarter of an image's patches; a small decoder predicts the pixels of the
    others.

    Patches that are masked never enter a block of the encoder. Positions are fixed sine-cosine tables, the
    encoder's too. Unlike in the authors' code, weight decay spares the class and mask tokens, which it hits
    there because they have three dimensions.
    """

    config_class = MAEConfig
    backbone_types = TOKEN_TYPES
    minimum_views = 1
    maximum_views = 1

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.special = special_tokens(self.backbone)
        self.grid = patch_grid(self.backbone)
        embedding: Any = self.backbone.get_submodule("embeddings.patch_embeddings")
        self.patch_size: tuple[int, int] = tuple(embedding.patch_size)
        self.patches = math.prod(self.grid)
        # the authors' rounding: what is left after masking, rounded down
        self.visible = int(self.patches * (1 - config.mask_ratio))
        if not 0 < self.visible < self.patches:
            raise UserError(
                f"method.mask_ratio: {config.mask_ratio} leaves {self.visible} of {self.patches} patches "
                "visible; at least one must be and one must not"
            )
        values = math.prod(self.patch_size) * embedding.num_channels
        self.decoder = MAEDecoder(config, feature_size(self.backbone), self.special, self.grid, values)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:  # comes last, after the encoder has initialised itself
            initialize_as_authors(self)
            fix_positions(self.backbone)

    def freeze(self) -> None:
        """Also the encoder's position table."""
        super().freeze()
        self.backbone.get_parameter("embeddings.position_embeddings").requires_grad_(False)

    def draw(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """The noise (B, P) that decides which patches are visible."""
        return {"noise": torch.from_numpy(uniforms(seeds, FIRST_METHOD_NUMBER, self.patches)).float()}

    def embed(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Predicted and true pixels (B, M, X) of the M masked patches, their numbers `masked` (B, M), and
        `features` (B, 1, D), the mean of the visible patches' tokens.
        """
        images = pixel_values[:, 0]
        kept, masked = self.split(images, noise)
        latents = encode_tokens(self.backbone, images, kept)
        return {
            "predictions": self.decoder(latents, kept, masked),
            "targets": select(patchify(images, self.patch_size), masked),
            "masked": masked,
            "features": latents[:, self.special :].detach().mean(1, keepdim=True),
        }

    def split(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numbers of visible (B, K) and masked (B, M) patches: those with the smallest noise are visible."""
        height, width = (
            side // patch for side, patch in zip(images.shape[-2:], self.patch_size, strict=True)
        )
        if (height, width) != self.grid:
            raise UserError(
                f"pixel_values: expected images of {self.grid} patches, which the decoder has positions for, "
                f"got {(height, width)}"
            )
        if noise is None:
            noise = torch.rand(len(images), self.patches, device=images.device)
        order = noise.argsort(dim=1)
        return order[:, : self.visible], order[:, self.visible :]

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Mean squared error over the values of masked patches."""
        predictions, masked = embeddings["predictions"], embeddings["masked"]
        loss = masked_patch_mse(
            predictions, embeddings["targets"], torch.ones_like(masked), normalize=self.config.norm_pix_loss
        )
        terms = {"reconstruction": loss.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=embeddings["features"])

    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> SSLOutput:
        """Loss of a batch.

        Args:
            pixel_values: (B, 1, C, H, W) images, normalised.
            local_pixel_values: none are taken.
            sample_index: not used.
            noise: (B, P) numbers, one for each patch, row by row; those with the smallest are visible. None
                draws uniform ones from torch's global generator.
        """
        self.check_views(
            pixel_values.shape[1], 0 if local_pixel_values is None else local_pixel_values.shape[1]
        )
        return self.conclude(self.embed(pixel_values, local_pixel_values, sample_index, noise))

    def pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`reconstructions`: of each image itself, what the encoder sees of it, and that completed by what
        the decoder predicts.
        """
        images, made = inputs["pixel_values"][:, 0].float(), self.embed(**inputs)
        patches, prediction = patchify(images, self.patch_size), made["predictions"].float()
        if self.config.norm_pix_loss:  # back to the brightness and contrast of the patch itself
            variance, mean = torch.var_mean(made["targets"].float(), dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        index = made["masked"].unsqueeze(-1).expand_as(prediction)
        shown = [patches.scatter(1, index, filled) for filled in (torch.zeros_like(prediction), prediction)]
        tiles = [images, *(unpatchify(each, self.patch_size, self.grid) for each in shown)]
        return {"reconstructions": torch.stack(tiles, dim=1)}

    @classmethod
    def from_vitmae(cls, source: Any, views: dict | None = None) -> "MAEForPreTraining":
        """Encoder and decoder of a ViTMAE of transformers, as one of these.

        Args:
            source: a `ViTMAEForPreTraining`, or the folder or Hub id of a published one.
            views: the preset to train on with (`hf_ssl.views.ViewPreset`, as plain data).
        """
        from hf_ssl.methods.mae.vitmae import convert  # loads another model class

        return convert(cls, source, views)


@torch.no_grad()
def initialize_as_authors(model: MAEForPreTraining) -> None:
    """Draw what no checkpoint has filled as the authors do: Xavier for linear layers and the patch
    projection, which transformers draws from N(0, 0.02) (models_mae.py, `initialize_weights`).

    There queries, keys and values are one layer of three times the width, whose Xavier bound is smaller.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fused = 3 if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") else 1
            _xavier(module.weight, module.in_features, fused * module.out_features)
    projection = model.backbone.get_parameter("embeddings.patch_embeddings.projection.weight")
    _xavier(projection, projection[0].numel(), len(projection))
    init.normal_(model.decoder.mask_token, std=0.02)


def _xavier(weight: Tensor, inputs: int, outputs: int) -> None:
    bound = math.sqrt(6 / (inputs + outputs))
    init.uniform_(weight, -bound, bound)


AutoModelForPreTraining.register(MAEConfig, MAEForPreTraining)
