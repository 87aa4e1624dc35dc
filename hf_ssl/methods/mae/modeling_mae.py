# SPDX-License-Identifier: Apache-2.0
"""MAE: masked autoencoder (arXiv:2111.06377).

Legend: B images, P patches of an image, K visible and M masked patches, X values of a patch, D dims.
"""

import math
from typing import Any

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForPreTraining
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import masked_patch_mse
from hf_ssl.losses.regression import patch_statistics
from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.modeling.configuration import as_pair
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.modeling.vit import (
    PatchPredictor,
    PatchSelectionModel,
    encode_patches,
    patchify,
    select_patches,
    unpatchify,
)
from hf_ssl.random import FIRST_METHOD_NUMBER, uniforms

# Fields that the configs of ViT and ViTMAE both have and that affect the result. Each is passed, because the
# defaults of the two configs (layer_norm_eps among them) are not the same in every version of transformers.
_ENCODER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias",
)  # fmt: skip
_METHOD_FIELDS = (
    "mask_ratio", "norm_pix_loss", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_num_attention_heads", "decoder_intermediate_size",
)  # fmt: skip
_DECODER_NAMES = {
    "decoder_embed": "embed", "decoder_pos_embed": "positions.table", "decoder_layers": "layers",
    "decoder_norm": "norm", "decoder_pred": "pixels", "mask_token": "mask_token",
}  # fmt: skip


class MAEForPreTraining(PatchSelectionModel):
    """An encoder receives a quarter of an image's patches. A small decoder predicts the pixels of the others.

    Masked patches pass through no block of the encoder. Positions are fixed sine-cosine tables, also in the
    encoder. Weight decay does not apply to the class and mask tokens. In the authors' code it does, because
    these tokens are tensors with three dimensions.
    """

    config_class = MAEConfig
    mask_inputs = ("noise",)

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.patch_size = as_pair(self.backbone.config.patch_size)
        self.num_patches = math.prod(self.grid)
        # The number of visible patches is rounded down, as in the authors' code.
        self.num_visible = int(self.num_patches * (1 - config.mask_ratio))
        if not 0 < self.num_visible < self.num_patches:
            raise UserError(
                "method.mask_ratio: expected at least one visible and one masked patch, got "
                f"{config.mask_ratio}, which makes {self.num_visible} of {self.num_patches} patches visible"
            )
        values = math.prod(self.patch_size) * self.backbone.config.num_channels
        self.decoder = MAEDecoder(self.backbone, config, values)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if module is self:  # this call is the last one, after the encoder's initialization
            initialize_as_authors(self)

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the noise (B, P) that determines which patches are visible."""
        return {"noise": torch.from_numpy(uniforms(seeds, FIRST_METHOD_NUMBER, self.num_patches)).float()}

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return predicted and true pixels (B, M, X) of masked patches, `masked` (B, M), and `features`.

        `masked` holds the indices of masked patches. `features` (B, 1, D) is the mean token of visible
        patches. Without `noise`, uniform noise is sampled from torch's global generator.
        """
        images = inputs["pixel_values"][:, 0]
        kept, masked = self.split(images, inputs.get("noise"))
        latents = encode_patches(self.backbone, images, kept)
        return {
            "predictions": self.decoder(latents, kept, masked),
            "targets": select_patches(patchify(images, self.patch_size), masked),
            "masked": masked,
            "features": latents[:, self.num_special_tokens :].detach().mean(1, keepdim=True),
        }

    def split(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the indices of visible (B, K) and masked (B, M) patches.

        The patches with the least noise are visible.

        Raises:
            UserError: the size of the images does not match the decoder's positions.
        """
        self.check_grid(images)
        if noise is None:
            noise = torch.rand(len(images), self.num_patches, device=images.device)
        order = noise.argsort(dim=1)
        return order[:, : self.num_visible], order[:, self.num_visible :]

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean squared error over the values of masked patches."""
        predictions, masked = embeddings["predictions"], embeddings["masked"]
        loss = masked_patch_mse(
            predictions, embeddings["targets"], torch.ones_like(masked), normalize=self.config.norm_pix_loss
        )
        terms = {"reconstruction": loss.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=embeddings["features"])

    def pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return `reconstructions`: the image, its visible patches, and the visible patches with the
        predictions of the others.
        """
        images, made = inputs["pixel_values"][:, 0].float(), self.embed(inputs)
        patches, prediction = patchify(images, self.patch_size), made["predictions"].float()
        if self.config.norm_pix_loss:  # restore the mean and variance of the patch
            mean, std = patch_statistics(made["targets"].float())
            prediction = prediction * std + mean
        index = made["masked"].unsqueeze(-1).expand_as(prediction)
        visible = patches.scatter(1, index, torch.zeros_like(prediction))
        completed = patches.scatter(1, index, prediction)
        tiles = [images, *(unpatchify(each, self.patch_size, self.grid) for each in (visible, completed))]
        return {"reconstructions": torch.stack(tiles, dim=1)}

    @classmethod
    def from_vitmae(cls, source: Any, views: dict | None = None) -> "MAEForPreTraining":
        """Return a model with the encoder and decoder of a ViTMAE of transformers.

        Args:
            source: a `ViTMAEForPreTraining`, or the folder or Hub id of a published one.
            views: the augmentation preset for training (`hf_ssl.views.ViewPreset`, as plain data).

        Raises:
            OSError, ValueError: `from_pretrained` raises them.
        """
        if not isinstance(source, ViTMAEForPreTraining):
            source = ViTMAEForPreTraining.from_pretrained(source, trust_remote_code=False)
        given = source.config
        config = MAEConfig(
            backbone_config=ViTConfig(**{name: getattr(given, name) for name in _ENCODER_FIELDS}),
            views=views,
            **{name: getattr(given, name) for name in _METHOD_FIELDS},
        )
        model = cls(config).to(source.dtype)
        weights = {f"backbone.{name}": value for name, value in source.vit.state_dict().items()}
        weights |= {f"decoder.{_renamed(name)}": value for name, value in source.decoder.state_dict().items()}
        # A ViTMAE has no pooler. The new model keeps its own, which returns the class token.
        pooler = {
            key: value for key, value in model.state_dict().items() if key.startswith("backbone.pooler.")
        }
        model.load_state_dict(weights | pooler)
        return model


class MAEDecoder(PatchPredictor):
    """MAE's decoder: predicts the pixels of masked patches from the tokens of visible ones.

    Args:
        encoder: the vision transformer whose tokens are the input.
        config: configuration of the method.
        values: X.
    """

    def __init__(self, encoder: PreTrainedModel, config: MAEConfig, values: int) -> None:
        settings = encoder.config
        layer = ViTConfig(
            hidden_size=config.decoder_hidden_size,
            num_attention_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            hidden_act=settings.hidden_act,
            qkv_bias=settings.qkv_bias,
            layer_norm_eps=settings.layer_norm_eps,
            hidden_dropout_prob=settings.hidden_dropout_prob,
            attention_probs_dropout_prob=settings.attention_probs_dropout_prob,
        )
        layer._attn_implementation = config._attn_implementation
        super().__init__(encoder, layer, config.decoder_num_hidden_layers)
        self.pixels = nn.Linear(config.decoder_hidden_size, values)

    def forward(self, latents: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Return the predicted values (B, M, X) of masked patches.

        Args:
            latents: the encoder's last hidden state: special tokens, then K visible patches.
            kept: (B, K) int64 indices of visible patches.
            masked: (B, M) int64 indices of masked patches.
        """
        return self.pixels(self.hidden_states(latents, kept, masked[:, None]))


@torch.no_grad()
def initialize_as_authors(model: MAEForPreTraining) -> None:
    """Initialize weights as the authors do, unless a checkpoint has filled them.

    Linear layers and the patch projection start with Xavier; transformers uses N(0, 0.02). The authors have
    one layer of three times the width for queries, keys and values, so its Xavier bound is smaller.

    Source: facebookresearch/mae, models_mae.py, `initialize_weights`.
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


def _renamed(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{_DECODER_NAMES[first]}{dot}{rest}"


AutoModelForPreTraining.register(MAEConfig, MAEForPreTraining)
