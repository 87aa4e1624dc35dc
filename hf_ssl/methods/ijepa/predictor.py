# SPDX-License-Identifier: Apache-2.0
"""I-JEPA's predictor: from what the context encoder made of some patches to the features of others.

Legend: B images, S special tokens, K patches of the context, M target blocks, T patches of each, D dims of
the encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.vit.configuration_vit import ViTConfig

from hf_ssl.modeling.last_layer import vit_layers
from hf_ssl.modeling.positions import PositionTable

LAYER_NORM_EPS = 1e-6  # the authors' `vit_predictor`


class IJEPAPredictor(nn.Module):
    """A narrow ViT of stock layers. For each target block by itself it gets the context's tokens and, for
    each patch of the block, one and the same token at the position of that patch.

    Args:
        config: of the method.
        encoder_size: D.
        heads: of attention.
        special: S.
        grid: rows and columns of patches in an image.
    """

    def __init__(
        self, config: Any, encoder_size: int, heads: int, special: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        size = config.predictor_hidden_size
        self.special = special
        self.embed = nn.Linear(encoder_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = PositionTable(special, *grid, size)
        layer = ViTConfig(
            hidden_size=size,
            num_attention_heads=heads,
            intermediate_size=4 * size,
            layer_norm_eps=LAYER_NORM_EPS,
        )
        layer._attn_implementation = config._attn_implementation
        self.layers = vit_layers(layer, config.predictor_depth)
        self.norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.features = nn.Linear(size, encoder_size)

    def forward(self, context: Tensor, context_patches: Tensor, target_patches: Tensor) -> Tensor:
        """Predicted features (B, M, T, D).

        Args:
            context: (B, S + K, D), the context encoder's last hidden state.
            context_patches: (B, K) int64 numbers of its patches.
            target_patches: (B, M, T) int64 numbers of those of the blocks.
        """
        blocks, length = target_patches.shape[1:]
        seen = self.embed(context)
        table = self.positions.table[0].to(seen.dtype)
        special, patches = table[: self.special], table[self.special :]
        seen = seen + torch.cat([special.expand(len(seen), -1, -1), patches[context_patches]], dim=1)
        asked = self.mask_token + patches[target_patches.flatten(0, 1)]
        tokens = torch.cat([seen.repeat_interleave(blocks, dim=0), asked], dim=1)
        *layers, last = self.layers
        for layer in layers:
            tokens = layer(tokens)
        return self.features(self.norm(last(tokens, length))).unflatten(0, (-1, blocks))
