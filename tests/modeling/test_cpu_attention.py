# SPDX-License-Identifier: Apache-2.0
"""The choice of how transformers' layers attend."""

from copy import deepcopy

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.methods.mae.modeling_mae import MAEForPreTraining
from hf_ssl.modeling import fast_layers
from hf_ssl.modeling.fast_layers import choose_attention
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
    model = deepcopy(plain)
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
