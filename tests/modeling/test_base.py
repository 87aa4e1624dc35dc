# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers
from messages import mentions
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EfficientNetConfig,
    MobileNetV2Config,
    MobileViTConfig,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from hf_ssl.errors import UserError
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.backbones import encode, feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import SSLConfig
from hf_ssl.modeling.parameter_groups import ParameterRule, assign_parameter_groups

RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=8,
)


class TaughtModel(SSLPreTrainedModel):
    """A student, a teacher, and a head each."""

    student_teacher = (("backbone", "teacher"), ("head", "teacher_head"))
    exported = "teacher"

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.teacher = AutoModel.from_config(config.backbone_config)
        self.head = nn.Linear(feature_size(self.backbone), 4)
        self.teacher_head = nn.Linear(feature_size(self.backbone), 4)
        self.post_init()


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_teachers_are_copied_after_initialization_and_frozen_again_after_loading(backbone, tmp_path):
    model = TaughtModel(SSLConfig(backbone_config=backbone))
    assert all(map(torch.equal, model.teacher.state_dict().values(), model.backbone.state_dict().values()))
    with torch.no_grad():
        model.head.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = TaughtModel.from_pretrained(tmp_path)
    assert not torch.equal(loaded.head.weight, loaded.teacher_head.weight)
    assert not any(p.requires_grad for p in (*loaded.teacher.parameters(), *loaded.teacher_head.parameters()))
    assert loaded.head.weight.requires_grad
    assert loaded.exported_encoder is loaded.teacher


def test_a_published_encoder_starts_student_and_teacher_alike(tmp_path):
    model = TaughtModel(SSLConfig(backbone_config=VIT))
    with torch.no_grad():
        model.backbone.embeddings.cls_token.fill_(3.0)
    model.backbone.save_pretrained(tmp_path)
    loaded = TaughtModel.from_pretrained(tmp_path, config=SSLConfig(backbone_config=VIT))
    assert (loaded.backbone.embeddings.cls_token == 3).all()
    assert (loaded.teacher.embeddings.cls_token == 3).all()


def test_a_vit_hands_out_its_class_token_after_any_way_of_building_it(tmp_path):
    config = SimCLRConfig(backbone_config=VIT.to_dict())
    model = SimCLRForPreTraining(config).eval()
    model.backbone.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    for encoder in (model.backbone, AutoModel.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            output = encoder(pixel_values=images)
        assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert not any(p.requires_grad for p in model.backbone.pooler.parameters())
    assert VIT.pooler_act == "tanh"  # the caller's own config is left alone


def test_a_vit_returns_its_class_token_even_if_it_starts_from_another_pooler():
    trained = AutoModel.from_config(VIT)  # with a pooler of random weights
    assert not torch.equal(trained.pooler.dense.weight, torch.eye(16))
    model = TaughtModel(SSLConfig(backbone_config=VIT))
    model.start_from(trained)
    for encoder in (model.backbone, model.teacher):
        assert torch.equal(encoder.embeddings.cls_token, trained.embeddings.cls_token)
        assert torch.equal(encoder.pooler.dense.weight, torch.eye(16))
        assert not encoder.pooler.dense.bias.any()


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_a_backbone_config_is_not_shared(backbone):
    config = SSLConfig(backbone_config=backbone)
    assert config.backbone_config is not backbone
    config.backbone_config.hidden_act = "tanh"
    assert backbone.hidden_act != "tanh"


def test_features_of_other_sizes_interpolate_positions():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=VIT))
    assert encode(model.backbone, torch.randn(2, 3, 32, 32)).shape == (2, 16)


@pytest.mark.parametrize(
    ("config", "size"),
    [(RESNET, 16), (VIT, 16), (ResNetConfig(hidden_sizes=[4, 8, 24], depths=[1, 1, 1]), 24)],
)
def test_feature_size(config: PreTrainedConfig, size):
    backbone = AutoModel.from_config(config).eval()
    with torch.no_grad():
        assert encode(backbone, torch.randn(2, 3, 16, 16)).shape[1] == feature_size(backbone) == size


def test_too_few_views():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=RESNET))
    with pytest.raises(UserError, match=mentions("views.count", 2, 1)):
        model(torch.randn(4, 1, 3, 16, 16))


def test_an_input_of_another_method_is_an_error():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=RESNET))
    with pytest.raises(UserError, match=mentions("noise", "simclr")):
        model(torch.randn(4, 2, 3, 16, 16), noise=torch.rand(4, 4))


def test_timm_encoder_starts_with_timm_s_own_weights(tmp_path):
    timm = pytest.importorskip("timm")
    backbone = AutoConfig.for_model("timm_wrapper", architecture="resnet10t", model_args={"in_chans": 3})
    torch.manual_seed(0)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone))
    own = timm.create_model("resnet10t", num_classes=0)
    weight = "layer4.0.conv1.weight"
    expected = own.get_parameter(weight).std().item()
    assert model.backbone.timm_model.get_parameter(weight).std().item() == pytest.approx(expected, rel=0.05)
    model(torch.randn(4, 2, 3, 32, 32)).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = SimCLRForPreTraining.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


