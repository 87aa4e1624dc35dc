# SPDX-License-Identifier: Apache-2.0
"""Attention maps of each family: that they are transformers' own, on the right grid, and leave no trace."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from messages import mentions
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    attention_maps,
    attention_rollout,
    has_attention,
    pca_colors,
    threshold_attention,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.5,
}  # fmt: skip
# Class, config, number of special tokens, and the query.
FAMILIES: dict[str, tuple[type, Any, int, str]] = {
    "vit": (ViTModel, ViTConfig(**SMALL), 1, "class token"),
    "deit": (DeiTModel, DeiTConfig(**SMALL), 2, "class token"),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL), 1, "class token"),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3),
        4,
        "class token",
    ),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SMALL, num_register_tokens=4), 5, "class token"),
    "ijepa": (IJepaModel, IJepaConfig(**SMALL), 0, "mean of the patches"),
    "mae": (ViTMAEModel, ViTMAEConfig(**SMALL, mask_ratio=0.75), 1, "class token"),
    "beit": (BeitModel, BeitConfig(**SMALL, use_relative_position_bias=True), 1, "class token"),
}
WITHOUT = {
    "resnet": ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
    "convnext": ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
    "swin": SwinModel(SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2], window_size=4)),
}


def encoder(name: str) -> PreTrainedModel:
    kind, config, *_ = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(deepcopy(config))
    for parameter in model.parameters():  # the usual start makes attention all but uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=["square", "wide"])
def test_maps_are_those_of_transformers(name: str, size: tuple[int, int]) -> None:
    _, _, special, query = FAMILIES[name]
    model, pixels = encoder(name), images(*size)
    maps = attention_maps(model, pixels, layer=1)
    grid = (size[0] // 8, size[1] // 8)
    assert maps.query == query
    assert maps.heads.shape == (2, 2, *grid) and maps.special.shape == (2, 2, special)
    assert maps.rollout.shape == (2, *grid) and maps.patches.shape == (2, *grid, 32)
    sums = maps.heads.sum(dim=(-2, -1)) + maps.special.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones(2, 2))

    extra: dict[str, Any] = (
        {} if name.startswith(("dino", "registers")) else {"interpolate_pos_encoding": True}
    )
    if name == "mae":
        model.config.mask_ratio, extra["noise"] = 0.0, torch.arange(math.prod(grid)).expand(2, -1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model.eval()(pixels, output_attentions=True, **extra)
    weights = outputs.attentions[1]
    expected = weights[:, :, 0] if special else weights.mean(dim=2)
    torch.testing.assert_close(maps.heads.flatten(2), expected[..., special:])
    torch.testing.assert_close(maps.special, expected[..., :special])
    torch.testing.assert_close(maps.patches.flatten(1, 2), outputs.last_hidden_state[:, special:])
    torch.testing.assert_close(maps.mean.flatten(1), expected[..., special:].mean(dim=1))


def test_planted_attention_is_found() -> None:
    """With one-hot positions, keys that copy them and one query for all, attention is what the query says."""
    tokens = 17
    config = ViTConfig(
        hidden_size=tokens, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32,
        patch_size=8,
    )  # fmt: skip
    model = ViTModel(config)
    wanted = torch.softmax(torch.randn(tokens, generator=torch.Generator().manual_seed(3)), dim=0)
    spread = 1 / math.sqrt((1 - 1 / tokens) / tokens + config.layer_norm_eps)  # of a one-hot row, normalized
    attention = model.layers[0].attention
    with torch.no_grad():
        model.embeddings.cls_token.zero_()
        for parameter in model.embeddings.patch_embeddings.parameters():
            parameter.zero_()
        model.embeddings.position_embeddings.copy_(torch.eye(tokens)[None])
        attention.q_proj.weight.zero_()
        attention.q_proj.bias.copy_(wanted.log() * math.sqrt(tokens) / spread)
        attention.k_proj.weight.copy_(torch.eye(tokens))
        attention.k_proj.bias.zero_()
    maps = attention_maps(model, torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(maps.heads[0, 0].flatten(), wanted[1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.special[0, 0], wanted[:1], atol=1e-5, rtol=1e-4)
    expected = 0.5 * wanted[1:].reshape(4, 4)  # half of it is the class token's own
    torch.testing.assert_close(maps.rollout[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "mae"])
def test_the_encoder_is_left_as_it_was(name: str) -> None:
    model = encoder(name)
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    attention_maps(model, images(32, 32))
    assert model.config._attn_implementation == "sdpa"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_encoder_is_left_as_it_was_after_an_error() -> None:
    model = encoder("vit").train()

    def fail(*arguments: Any) -> None:
        assert model.config._attn_implementation == "eager"
        raise RuntimeError("in the middle")

    model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        attention_maps(model, images(32, 32))
    assert model.config._attn_implementation == "sdpa" and model.training


@pytest.mark.parametrize("name", WITHOUT)
def test_encoders_without_attention_are_named(name: str) -> None:
    model = WITHOUT[name]
    assert not has_attention(model)
    with pytest.raises(UserError, match=mentions(type(model).__name__, "ViTModel")):
        attention_maps(model, images(32, 32))


def test_predicate_knows_the_families() -> None:
    assert all(has_attention(encoder(name)) for name in FAMILIES)
    assert not has_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 7, 32)])
def test_unfit_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=mentions("(B, 3, H, W)", "8 x 8", shape)):
        attention_maps(encoder("vit"), torch.zeros(shape))


@pytest.mark.parametrize("layer", [3, -4])
def test_unknown_layers_are_refused(layer: int) -> None:
    with pytest.raises(UserError, match=mentions("layer", "-3", 2, layer)):
        attention_maps(encoder("vit"), images(32, 32), layer=layer)


def test_rollout_closed_form() -> None:
    """Two layers on two tokens, by hand: M1 = [[.75, .25], [0, 1]], M2 = [[.5, .5], [.25, .75]]."""
    first = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    second = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    expected = torch.tensor([[0.375, 0.625], [0.1875, 0.8125]])
    torch.testing.assert_close(attention_rollout([first[None], second[None]])[0], expected)
    # Heads count by their mean: one that looks at itself and one that looks across look half and half.
    heads = torch.stack([torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])])[None]
    mixed = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    torch.testing.assert_close(attention_rollout([heads])[0], mixed)


def test_rollout_of_some_queries_is_that_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 3, 5, 5, generator=generator).softmax(dim=-1) for _ in range(4)]
    query = torch.rand(2, 1, 5, generator=generator)
    torch.testing.assert_close(attention_rollout(layers, query), query @ attention_rollout(layers))


def test_mask_keeps_the_fewest_patches() -> None:
    maps = torch.tensor([[[0.4, 0.1], [0.2, 0.3]]])
    assert threshold_attention(maps, 0.6).tolist() == [[[True, False], [False, True]]]
    assert threshold_attention(maps, 0.4).tolist() == [[[True, False], [False, False]]]
    assert threshold_attention(maps, 0.05).sum() == 1
    assert threshold_attention(3 * maps, 1.0).all()
    for mass in (0.0, 1.5):
        with pytest.raises(UserError, match=mentions("mass", mass)):
            threshold_attention(maps, mass)


def test_mask_holds_its_mass() -> None:
    maps = torch.rand(7, 9, 11, generator=torch.Generator().manual_seed(0))
    for mass in (0.1, 0.6, 0.95):
        mask = threshold_attention(maps, mass)
        share = (maps * mask).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
        smallest = maps.masked_fill(~mask, torch.inf).amin(dim=(1, 2)) / maps.sum(dim=(1, 2))
        assert (share >= mass - 1e-6).all() and (share - smallest < mass).all()


def test_colors_tell_parts_apart() -> None:
    """Three kinds of patches in two images: one color each, the same in both, at any scale."""
    kinds = torch.eye(3, 16)[torch.tensor([[[0, 0], [1, 2]], [[2, 1], [0, 0]]])]
    colors = pca_colors(5 * kinds)
    assert colors.shape == (2, 2, 2, 3) and colors.min() >= 0 and colors.max() <= 1
    torch.testing.assert_close(colors[0, 0, 0], colors[1, 1, 1])
    torch.testing.assert_close(colors[0, 1, 0], colors[1, 0, 1])
    assert (colors[0, 0, 0] - colors[0, 1, 0]).abs().max() > 0.3
    torch.testing.assert_close(pca_colors(kinds), colors)
    assert pca_colors(torch.ones(1, 2, 2, 2)).shape == (1, 2, 2, 3)


@pytest.mark.parametrize("larger", [1, 2])
def test_rounding_does_not_swap_colors(larger: int) -> None:
    """The second direction is (0, 1, -1). Without the rule for ties, rounding would determine its sign."""
    kinds = torch.eye(3, 16, dtype=torch.float64)[torch.tensor([[[0, 0], [1, 2]], [[2, 1], [0, 0]]])]
    rounded = kinds.clone()
    rounded[..., larger] *= 1 + 1e-7
    torch.testing.assert_close(pca_colors(rounded), pca_colors(kinds), rtol=0, atol=1e-5)
