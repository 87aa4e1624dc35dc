# SPDX-License-Identifier: Apache-2.0
"""MAE against transformers' ViTMAE; it computes no hidden patch and never loses its positions."""

import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from messages import mentions
from PIL import Image
from transformers import AutoConfig, AutoModel, ViTMAEConfig, ViTMAEForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.methods.mae.modeling_mae import MAEForPreTraining
from hf_ssl.modeling.backbones import layers
from hf_ssl.modeling.vit import (
    PATCH_SELECTION_TYPES,
    patchify,
    special_tokens,
    unpatchify,
)
from hf_ssl.random import image_seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer, train

DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 24,
}  # fmt: skip
ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8
}  # fmt: skip
COUNT, PATCHES, VISIBLE = 5, 16, 4


def build(kind="vit", **fields):
    torch.manual_seed(0)
    width = {} if "dinov2" in kind else {"intermediate_size": 40}
    backbone = AutoConfig.for_model(kind, **ENCODER, **width)
    return MAEForPreTraining(MAEConfig(backbone_config=backbone, **DECODER, **fields))


def vitmae(**fields):
    """A ViTMAE with random weights and tables; one that is built from a config has tables of zeros."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **ENCODER, intermediate_size=40, layer_norm_eps=1e-2, hidden_act="relu", **DECODER, **fields
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(COUNT, 1, 3, 32, 32, generator=generator, dtype=torch.float64)


@pytest.fixture
def noise():
    return torch.rand(COUNT, PATCHES, generator=torch.Generator().manual_seed(2))


def ours(name):
    """The name here of a parameter of ViTMAE."""
    name = name.replace("vit.", "backbone.").replace("decoder.decoder_embed", "decoder.embed")
    for theirs, mine in (("layers", "layers"), ("norm", "norm"), ("pred", "pixels")):
        name = name.replace(f"decoder.decoder_{theirs}", f"decoder.{mine}")
    return name


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_and_gradients_are_those_of_vitmae(norm_pix_loss, images, noise):
    source = vitmae(norm_pix_loss=norm_pix_loss)
    model = MAEForPreTraining.from_vitmae(source).train()
    theirs = source.train()(pixel_values=images[:, 0], noise=noise).loss
    output = model(pixel_values=images, noise=noise)
    torch.testing.assert_close(output.loss, theirs, rtol=1e-12, atol=0)
    theirs.backward()
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = set()
    for name, parameter in source.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[ours(name)], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
            compared.add(ours(name))
    assert compared == set(gradients) and len(compared) > 80


def test_a_published_vitmae_becomes_a_vit_with_the_same_features(images, tmp_path):
    source = vitmae().eval()
    source.save_pretrained(tmp_path)
    model = MAEForPreTraining.from_vitmae(tmp_path, views={"size": 32}).eval()
    assert model.config.views == {"size": 32} and model.config.mask_ratio == 0.75
    assert type(model.exported_encoder).__name__ == "ViTModel"
    source.config.mask_ratio, order = 0.0, torch.arange(float(PATCHES)).expand(COUNT, -1)
    whole = source.vit(images[:, 0], noise=order).last_hidden_state
    mine = model.exported_encoder(images[:, 0])
    torch.testing.assert_close(mine.last_hidden_state, whole, rtol=0, atol=1e-12)
    assert torch.equal(mine.pooler_output, mine.last_hidden_state[:, 0])


@pytest.mark.parametrize("kind", PATCH_SELECTION_TYPES)
def test_only_visible_patches_go_through_the_encoder(kind, images, noise):
    model, lengths = build(kind).double().train(), []
    for layer in [*layers(model.backbone), *model.decoder.layers]:
        layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[:2]))
    model(pixel_values=images, noise=noise).loss.backward()
    special = special_tokens(model.backbone)
    assert lengths == [(COUNT, special + VISIBLE)] * 3 + [(COUNT, special + PATCHES)] * 2
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_patches_with_the_smallest_noise_are_visible(images):
    model = build()
    noise = torch.arange(PATCHES, 0, -1).float().expand(COUNT, -1)
    kept, masked = model.split(images[:, 0], noise)
    assert kept.tolist() == [[15, 14, 13, 12]] * COUNT
    assert masked.tolist() == [list(range(11, -1, -1))] * COUNT


def test_predictions_know_nothing_of_what_is_masked(images, noise):
    model = build().double().eval()
    before = model.embed({"pixel_values": images, "noise": noise})
    other = patchify(images[:, 0], (8, 8))
    other.scatter_(1, before["masked"].unsqueeze(-1).expand(-1, -1, 192), 7.0)
    after = model.embed({"pixel_values": unpatchify(other, (8, 8), (4, 4))[:, None], "noise": noise})
    torch.testing.assert_close(after["predictions"], before["predictions"], rtol=0, atol=1e-12)
    assert not torch.equal(before["targets"], after["targets"])


def test_a_masked_patch_is_predicted_for_its_own_place(images, noise):
    """Masked tokens differ in their position alone; all-zero tables made every prediction the same."""
    predictions = build().double().eval().embed({"pixel_values": images, "noise": noise})["predictions"]
    distances = torch.cdist(predictions, predictions) + torch.eye(PATCHES - VISIBLE)
    assert distances.min() > 1e-3


def sine_cosine(dims, side=4):
    """The table in a slow loop: sines and cosines of the column, then of the row."""
    table = np.zeros((side * side, dims))
    for row in range(side):
        for column in range(side):
            for k in range(dims // 4):
                for part, place in enumerate((column, row)):
                    angle = place / 10000 ** (4 * k / dims)
                    table[row * side + column, part * dims // 2 + k] = math.sin(angle)
                    table[row * side + column, part * dims // 2 + dims // 4 + k] = math.cos(angle)
    return torch.tensor(table, dtype=torch.float32)


def assert_fixed_positions(model):
    special = special_tokens(model.backbone)
    encoder = model.backbone.embeddings.position_embeddings
    before = encoder.shape[1] - PATCHES
    assert not encoder.requires_grad and not encoder[:, :before].any()
    torch.testing.assert_close(encoder[0, before:].float(), sine_cosine(24))
    decoder = model.decoder.positions.table
    assert decoder.shape[1] == special + PATCHES and not decoder[:, :special].any()
    torch.testing.assert_close(decoder[0, special:], sine_cosine(16))
    assert "decoder.positions.table" in model.state_dict()


@pytest.mark.parametrize("kind", PATCH_SELECTION_TYPES)
def test_positions_are_there_however_the_model_was_made(kind, tmp_path):
    model = build(kind)
    assert_fixed_positions(model)
    model.save_pretrained(tmp_path / "whole")
    loaded = MAEForPreTraining.from_pretrained(tmp_path / "whole")
    assert_fixed_positions(loaded)
    assert loaded.decoder.mask_token.requires_grad
    model.load_state_dict(loaded.state_dict())  # as a run that resumes does
    assert_fixed_positions(model)
    # from an encoder alone, the decoder is new
    model.exported_encoder.save_pretrained(tmp_path / "encoder")
    warm, info = MAEForPreTraining.from_pretrained(
        tmp_path / "encoder", config=model.config, output_loading_info=True
    )
    assert info["missing_keys"] and all(key.startswith("decoder.") for key in info["missing_keys"])
    assert_fixed_positions(warm)
    assert 0.01 < warm.decoder.mask_token.std() < 0.04 and warm.decoder.embed.weight.std() > 0.1
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(warm.backbone.state_dict()[name], value), name


def test_an_encoder_with_other_positions_keeps_them(tmp_path):
    model = build()
    learned = model.exported_encoder.embeddings.position_embeddings
    learned.data.normal_()
    model.exported_encoder.save_pretrained(tmp_path)
    warm = MAEForPreTraining.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(warm.backbone.embeddings.position_embeddings, learned)
    projection = "embeddings.patch_embeddings.projection.weight"
    assert torch.equal(warm.backbone.get_parameter(projection), model.backbone.get_parameter(projection))


def test_weights_start_as_the_authors_do():
    """Xavier's bound is reached and kept; queries, keys and values are one layer there."""
    model = build()
    layer = model.backbone.layers[0]
    for weight, inputs, outputs in (
        (layer.attention.q_proj.weight, 24, 72),
        (layer.attention.o_proj.weight, 24, 24),
        (layer.mlp.fc1.weight, 24, 40),
        (model.decoder.layers[1].attention.v_proj.weight, 16, 48),
        (model.decoder.pixels.weight, 16, 192),
        (model.backbone.embeddings.patch_embeddings.projection.weight, 192, 24),
    ):
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.97 * bound < weight.abs().max() <= bound
    assert torch.equal(model.backbone.pooler.dense.weight, torch.eye(24))
    assert not model.decoder.pixels.bias.any()


