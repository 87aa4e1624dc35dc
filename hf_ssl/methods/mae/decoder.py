# SPDX-License-Identifier: Apache-2.0
"""MAE's decoder: from what the encoder made of visible patches to the pixels of the others.

Legend: B images, S special tokens, K visible, M masked patches, D dims of the encoder, X values of a patch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.vit.configuration_vit import ViTConfig

from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.modeling.last_layer import vit_layers
from hf_ssl.modeling.positions import PositionTable


class MAEDecoder(nn.Module):
    """A small ViT of stock layers over visible tokens and, for each masked patch, one and the same token.

    Blocks do not care for the order of tokens and every token carries its position, so visible ones stay in
    front and nothing is sorted back; only masked ones come out of the last block, to be projected to pixels.

    Args:
        config: of the method.
        encoder_size: D.
        special: S.
        grid: rows and columns of patches in an image.
        values: X.
    """

    def __init__(
        self, config: MAEConfig, encoder_size: int, special: int, grid: tuple[int, int], values: int
    ) -> None:
        super().__init__()
        size = config.decoder_hidden_size
        self.special = special
        self.embed = nn.Linear(encoder_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = PositionTable(special, *grid, size)
        encoder: Any = config.backbone_config
        layer = ViTConfig(
            hidden_size=size,
            num_attention_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            hidden_act=encoder.hidden_act,
            qkv_bias=encoder.qkv_bias,
            layer_norm_eps=encoder.layer_norm_eps,
            hidden_dropout_prob=encoder.hidden_dropout_prob,
            attention_probs_dropout_prob=encoder.attention_probs_dropout_prob,
        )
        layer._attn_implementation = config._attn_implementation
        self.layers = vit_layers(layer, config.decoder_num_hidden_layers)
        self.norm = nn.LayerNorm(size, eps=encoder.layer_norm_eps)
        self.pixels = nn.Linear(size, values)

    def forward(self, latents: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Predicted values (B, M, X) of masked patches.

        Args:
            latents: (B, S + K, D), the encoder's last hidden state.
            kept: (B, K) int64 numbers of its patches.
            masked: (B, M) int64 numbers of the others.
        """
        visible = self.embed(latents)
        table = self.positions.table[0].to(visible.dtype)
        special, patches = table[: self.special], table[self.special :]
        places = torch.cat([special.expand(len(kept), -1, -1), patches[kept]], dim=1)
        tokens = torch.cat([visible + places, self.mask_token + patches[masked]], dim=1)
        *layers, last = self.layers
        for layer in layers:
            tokens = layer(tokens)
        return self.pixels(self.norm(last(tokens, masked.shape[1])))
