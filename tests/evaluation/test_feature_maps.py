# SPDX-License-Identifier: Apache-2.0
"""Feature maps for detection equal the hidden states of the encoder, with its weights."""

import copy
from typing import Any

import pytest
import torch
from messages import mentions
from pixel_encoder import Pixels
from torch import nn
from transformers import (
    AutoModel,
    ConvNextV2Config,
    Dinov2Config,
    PreTrainedModel,
    RegNetConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation.feature_maps import FeatureMaps, StageMaps, StateMaps, TokenMap, feature_maps

VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 32,
}  # fmt: skip
SIZES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
CONFIGS = {
    "resnet": ResNetConfig(embedding_size=8, **SIZES, layer_type="basic"),
    "convnextv2": ConvNextV2Config(**SIZES),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=4, image_size=64),
    "vit": ViTConfig(**VIT, patch_size=8),
    "dinov2": Dinov2Config(**VIT, patch_size=14),
    "regnet": RegNetConfig(embedding_size=8, **SIZES, groups_width=8, layer_type="x"),
}


def encoder(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):  # as after a training
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    return model


def states(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of the stages of an encoder."""
    outputs = copy.deepcopy(model)(pixel_values=pixels, output_hidden_states=True)
    return list(outputs.get("reshaped_hidden_states") or outputs.hidden_states)


def maps_of(
    model: Any, pixels: torch.Tensor, smallest_stride: int = 4
) -> tuple[FeatureMaps, list[torch.Tensor]]:
    maps = feature_maps(model, smallest_stride).eval()
    with torch.no_grad():
        return maps, maps(pixels)


@torch.no_grad()
def test_maps_of_a_resnet_are_its_stages() -> None:
    model, pixels = encoder("resnet"), torch.randn(2, 3, 128, 96)
    maps, found = maps_of(model, pixels)
    assert isinstance(maps, StageMaps) and maps.strides == [4, 8, 16, 32] and maps.channels == [8, 8, 16, 16]
    for one, other in zip(found, states(model, pixels)[1:], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[-1], model(pixel_values=pixels).last_hidden_state)


@torch.no_grad()
def test_maps_of_a_convnext_are_its_stages_with_a_layer_norm_that_starts_as_the_identity() -> None:
    model, pixels = encoder("convnextv2"), torch.randn(2, 3, 64, 64)
    maps, found = maps_of(model, pixels, 8)
    assert isinstance(maps, StageMaps) and maps.strides == [8, 16, 32]
    for one, other in zip(found, states(model, pixels)[2:], strict=True):
        norm = nn.functional.layer_norm(other.permute(0, 2, 3, 1), other.shape[1:2], eps=1e-6)
        assert torch.allclose(one, norm.permute(0, 3, 1, 2), atol=1e-5)


@torch.no_grad()
def test_the_last_map_of_swin_has_the_final_layer_norm_of_the_encoder() -> None:
    model, pixels = encoder("swin"), torch.randn(2, 3, 64, 64)
    maps, found = maps_of(model, pixels)
    assert isinstance(maps, StageMaps) and maps.strides == [4, 8, 16]
    tokens = model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(found[-1].flatten(2).transpose(1, 2), tokens, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "patch"), [("vit", 8), ("dinov2", 14)])
def test_the_map_of_a_vision_transformer_has_its_tokens(name: str, patch: int) -> None:
    model, pixels = encoder(name), torch.randn(2, 3, 3 * patch, 5 * patch)
    maps, (found,) = maps_of(model, pixels)
    assert isinstance(maps, TokenMap) and maps.is_plain and maps.strides == [patch] and maps.divisor == patch
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    tokens = model(pixel_values=pixels, **options).last_hidden_state
    assert found.shape == (2, 16, 3, 5)
    assert torch.equal(found[1, :, 1, 4], tokens[1, 1 + 5 + 4]), "row 1, column 4, after the class token"


@torch.no_grad()
def test_maps_of_a_network_without_a_backbone_class_are_hidden_states() -> None:
    model, pixels = encoder("regnet"), torch.randn(1, 3, 64, 64)
    maps, found = maps_of(model, pixels)
    assert isinstance(maps, StateMaps) and maps.strides == [4, 8, 16, 32]
    assert torch.equal(found[-1], model(pixel_values=pixels).last_hidden_state)


def test_a_network_with_small_strides_keeps_its_larger_ones() -> None:
    config = ResNetConfig(embedding_size=8, **SIZES, layer_type="basic")
    model = AutoModel.from_config(config)
    model.embedder.pooler = nn.Identity()
    model.embedder.embedder.convolution.stride = (1, 1)
    assert feature_maps(encoder("resnet"), 1).strides == [4, 8, 16, 32]
    small = StateMaps(model)
    small.choose(torch.zeros(1, 3, 64, 64), 4)
    assert small.strides == [4, 8]
    small.choose(torch.zeros(1, 3, 64, 64), 64)
    assert small.strides == [8], "no stride is large enough"


def test_the_encoder_does_not_change_and_its_parameters_are_told_from_new_ones() -> None:
    for name in ("convnextv2", "vit"):
        model = encoder(name).requires_grad_(False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state()
        maps = feature_maps(model, 4)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(each.requires_grad for each in maps.encoder_parameters() if each.ndim > 1) or name == "vit"
        own = {id(each) for each in maps.encoder_parameters()}
        new = [key for key, each in maps.named_parameters() if id(each) not in own]
        assert all("hidden_states_norms" in key for key in new) and bool(new) == (name == "convnextv2")
        with torch.no_grad():
            for each in maps.parameters():
                each.zero_()
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Pooled(nn.Module):
    """An encoder whose output has no positions."""

    config = ResNetConfig()

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight, self.tokens = nn.Parameter(torch.zeros(1)), tokens

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> dict[str, Any]:
        return {"last_hidden_state": torch.zeros(len(pixel_values), self.tokens, 4) + self.weight}


def test_an_encoder_without_a_map_ends_in_one_sentence() -> None:
    for model in (Pixels(), Pooled(7)):
        with pytest.raises(
            UserError, match=mentions("detection", "spatial map", type(model).__name__)
        ) as error:
            feature_maps(model, 4)
        assert len(str(error.value)) <= 300


def test_an_encoder_of_one_size_ends_in_one_sentence() -> None:
    class Fixed(Pooled):
        def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False) -> dict[str, Any]:
            raise ValueError("Input image size (256*256) doesn't match model (32*32).\nmore")

    with pytest.raises(UserError, match=mentions("detection", 256, "Fixed")) as error:
        feature_maps(Fixed(7), 4)
    assert "\n" not in str(error.value)
