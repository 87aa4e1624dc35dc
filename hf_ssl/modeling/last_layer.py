# SPDX-License-Identifier: Apache-2.0
"""Blocks of a transformer of which some tokens are read: the last one computes nothing for the others."""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward


def vit_layers(config: ViTConfig, depth: int) -> nn.ModuleList:
    """`depth` stock blocks, at least one; the last of them is a `LastViTLayer`."""
    return nn.ModuleList([*(ViTLayer(config) for _ in range(depth - 1)), LastViTLayer(config)])


class LastViTLayer(ViTLayer):
    """The last block, with the weights of a stock one: of the tokens at the end, which are read, it gives the
    same.

    All tokens become keys and values. Queries, the projection after attention and the MLP, which are most of
    a block, leave out what is not read. The attention's own forward is not called, so hooks on it see
    nothing.
    """

    def forward(self, hidden_states: Tensor, wanted: int) -> Tensor:  # type: ignore[override]
        """What `ViTLayer` makes of the tokens at the end: (N, wanted, D).

        Args:
            hidden_states: (N, L, D), all tokens.
            wanted: how many of them are read, 1 to L.
        """
        attention, unread = self.attention, hidden_states.shape[1] - wanted
        residual = hidden_states[:, unread:]
        normalised = self.layernorm_before(hidden_states)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, normalised[:, unread:]),
                (attention.k_proj, normalised),
                (attention.v_proj, normalised),
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
