# SPDX-License-Identifier: Apache-2.0
"""ViT layers whose last one computes only the tokens that are used."""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward


def vit_layers(config: ViTConfig, depth: int) -> nn.ModuleList:
    """Return `depth` stock layers, at least one. The last one is a `LastViTLayer`."""
    return nn.ModuleList([*(ViTLayer(config) for _ in range(depth - 1)), LastViTLayer(config)])


class LastViTLayer(ViTLayer):
    """A last layer with the weights of a stock one. Its output is the same, but only for the last tokens.

    All tokens become keys and values. Queries, the projection after attention and the MLP are computed only
    for tokens that are used; they are most of a layer. The attention's own forward is not called, so hooks on
    it are not called either.
    """

    def forward(self, hidden_states: Tensor, wanted: int) -> Tensor:  # type: ignore[override]
        """Return the output of `ViTLayer` for the last `wanted` tokens, (N, wanted, D).

        Args:
            hidden_states: (N, L, D), all tokens.
            wanted: number of tokens that are used, 1 to L.
        """
        attention, unused = self.attention, hidden_states.shape[1] - wanted
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
