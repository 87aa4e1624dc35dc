# SPDX-License-Identifier: Apache-2.0
"""Attention of transformers' layers where torch's fused kernel is the slower one: bfloat16 on a CPU.

Forward and backward of 16 to 128 images of 17 to 101 tokens take a seventh to a quarter of the kernel's time
as plain matrix products, those of 197 tokens three quarters (torch 2.15; `python -m training.benchmarks
attention`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit.modeling_vit import eager_attention_forward

NAME = "sdpa_or_products"
LONGEST = 256
"""Tokens; the scores of longer sequences would take much memory, and the kernel catches up."""


def sdpa_or_products(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' eager attention for short sequences in bfloat16 on a CPU, else its "sdpa".

    Args:
        module: of transformers, an attention.
        query, key, value: (B, heads, tokens, dims).
        attention_mask: added to the scores, or None.
        kwargs: `scaling`, `dropout` and what else transformers hands on.

    Returns:
        (B, tokens, heads, dims); and the weights, if they were computed.
    """
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST
    attend = eager_attention_forward if slow else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, sdpa_or_products)


def choose_attention(model: nn.Module) -> None:
    """Modules that would call "sdpa" call `sdpa_or_products`; one that was told otherwise does as told."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME
