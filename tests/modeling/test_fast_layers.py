# SPDX-License-Identifier: Apache-2.0
"""Faster layers equal those of transformers, and the choice of the attention."""

import copy

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.methods.mae.modeling_mae import MAEForPreTraining
from hf_ssl.modeling import fast_layers
from hf_ssl.modeling.fast_layers import FastGRN, SmallMapConv2d, choose_attention, use_fast_convnext_layers
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.trainer import prepare_model

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two was called."""
    counts = {"eager": 0, "sdpa": 0}
    for key, name in (("eager", "eager_attention_forward"), ("sdpa", "sdpa_attention_forward")):
        real = getattr(fast_layers, name)

        def counted(*args, key=key, real=real, **kwargs):
            counts[key] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(fast_layers, name, counted)
    return counts


def encoder(kind=ViTModel, config=ViTConfig):
    torch.manual_seed(0)
    return kind(config(**SMALL)).eval()


def features(model, dtype=torch.bfloat16):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(IMAGES).last_hidden_state.float()


@pytest.mark.parametrize("kind", [(ViTModel, ViTConfig), (Dinov2Model, Dinov2Config)])
def test_bfloat16_on_a_cpu_takes_products(calls, kind):
    """Which is only faster: what comes out is the same within bfloat16, and so are gradients."""
    plain = encoder(*kind)
    model = copy.deepcopy(plain)
    choose_attention(model)
    torch.testing.assert_close(features(model), features(plain), rtol=0, atol=0.05)
    assert calls == {"eager": 2, "sdpa": 0}
    for each in (model, plain):
        (features(each) ** 3).mean().backward()
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])
        for each in (model, plain)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_float32_takes_the_kernel(calls):
    model = encoder()
    before = features(model, torch.float32)
    choose_attention(model)
    assert torch.equal(features(model, torch.float32), before)
    assert calls == {"eager": 0, "sdpa": 2}


def test_long_sequences_take_the_kernel(calls, monkeypatch):
    monkeypatch.setattr(fast_layers, "MAX_SEQUENCE_LENGTH", 17)  # 16 patches and the class token
    model = encoder()
    choose_attention(model)
    features(model)
    assert calls == {"eager": 2, "sdpa": 0}
    monkeypatch.setattr(fast_layers, "MAX_SEQUENCE_LENGTH", 16)
    features(model)
    assert calls == {"eager": 2, "sdpa": 2}


def test_who_chose_keeps_it(calls):
    model = encoder()
    model.set_attn_implementation("eager")
    choose_attention(model)
    features(model)
    assert calls == {"eager": 0, "sdpa": 0}
    assert model.config._attn_implementation == "eager"


def test_nothing_of_it_is_saved(tmp_path):
    model = encoder()
    choose_attention(model)
    model.save_pretrained(tmp_path)
    assert fast_layers.ATTENTION_NAME not in (tmp_path / "config.json").read_text()
    assert ViTModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_trainer_prepares_every_part_of_a_method(tmp_path, calls):
    """MAE's decoder, which has a configuration of its own, too."""
    config = MAEConfig(
        backbone_config=ViTConfig(**SMALL),
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = MAEForPreTraining(config).train()
    prepare_model(model, SSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES[:, None])
    assert calls == {"eager": 3, "sdpa": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fast_response_norms_equal_those_of_transformers(dtype):
    torch.manual_seed(0)
    plain = ConvNextV2GRN(5)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    fast = torch.nn.Sequential(copy.deepcopy(plain))
    use_fast_convnext_layers(fast)
    assert fast[0].state_dict().keys() == plain.state_dict().keys() and type(fast[0]) is FastGRN
    x = torch.randn(3, 4, 2, 5)
    x[1, :, :, 2] = 0  # no gradient through the norm of a channel of zeros
    pairs = []
    for module in (plain, fast):
        leaf, module = x.to(dtype).requires_grad_(), module.to(dtype)
        output = module(leaf)
        assert output.dtype == dtype
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        pairs.append((output.float(), gradient.float()))
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(pairs[1], pairs[0], rtol=tolerance, atol=tolerance)


SIZES = [(1, 1), (2, 2), (1, 3), (3, 2), (4, 4), (9, 9)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_depthwise_convolutions_of_small_maps_equal_those_of_torch(size, bias):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 6, 7, padding=3, groups=6, bias=bias).double()
    fast = torch.nn.Sequential(copy.deepcopy(plain))
    use_fast_convnext_layers(fast)
    assert type(fast[0]) is SmallMapConv2d and fast[0].state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    pairs = []
    for module in (plain, fast):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        leaves = [leaf, *module.parameters()]
        pairs.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(pairs[1], pairs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 1, "padding": 3},
        {"groups": 6, "padding": 0},
        {"groups": 6, "padding": 3, "stride": 2},
        {"groups": 6, "padding": 3, "padding_mode": "reflect"},
        {"groups": 6, "padding": 6, "dilation": 2},
    ],
    ids=str,
)
def test_other_convolutions_stay(options):
    layers = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 7, **options))
    use_fast_convnext_layers(layers)
    assert type(layers[0]) is torch.nn.Conv2d