TOKENS = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
# Class, settings, endings of parameters without weight decay, ending of parameters with weight decay.
FURTHER = {
    "convnextv2": (
        "ConvNextV2", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
        (".grn.weight", ".grn.bias"), "pwconv1.weight",
    ),
    "swinv2": (
        "Swinv2",
        {"image_size": 32, "window_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2]},
        (".logit_scale",), "output.dense.weight",
    ),
    "siglip": ("SiglipVision", TOKENS, (".position_embedding.weight", ".probe"), "fc1.weight"),
    "clip": ("CLIPVision", TOKENS, (".position_embedding.weight", ".class_embedding"), "fc1.weight"),
    "levit": ("Levit", {}, (".attention_biases",), "linear.weight"),
    "sam": (
        "SamVision", {"image_size": 32, "num_hidden_layers": 1, "global_attn_indexes": [0]},
        (".rel_pos_h", ".rel_pos_w", "pos_embed"), "lin1.weight",
    ),
    "sam2": ("Sam2HieraDet", {}, ("pos_embed", "pos_embed_window"), "attn.qkv.weight"),
}  # fmt: skip

VECTORS = (".grn.weight", ".grn.bias", ".logit_scale")


def test_default_treatment_spares_norms_biases_tokens_and_tables():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=VIT))
    found = assign_parameter_groups(model, [])
    decayed = {name for name, treatment in found.items() if treatment.decay}
    assert "backbone.layers.0.attention.q_proj.weight" in decayed
    assert "projector.0.weight" in decayed
    assert not any("bias" in n or "norm" in n or "cls_token" in n or "position" in n for n in decayed)
    assert {name for name, t in found.items() if t.adapt} == decayed
    assert all(t.decay for t in assign_parameter_groups(model, [], decay_all=True).values())
    assert "backbone.pooler.dense.weight" not in found  # frozen


@pytest.mark.parametrize("name", sorted(FURTHER))
def test_tokens_tables_and_vectors_of_further_encoders_do_not_decay(name):
    """ConvNeXt V2 and Swin V2 have vectors of four and three dimensions, and SigLIP a table in a layer."""
    kind, settings, spared, decayed = FURTHER[name]
    with torch.device("meta"):
        encoder = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    found = assign_parameter_groups(encoder, [ParameterRule(".", learning_rate_scale=2, vectors_only=True)])
    for ending in spared:
        matching = [group for each, group in found.items() if each.endswith(ending)]
        assert matching and not any(group.decay or group.adapt for group in matching), ending
        scale = 2 if ending in VECTORS else 1
        assert all(group.learning_rate_scale == scale for group in matching), ending
    assert all(group.decay and group.adapt for each, group in found.items() if each.endswith(decayed))
    assert any(each.endswith(decayed) for each in found)


@pytest.mark.parametrize(
    "name", ["pos_embed_0", "pos_embed1", "height_rel", "patch_pos", "pixel_pos", "position_embedding_table"]
)
def test_position_tables_of_timm_do_not_decay(name):
    """These tables are in CrossViT, Visformer, HaloNet, TNT and Gemma 4."""
    encoder = nn.Module()
    encoder.register_parameter(name, nn.Parameter(torch.zeros(1, 4, 8)))
    [group] = assign_parameter_groups(encoder, []).values()
    assert not group.decay and not group.adapt


def test_rules_apply_in_order_and_a_rule_for_nothing_is_an_error():
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=RESNET))
    rules = [
        ParameterRule("projector", learning_rate_scale=10.0, frozen_until=3),
        ParameterRule(r"projector\.0", learning_rate_scale=1.0),
    ]
    found = assign_parameter_groups(model, rules)
    assert found["projector.3.weight"].learning_rate_scale == 10
    assert found["projector.0.weight"].learning_rate_scale == 1
    assert found["projector.0.weight"].frozen_until == 3
    with pytest.raises(ValueError, match="prjector"):
        assign_parameter_groups(model, [ParameterRule("prjector", decay=False)])


WIDTHS = {
    "efficientnet": EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320
    ),
    "mobilenet_v2": MobileNetV2Config(image_size=32, depth_multiplier=0.25),
    "mobilevit": MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 16, 16, 24]
    ),
    "swin": SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
    "resnet": RESNET,
    "vit": VIT,
}


@pytest.mark.parametrize("name", [*WIDTHS, "mobilenetv3_small_100", "resnet10t"])
def test_the_feature_size_is_the_width_of_the_pooled_features(name):
    if name in WIDTHS:
        config = WIDTHS[name]
    else:
        pytest.importorskip("timm")
        config = AutoConfig.for_model("timm_wrapper", architecture=name)
    state = torch.get_rng_state()
    backbone = AutoModel.from_config(config).train()
    drawn = torch.get_rng_state()
    size = feature_size(backbone)
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(state, drawn)
    assert all(module.training for module in backbone.modules())
    assert encode(backbone.eval(), torch.zeros(2, 3, 64, 64)).shape == (2, size)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=config)).train()
    model(pixel_values=torch.randn(2, 2, 3, 64, 64)).loss.backward()


class ValueDependent(ViTModel):
    def forward(self, pixel_values, **kwargs):
        assert pixel_values.sum().item() is not None  # torch's device "meta" has no values
        return super().forward(pixel_values, **kwargs)


def test_an_encoder_whose_operations_depend_on_values_has_the_size_in_its_config():
    encoder = ValueDependent(VIT)
    assert feature_size(encoder) == VIT.hidden_size
    encoder.config = MobileNetV2Config()
    with pytest.raises(UserError, match=mentions("backbone", "mobilenet_v2")):
        feature_size(encoder)