def test_noise_comes_from_the_seeds_of_images():
    model, of = build(), image_seeds(0, 0, np.arange(400, dtype=np.uint64))
    noise = model.sample_masks(of)["noise"]
    assert noise.shape == (400, PATCHES)
    assert torch.equal(model.sample_masks(of[100:200])["noise"], noise[100:200])
    kept, _ = model.split(torch.zeros(400, 3, 32, 32), noise)
    seen = kept.flatten().bincount(minlength=PATCHES) / 400
    assert (seen - VISIBLE / PATCHES).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_without_noise_it_is_drawn(images):
    model = build().double().eval()
    torch.manual_seed(3)
    losses = [model(images).loss for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(model(images, noise=torch.rand(COUNT, PATCHES)).loss, losses[0])
    assert losses[0] != losses[1]


def test_the_exported_encoder_sees_everything_and_draws_nothing(images, tmp_path):
    model = build().eval()
    model.exported_encoder.save_pretrained(tmp_path)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert type(encoder).__name__ == "ViTModel"
    once, again = (encoder(images[:, 0].float()).last_hidden_state for _ in range(2))
    assert once.shape[1] == 1 + PATCHES and torch.equal(once, again)
    torch.testing.assert_close(encoder.embeddings.position_embeddings[0, 1:], sine_cosine(24))


def test_patches_hold_their_pixels_and_come_back():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    for number, (top, left) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        block = images[:, :, top : top + 2, left : left + 3]
        assert torch.equal(patches[:, number], block.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, (2, 3), (2, 2)), images)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_shows_the_image(norm_pix_loss, images, noise, monkeypatch):
    model = build(norm_pix_loss=norm_pix_loss).eval()
    images = images.float()
    made = model.embed({"pixel_values": images, "noise": noise})
    variance, mean = torch.var_mean(made["targets"], dim=-1, keepdim=True)
    perfect = (made["targets"] - mean) / (variance + 1e-6).sqrt() if norm_pix_loss else made["targets"]
    monkeypatch.setattr(model, "embed", lambda inputs: made | {"predictions": perfect})
    tiles = model.pictures({"pixel_values": images, "noise": noise})["reconstructions"]
    assert tiles.shape == (COUNT, 3, 3, 32, 32)
    assert torch.equal(tiles[:, 0], images[:, 0])
    torch.testing.assert_close(tiles[:, 2], tiles[:, 0], rtol=0, atol=1e-5)
    shown = patchify(tiles[:, 1], (8, 8)).any(-1)
    assert torch.equal(shown, noise.argsort(1).argsort(1) < VISIBLE)


