# SPDX-License-Identifier: Apache-2.0
"""Faster attention for bfloat16 on a CPU, where torch's fused kernel is slower than matrix products.

For 16 to 128 images of 17 to 101 tokens, the matrix products take a seventh to a quarter of the kernel's time
(forward and backward). For 197 tokens, they take three quarters (torch 2.15; `python -m training.benchmarks
attention`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit.modeling_vit import eager_attention_forward

ATTENTION_NAME = "sdpa_or_products"
MAX_SEQUENCE_LENGTH = 256
"""Longest sequence in tokens. Scores of longer sequences need much memory, and the kernel is not slower."""


def sdpa_or_products(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Call transformers' eager attention for short sequences in bfloat16 on a CPU, otherwise its "sdpa".

    Args:
        module: an attention module of transformers.
        query, key, value: (B, heads, tokens, dims).
        attention_mask: added to the scores, or None.
        kwargs: `scaling`, `dropout` and other arguments of transformers.

    Returns:
        The output (B, tokens, heads, dims), and the attention weights if they were computed.
    """
    slow = (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= MAX_SEQUENCE_LENGTH
    )
    attend = eager_attention_forward if slow else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, sdpa_or_products)


def choose_attention(model: nn.Module) -> None:
    """Make modules with the implementation "sdpa" use `sdpa_or_products`. Other modules do not change."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = ATTENTION_NAME
