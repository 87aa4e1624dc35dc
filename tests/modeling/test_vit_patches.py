# SPDX-License-Identifier: Apache-2.0
"""Encoders that see some patches only: the same numbers as a forward of those patches, at their cost."""

import math

import pytest
import torch
from messages import mentions
from torch import nn
from transformers import AutoConfig, AutoModel

from hf_ssl.errors import UserError
from hf_ssl.methods.moco_v3.configuration_moco_v3 import MoCoV3Config
from hf_ssl.methods.moco_v3.modeling_moco_v3 import MoCoV3ForPreTraining
from hf_ssl.modeling.backbones import layers
from hf_ssl.modeling.vit import (
    PATCH_SELECTION_TYPES,
    encode_patches,
    select_patches,
    sine_cosine_2d,
    special_tokens,
)

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
OF_TYPE = {
    "vit": {"intermediate_size": 40},
    "deit": {"intermediate_size": 40},
    "ijepa": {"intermediate_size": 40},
    "dinov2": {"layerscale_value": 0.5, "drop_path_rate": 0.3},
    "dinov2_with_registers": {"num_register_tokens": 3, "layerscale_value": 0.5},
}


@pytest.fixture(params=PATCH_SELECTION_TYPES)
def backbone(request):
    """An encoder in which no weight is zero or one by construction."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **OF_TYPE[request.param])
    model = AutoModel.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(size=32, count=3):
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kept_patches(of, kept, count=3):
    noise = torch.rand(count, of, generator=torch.Generator().manual_seed(2))
    return noise.argsort(dim=1)[:, :kept]


def own_forward(backbone, pixels, size=32):
    arguments = (
        {} if "dinov2" in backbone.config.model_type or size == 32 else {"interpolate_pos_encoding": True}
    )
    return backbone(pixel_values=pixels, **arguments).last_hidden_state


@pytest.mark.parametrize("size", [32, 48])
def test_with_all_patches_it_is_the_encoders_own_forward(backbone, size):
    tokens = encode_patches(backbone, images(size))
    assert tokens.shape[1] == special_tokens(backbone) + (size // 8) ** 2
    torch.testing.assert_close(tokens, own_forward(backbone, images(size), size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [32, 48])
def test_patches_that_are_left_out_are_as_if_attention_never_reached_them(backbone, size):
    """The full forward, in which an attention mask hides the other patches, gives the same kept tokens."""
    patches, special = (size // 8) ** 2, special_tokens(backbone)
    kept = kept_patches(patches, 5)
    seen = torch.zeros(3, patches, dtype=torch.bool).scatter(1, kept, True)
    seen = torch.cat([torch.ones(3, special, dtype=torch.bool), seen], dim=1)
    arguments = {} if "dinov2" in backbone.config.model_type else {"interpolate_pos_encoding": True}
    whole = backbone(pixel_values=images(size), attention_mask=seen, **arguments).last_hidden_state
    tokens = encode_patches(backbone, images(size), kept)
    torch.testing.assert_close(tokens[:, :special], whole[:, :special], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        tokens[:, special:], select_patches(whole[:, special:], kept), rtol=0, atol=1e-12
    )
    assert not torch.allclose(
        tokens[:, special:], select_patches(own_forward(backbone, images(size), size)[:, special:], kept)
    )


def test_only_kept_patches_go_through_the_blocks(backbone):
    lengths = []
    for layer in layers(backbone):
        layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    encode_patches(backbone, images(), kept_patches(16, 4))
    assert lengths == [special_tokens(backbone) + 4] * 3


def test_pixels_of_patches_that_are_left_out_mean_nothing(backbone):
    pixels, kept = images(count=1).requires_grad_(), torch.tensor([[0, 5]])
    encode_patches(backbone, pixels, kept).square().sum().backward()
    reached = pixels.grad.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)).flatten().nonzero()
    assert reached.flatten().tolist() == [0, 5]


def test_gradient_checkpointing_changes_nothing(backbone):
    kept, gradients = kept_patches(16, 4), []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        backbone.zero_grad()
        backbone.train()
        torch.manual_seed(3)  # drop path
        encode_patches(backbone, images(), kept).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_recomputes_blocks(backbone):
    calls = []
    attention = next(m for m in layers(backbone)[0].modules() if isinstance(m, nn.LayerNorm))
    attention.register_forward_hook(lambda *_: calls.append(1))
    backbone.train().gradient_checkpointing_enable({"use_reentrant": False})
    encode_patches(backbone, images(), kept_patches(16, 4)).sum().backward()
    assert len(calls) == 2


def test_half_precision_weights_take_float_images(backbone):
    assert encode_patches(backbone.bfloat16(), images().float()).dtype == torch.bfloat16


def test_other_encoders_are_an_error():
    config = AutoConfig.for_model("convnextv2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    with pytest.raises(UserError, match=mentions("backbone.model_type", "vit", "convnextv2")):
        encode_patches(AutoModel.from_config(config), images())


def moco_v3_positions(side, dims):
    """The table of MoCo v3 (facebookresearch/moco-v3, vits.py) for a square grid, number by number.

    There, `grid_w, grid_h = torch.meshgrid(grid_w, grid_h)`, with the old default "ij". So the number of a
    flattened `grid_w` is that of the outer loop. Patches are flattened row by row.
    """
    omega = [1 / 10_000 ** (i / (dims // 4)) for i in range(dims // 4)]
    table = []
    for w in range(side):
        for h in range(side):
            angles = [[w * o for o in omega], [h * o for o in omega]]
            table.append([wave(a) for half in angles for wave in (math.sin, math.cos) for a in half])
    return torch.tensor(table, dtype=torch.float64)


def test_positions_of_moco_v3_are_the_transpose_of_those_of_mae():
    found, of_mae = sine_cosine_2d(4, 4, 16, row_first=True), sine_cosine_2d(4, 4, 16)
    torch.testing.assert_close(found, moco_v3_positions(4, 16), rtol=0, atol=1e-15)
    assert torch.equal(found.unflatten(0, (4, 4)), of_mae.unflatten(0, (4, 4)).transpose(0, 1))
    assert not torch.equal(found, of_mae)
    wide = sine_cosine_2d(2, 3, 8, row_first=True)  # row, column = 1, 2
    angles = [1.0, 0.01, 2.0, 0.02]
    expected = [wave(a) for half in (angles[:2], angles[2:]) for wave in (math.sin, math.cos) for a in half]
    torch.testing.assert_close(wide[5].tolist(), expected)


@pytest.mark.parametrize("kind", PATCH_SELECTION_TYPES)
def test_moco_v3_can_have_the_fixed_positions_of_its_authors(kind, tmp_path):
    backbone = AutoConfig.for_model(kind, **SIZES, **OF_TYPE[kind])
    fields = {"projection_hidden_size": 8, "projection_size": 4}
    model = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, fixed_positions=True, **fields))
    model.save_pretrained(tmp_path / "model")
    expected = moco_v3_positions(4, 24).float()
    for each in (model, MoCoV3ForPreTraining.from_pretrained(tmp_path / "model")):
        special = each.backbone.embeddings.position_embeddings.shape[1] - 16
        for encoder in (each.backbone, each.teacher_backbone):
            table = encoder.embeddings.position_embeddings
            torch.testing.assert_close(table[0, special:], expected, rtol=0, atol=1e-7)
            assert not table[0, :special].any() and not table.requires_grad
    learned = MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, **fields))
    table = learned.backbone.embeddings.position_embeddings
    assert table.requires_grad and not torch.allclose(table[0, special:], expected)
    learned.backbone.save_pretrained(tmp_path / "encoder")  # a trained table is kept
    started = MoCoV3ForPreTraining.from_backbone(tmp_path / "encoder", fixed_positions=True, **fields)
    assert torch.equal(started.teacher_backbone.embeddings.position_embeddings, table)
    assert not started.backbone.embeddings.position_embeddings.requires_grad


def test_fixed_positions_are_rejected_for_encoders_without_them():
    backbone = {
        "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1], "hidden_sizes": [6]
    }  # fmt: skip
    with pytest.raises(UserError, match=mentions("method.fixed_positions", "resnet", "vit")):
        MoCoV3ForPreTraining(MoCoV3Config(backbone_config=backbone, fixed_positions=True))
