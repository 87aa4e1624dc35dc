# SPDX-License-Identifier: Apache-2.0
"""The last block of a transformer of which only some tokens are read: nothing is computed for the others."""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward


class LastViTLayer(ViTLayer):
    """A stock block with stock weights: every token is looked at, but only the last ones ask.

    Queries, the projection after attention and the MLP, which are most of a block, leave the others out.
    """

    def forward(self, tokens: Tensor, wanted: int) -> Tensor:  # type: ignore[override]
        """(N, wanted, D): what `ViTLayer` makes of the last tokens.

        Args:
            tokens: (N, L, D), all of them.
            wanted: how many are read, 1 to L.
        """
        attention, asking = self.attention, tokens[:, -wanted:]
        seen = self.layernorm_before(tokens)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, seen[:, -wanted:]),
                (attention.k_proj, seen),
                (attention.v_proj, seen),
            )
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        dropout = attention.attention_dropout if self.training else 0.0
        found, _ = attend(attention, query, key, value, None, dropout=dropout, scaling=attention.scaling)
        asking = asking + self.dropout(attention.o_proj(found.flatten(2)))
        result: Tensor = asking + self.dropout(self.mlp(self.layernorm_after(asking)))
        return result


def vit_layers(config: ViTConfig, depth: int) -> nn.ModuleList:
    """Stock blocks, the last of them a `LastViTLayer`."""
    return nn.ModuleList([*(ViTLayer(config) for _ in range(depth - 1)), LastViTLayer(config)])