def test_a_run_leaves_reconstructions(tmp_path):
    recipe = load_recipe(
        "smoke/mae",
        [f"training.output_dir={tmp_path}", "training.max_steps=2", "training.use_cpu=true"],
    )
    train(recipe)
    assert Image.open(tmp_path / "reconstructions.png").size == (2 + 3 * 18, 2 + 8 * 18)


def test_one_view_has_nothing_to_be_aligned_with(tmp_path):
    recipe = load_recipe("smoke/mae", [f"training.output_dir={tmp_path}"])
    made = build_trainer(recipe, recipe.training_arguments())
    assert "eval_uniformity" in (measured := made.monitor.measure(made.method))
    assert "eval_alignment" not in measured


def test_mistakes_get_a_sentence():
    with pytest.raises(StrictDataclassError, match=mentions("method.mask_ratio", 0, 1, 1.0)):
        MAEConfig(mask_ratio=1.0)
    with pytest.raises(
        StrictDataclassError,
        match=mentions("method.decoder_hidden_size", "decoder_num_attention_heads", 4, 3, 16),
    ):
        MAEConfig(decoder_hidden_size=16, decoder_num_attention_heads=3)
    with pytest.raises(StrictDataclassError, match=mentions("method.decoder_num_hidden_layers", 1, 0)):
        MAEConfig(decoder_num_hidden_layers=0)
    with pytest.raises(UserError, match=mentions("method.mask_ratio", 0.95, 0, 16)):
        build(mask_ratio=0.95)
    with pytest.raises(UserError, match=mentions("(4, 4)", "(6, 6)")):
        build()(torch.zeros(2, 1, 3, 48, 48))
    with pytest.raises(UserError, match=mentions("views.count", "mae", 1, 2)):
        build()(torch.zeros(2, 2, 3, 32, 32))
