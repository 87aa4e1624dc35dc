# SPDX-License-Identifier: Apache-2.0
"""Faster forms of layers of transformers. Their outputs change only by rounding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
from transformers.models.vit.modeling_vit import eager_attention_forward

from hf_ssl.modeling.configuration import method_of

_TINY = 1e-30  # a normal number in float32 and bfloat16

# In bfloat16 on a CPU, torch's fused attention is slower than matrix products. For 16 to 128 images of 17 to
# 101 tokens, the products take a seventh to a quarter of the kernel's time (forward and backward). For 197
# tokens, they take three quarters (torch 2.15; `python -m training.benchmarks attention`).
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


class FastGRN(ConvNextV2GRN):
    """The response normalization of ConvNeXt V2, without torch's vector norm.

    torch's vector norm over two inner dimensions is ten times slower on a CPU (2.14). It takes a sixth of the
    time of small encoders.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalized hidden states (N, H, W, D)."""
        # The smallest number keeps the gradient of a channel of zeros finite: zero, as that of the norm.
        squares = hidden_states.float() if hidden_states.dtype.itemsize == 2 else hidden_states
        norms = (squares.square().sum((1, 2), keepdim=True) + _TINY).sqrt()
        normalized = norms / (norms.mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype.itemsize == 2:
            normalized = normalized.to(self.weight.dtype)
        return self.weight * (hidden_states * normalized) + self.bias + hidden_states


class SmallMapConv2d(nn.Conv2d):
    """A depthwise convolution without the kernel weights that multiply only the padding of a small map.

    Of the 49 weights of ConvNeXt's kernel, 1 remains on a map of 1 x 1, and 9 remain on a map of 2 x 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution (N, D, H, W)."""
        sides, kernel = input.shape[2:], self.kernel_size
        radii = [min(side - 1, size // 2) for side, size in zip(sides, kernel, strict=True)]
        if 2 * max(radii) + 1 >= min(kernel):
            return super().forward(input)
        rows, columns = (
            slice(size // 2 - radius, size // 2 + radius + 1)
            for radius, size in zip(radii, kernel, strict=True)
        )
        weight = self.weight[:, :, rows, columns]
        if max(radii) > 0:
            return conv2d(input, weight, self.bias, padding=radii, groups=self.groups)
        scaled = input * weight[:, 0]
        return scaled if self.bias is None else scaled + self.bias[:, None, None]


def use_fast_convnext_layers(model: nn.Module) -> None:
    """Make the layers of ConvNeXt (V2) faster on small images. Parameters and their names do not change."""
    for module in model.modules():
        if type(module) is ConvNextV2GRN:
            module.__class__ = FastGRN
        elif type(module) is nn.Conv2d and _keeps_size_and_channels(module):
            module.__class__ = SmallMapConv2d


def _keeps_size_and_channels(layer: nn.Conv2d) -> bool:
    """Return whether a convolution is depthwise and keeps the size of its input by zero padding."""
    same = layer.padding == tuple(size // 2 for size in layer.kernel_size) and layer.padding_mode == "zeros"
    odd = all(size % 2 == 1 for size in layer.kernel_size) and layer.kernel_size != (1, 1)
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    return same and odd and depthwise and layer.stride == layer.dilation == (1, 1)


def choose_attention(model: nn.Module) -> None:
    """Make modules with the implementation "sdpa" use `sdpa_or_products`. Other modules do not change.

    The config of a method does not change, because its encoder may have no attention.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or method_of(config.model_type) is not None:
            continue
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = ATTENTION_NAME
