# SPDX-License-Identifier: Apache-2.0
"""A narrow vision transformer that predicts patches from the tokens of other patches (MAE, I-JEPA).

Legend: B images, S special tokens, P patches of an image, K patches with tokens, M blocks of patches that are
predicted, T patches of a block, D dims of the encoder, E dims of the predictor.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward

from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.configuration import patch_grid
from hf_ssl.modeling.vit.patches import PositionTable, special_tokens


class PatchPredictor(nn.Module):
    """Stock ViT layers on the encoder's tokens and one mask token for each patch that is predicted.

    Each block of patches is predicted separately. Attention does not depend on the order of tokens, and every
    token has its position added. So mask tokens are simply at the end, and the last layer computes only them.

    Args:
        encoder: the vision transformer whose tokens are the input.
        config: configuration of the layers.
        depth: number of layers.
    """

    def __init__(self, encoder: PreTrainedModel, config: ViTConfig, depth: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_special_tokens = special_tokens(encoder)
        self.embed = nn.Linear(feature_size(encoder), size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = PositionTable(self.num_special_tokens, *patch_grid(encoder.config), size)
        self.layers = vit_layers(config, depth)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def hidden_states(self, tokens: Tensor, patches: Tensor, targets: Tensor) -> Tensor:
        """Return the normalized last hidden states (B * M, T, E) of the predicted patches.

        Args:
            tokens: (B, S + K, D), the encoder's last hidden state.
            patches: (B, K) int64 indices of the patches of these tokens.
            targets: (B, M, T) int64 indices of the patches to predict.
        """
        blocks, length = targets.shape[1:]
        context_tokens = self.embed(tokens)
        table = self.positions.table[0].to(context_tokens.dtype)
        special_positions = table[: self.num_special_tokens]
        patch_positions = table[self.num_special_tokens :]
        context_tokens = context_tokens + torch.cat(
            [special_positions.expand(len(context_tokens), -1, -1), patch_positions[patches]], dim=1
        )
        mask_tokens = self.mask_token + patch_positions[targets.flatten(0, 1)]
        if blocks > 1:
            context_tokens = context_tokens.repeat_interleave(blocks, dim=0)
        hidden = torch.cat([context_tokens, mask_tokens], dim=1)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden)
        return self.norm(last(hidden, length))


def vit_layers(config: ViTConfig, depth: int) -> nn.ModuleList:
    """Return `depth` stock layers, at least one. The last one is a `LastViTLayer`."""
    return nn.ModuleList([*(ViTLayer(config) for _ in range(depth - 1)), LastViTLayer(config)])


class LastViTLayer(ViTLayer):
    """A last layer with the weights of a stock one. Its output is the same, but only for the last tokens.

    All tokens become keys and values. Queries, the projection after attention and the MLP are computed only
    for tokens that are used. These three are most of the computation of a layer. The attention's own forward
    is not called, so hooks on it are not called either.
    """

    def forward(self, hidden_states: Tensor, num_outputs: int) -> Tensor:  # type: ignore[override]
        """Return the output of `ViTLayer` for the last `num_outputs` tokens, (N, num_outputs, D).

        Args:
            hidden_states: (N, L, D), all tokens.
            num_outputs: number of tokens that are used, 1 to L.
        """
        attention, unused = self.attention, hidden_states.shape[1] - num_outputs
        residual = hidden_states[:, unused:]
        normalized = self.layernorm_before(hidden_states)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, normalized[:, unused:]),
                (attention.k_proj, normalized),
                (attention.v_proj, normalized),
            )
        )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        dropout = attention.attention_dropout if self.training else 0.0
        attended, _ = attention_interface(
            attention, query, key, value, None, dropout=dropout, scaling=attention.scaling
        )
        residual = residual + self.dropout(attention.o_proj(attended.flatten(2)))
        output: Tensor = residual + self.dropout(self.mlp(self.layernorm_after(residual)))
        return output
