# SPDX-License-Identifier: Apache-2.0
"""The last block gives what a stock block gives for the tokens that are read, and works for no other."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from hf_ssl.modeling.fast_layers import ATTENTION_NAME
from hf_ssl.modeling.vit import LastViTLayer, vit_layers

TOKENS = 7


def config(attention: str, dropout: float = 0.0) -> ViTConfig:
    config = ViTConfig(
        hidden_size=12,
        num_attention_heads=3,
        intermediate_size=20,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config._attn_implementation = attention
    return config


def pair(config: ViTConfig, dtype: torch.dtype) -> tuple[ViTLayer, LastViTLayer]:
    """A stock block and a last one with its weights, both training."""
    torch.manual_seed(0)
    stock, last = ViTLayer(config).to(dtype).train(), LastViTLayer(config).to(dtype).train()
    last.load_state_dict(stock.state_dict())
    return stock, last


def run(layer: torch.nn.Module, tokens: torch.Tensor, *wanted: int) -> list[torch.Tensor]:
    """The last three tokens, and the gradients of the input and the weights."""
    tokens = tokens.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    out = layer(tokens, *wanted)[:, -3:]
    return [out, *torch.autograd.grad(out.square().sum(), [tokens, *layer.parameters()])]


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        ("eager", torch.float64, 1e-12),
        ("sdpa", torch.float64, 1e-12),
        (ATTENTION_NAME, torch.float64, 1e-12),
        (ATTENTION_NAME, torch.bfloat16, 0.1),  # by matrix products
    ],
)
def test_equals_a_stock_block(attention: str, dtype: torch.dtype, tolerance: float) -> None:
    stock, last = pair(config(attention), dtype)
    tokens = torch.randn(2, TOKENS, 12, dtype=dtype)
    for mine, theirs in zip(run(last, tokens, 3), run(stock, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)


def test_drops_out_as_a_stock_block_does() -> None:
    stock, last = pair(config("eager", dropout=0.4), torch.float64)
    tokens = torch.randn(2, TOKENS, 12, dtype=torch.float64)
    dropped = run(last, tokens, TOKENS)
    for mine, theirs in zip(dropped, run(stock, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert not torch.equal(dropped[0], run(last.eval(), tokens, TOKENS)[0])


def test_gradients_are_checkpointed() -> None:
    stock, last = pair(config("sdpa"), torch.float64)
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(1)
        return checkpoint(*arguments, use_reentrant=False)

    last.gradient_checkpointing = True
    last._gradient_checkpointing_func = counted
    tokens = torch.randn(2, TOKENS, 12, dtype=torch.float64)
    for mine, theirs in zip(run(last, tokens, 3), run(stock, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert calls == [1]


def test_what_is_not_read_is_not_computed() -> None:
    last = LastViTLayer(config("sdpa"))
    lengths: dict[str, int] = {}

    def count(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, inputs, out: lengths.update({name: inputs[0].shape[1]}))

    for name, module in last.named_modules():
        if isinstance(module, torch.nn.Linear):
            count(name.rpartition(".")[2], module)
    assert last(torch.randn(2, TOKENS, 12), 3).shape == (2, 3, 12)
    assert lengths == {"q_proj": 3, "k_proj": TOKENS, "v_proj": TOKENS, "o_proj": 3, "fc1": 3, "fc2": 3}


def test_only_the_last_of_several_is_another() -> None:
    assert [type(layer) for layer in vit_layers(config("sdpa"), 3)] == [ViTLayer, ViTLayer, LastViTLayer]
