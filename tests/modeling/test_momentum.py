# SPDX-License-Identifier: Apache-2.0
"""The modes of teachers: in training mode, only their BatchNorm depends on the batch. Nothing is random."""

from typing import Any

import pytest
import torch
from tiers import in_tiers
from transformers import ConvNextV2Config, LevitConfig, ResNetConfig, SwinConfig, ViTConfig

from hf_ssl.methods import METHODS
from hf_ssl.methods.byol.configuration_byol import BYOLConfig
from hf_ssl.methods.byol.modeling_byol import BYOLForPreTraining
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.batch_norm import batch_norms
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.momentum import TeacherModel

SIZES = {"image_size": 48, "hidden_size": 16, "num_attention_heads": 2}
ENCODERS = {
    "dropout": ViTConfig(
        **SIZES, patch_size=8, num_hidden_layers=1, intermediate_size=16, hidden_dropout_prob=0.5
    ),
    "attention dropout": ViTConfig(
        **SIZES, patch_size=8, num_hidden_layers=1, intermediate_size=16, attention_probs_dropout_prob=0.5
    ),
    "drop path": ConvNextV2Config(
        hidden_sizes=[8, 16], depths=[1, 3], num_stages=2, patch_size=2, drop_path_rate=0.9
    ),
    "drop path by default": SwinConfig(
        image_size=48, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=3
    ),
}
TEACHERS = ("byol", "moco", "moco_v3", "directpred", "dino", "ijepa")
SMALLER = {
    "byol": {"projection_hidden_size": 16}, "moco": {"queue_size": 8}, "dino": {"output_size": 8},
    "moco_v3": {"projection_hidden_size": 16}, "ijepa": {"predictor_depth": 1, "predictor_hidden_size": 16},
}  # fmt: skip
LEVIT = LevitConfig(
    image_size=64, hidden_sizes=[8, 8], num_attention_heads=[1, 1], depths=[1, 1], key_dim=[4, 4],
    attention_ratio=[2, 2], mlp_ratio=[1, 1], down_ops=[["Subsample", 4, 2, 2, 1, 2]],
)  # fmt: skip


def built(method: str, encoder: Any) -> Any:
    torch.manual_seed(0)
    kind = METHODS[method]
    return kind.model_class()(kind.config_class()(backbone_config=encoder, **SMALLER.get(method, {})))


@pytest.mark.slow
def test_every_method_with_a_teacher_is_tested() -> None:
    assert {name for name, kind in METHODS.items() if issubclass(kind.model_class(), TeacherModel)} == {
        *TEACHERS
    }


@pytest.mark.parametrize(("method", "kind"), in_tiers(
    [(method, kind) for method in TEACHERS for kind in ENCODERS if method != "ijepa" or "dropout" in kind],
    [*[(method, "dropout") for method in TEACHERS], ("byol", "drop path by default")],
))  # fmt: skip
@torch.no_grad()
def test_the_targets_are_not_random(method: str, kind: str) -> None:
    """A target that is random adds noise to the loss. Only the student has dropout and stochastic depth."""
    model = built(method, ENCODERS[kind])
    images = torch.randn(16, 3, 48, 48)
    for again in (model, model.eval().train()):
        assert again.training
        student, teacher = (
            [encode(each, images) for _ in range(3)] for each in (model.backbone, model.teacher_backbone)
        )
        assert any(not torch.equal(student[0], other) for other in student)
        assert all(torch.equal(teacher[0], other) for other in teacher)


def test_batch_norm_of_a_teacher_normalizes_each_batch() -> None:
    encoder = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = built("byol", encoder)
    assert all(layer.training for layer in batch_norms(model))
    before = {name: value.clone() for name, value in model.teacher_backbone.named_buffers()}
    model(pixel_values=torch.randn(4, 2, 3, 16, 16))
    changed = [
        name for name, value in model.teacher_backbone.named_buffers() if not torch.equal(value, before[name])
    ]
    assert changed == list(before)
    assert not any(module.training for module in model.eval().modules())


@pytest.fixture
def levit() -> BYOLForPreTraining:
    """A model whose features depend on the attention biases of LeViT, which are zero at first."""
    torch.manual_seed(0)
    model = BYOLForPreTraining(BYOLConfig(backbone_config=LEVIT, projection_hidden_size=16))
    for name, parameter in model.named_parameters():
        if "batch_norm.weight" in name:
            torch.nn.init.ones_(parameter)
    with torch.no_grad():
        for _ in range(40):  # statistics for eval mode
            encode(model.backbone, torch.randn(4, 3, 64, 64))
    return model


def learn_biases(model: BYOLForPreTraining) -> None:
    for name, parameter in model.backbone.named_parameters():
        if "attention_biases" in name:
            torch.nn.init.normal_(parameter, std=3)


@torch.no_grad()
def test_a_teacher_follows_weights_that_its_modules_store_in_eval_mode(levit: BYOLForPreTraining) -> None:
    images = torch.randn(4, 3, 64, 64)
    before = encode(levit.teacher_backbone, images)
    learn_biases(levit)
    levit.teacher_backbone.load_state_dict(levit.backbone.state_dict())  # an EMA update with momentum 0
    assert not torch.allclose(encode(levit.teacher_backbone, images), before)


def test_a_measurement_uses_the_weights_of_its_time(levit: BYOLForPreTraining) -> None:
    """LeViT stores its biases at the first measurement (transformers 5.24)."""
    images = torch.randn(4, 3, 64, 64)
    with evaluation_mode(levit):
        before = encode(levit.backbone, images)
    learn_biases(levit)
    with evaluation_mode(levit):
        after = encode(levit.backbone, images)
    fresh = type(levit.backbone)(levit.backbone.config).eval()
    fresh.load_state_dict(levit.backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(after, encode(fresh, images))
    assert not torch.allclose(after, before)
