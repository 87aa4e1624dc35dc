# SPDX-License-Identifier: Apache-2.0
"""Options of `forward` that all models of transformers have, checkpoints of activations, and hooks."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from messages import mentions
from tiers import in_tiers
from transformers import (
    AutoConfig,
    ConvNextV2Config,
    EfficientNetConfig,
    LevitConfig,
    MobileNetV2Config,
    MobileViTConfig,
    PoolFormerConfig,
    PretrainedConfig,
    PvtConfig,
    RegNetConfig,
    ResNetConfig,
    ViTConfig,
)

from hf_ssl import (
    BYOLConfig,
    BYOLForPreTraining,
    MAEConfig,
    MAEForPreTraining,
    MoCoConfig,
    MoCoForPreTraining,
    SimCLRConfig,
    SimCLRForPreTraining,
)
from hf_ssl.errors import UserError
from hf_ssl.modeling import recorded_outputs
from hf_ssl.modeling.activation_checkpoints import _checkpointed, checkpoint_segments, find_segments

VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
    patch_size=8,
)  # fmt: skip
BACKBONES = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic"),
    "regnet": RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    "convnextv2": ConvNextV2Config(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.3),
    "vit": VIT,
}
# Encoders without blocks in their first list of modules, encoders with BatchNorm in the layers that
# transformers checkpoints, and encoders with other names of their widths.
OTHERS = {
    "poolformer": PoolFormerConfig(hidden_sizes=[8, 16, 16, 16], depths=[2, 1, 1, 1]),
    "pvt": PvtConfig(image_size=32, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 1, 2, 2]),
    "levit": LevitConfig(
        image_size=64, hidden_sizes=[16, 32, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "mobilevit": MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 16, 16, 24]
    ),
    "mobilenet_v2": MobileNetV2Config(image_size=32, depth_multiplier=0.25),
    "efficientnet": EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320, drop_connect_rate=0.0
    ),
}  # fmt: skip
TIMM = [
    "resnet18", "resnet18d", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002",
    "densenet121", "vit_tiny_patch16_224",
]  # fmt: skip


def config_of(name: str) -> PretrainedConfig:
    """Return the config of a backbone in a table, or of a model of timm for images with 32 pixels."""
    if name not in TIMM:
        return copy.deepcopy((BACKBONES | OTHERS)[name])
    pytest.importorskip("timm")
    arguments = {"img_size": 32} if name.startswith("vit") else {}
    return AutoConfig.for_model("timm_wrapper", architecture=name, model_args=arguments)


def views_for(config: PretrainedConfig) -> torch.Tensor:
    """Return two views of four images."""
    size = 64 if config.model_type in ("levit", "mobilevit") else 32
    return torch.randn(4, 2, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained_twice(config: PretrainedConfig, enable: bool) -> dict[str, torch.Tensor]:
    """Return weights, buffers and gradients after two forward and backward passes."""
    torch.manual_seed(0)
    model = BYOLForPreTraining(BYOLConfig(backbone_config=copy.deepcopy(config))).train()
    if enable:
        model.gradient_checkpointing_enable()
    views = views_for(config)
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=views).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **{f"gradient of {name}": value for name, value in gradients.items()}}


SAMPLED = [*BACKBONES, "poolformer", "mobilevit", "resnet18", "convnext_atto"]


@pytest.mark.parametrize(
    "name", in_tiers([(name,) for name in [*BACKBONES, *OTHERS, *TIMM]], [(name,) for name in SAMPLED])
)
def test_checkpoints_change_no_gradient_and_no_statistics(name: str) -> None:
    plain, checkpointed = (trained_twice(config_of(name), enable) for enable in (False, True))
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        limit = 1e-6 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(checkpointed[key], value, rtol=0, atol=limit, msg=key)


def saved_bytes(model: SimCLRForPreTraining, views: torch.Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(pixel_values=views)
    return sum(storages.values())


@pytest.mark.parametrize("name", ["resnet", "convnextv2"])
def test_checkpoints_save_memory_and_can_be_disabled(name: str) -> None:
    config = copy.deepcopy(BACKBONES[name])
    config.depths = [3] * len(config.depths)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=config)).train()
    views = torch.randn(4, 2, 3, 32, 32)
    usual = saved_bytes(model, views)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model, views) < 0.7 * usual
    model.gradient_checkpointing_disable()
    assert saved_bytes(model, views) == usual


@pytest.mark.parametrize(
    "name",
    in_tiers(
        [(name,) for name in [*OTHERS, *TIMM]],
        [("poolformer",), ("mobilevit",), ("resnet18",), ("resnet18d",), ("convnext_atto",)],
    ),
)
def test_checkpoints_save_activations(name: str) -> None:
    config = config_of(name)
    model, views = SimCLRForPreTraining(SimCLRConfig(backbone_config=config)).train(), views_for(config)
    usual = saved_bytes(model, views)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model, views) < 0.6 * usual
    for name in find_segments(model.backbone):  # a segment that nothing calls would save nothing
        assert model.backbone.get_submodule(name).forward.func is _checkpointed


def test_the_largest_segment_is_a_part_of_the_encoder() -> None:
    """One segment of all stages would store nothing, but compute all activations again at once."""
    model = simclr(config_of("convnext_atto"))
    assert len(find_segments(model.backbone)) > 10
    resnet = find_segments(simclr(BACKBONES["resnet"]).backbone)
    assert "" not in resnet and "encoder" not in resnet


def test_an_encoder_without_segments_is_rejected() -> None:
    with pytest.raises(UserError, match=mentions("training.gradient_checkpointing", "Linear")):
        checkpoint_segments(torch.nn.Linear(2, 2), True, torch.utils.checkpoint.checkpoint)


def simclr(config: PretrainedConfig, **options: Any) -> SimCLRForPreTraining:
    config = SimCLRConfig(backbone_config=copy.deepcopy(config), **options)
    return SimCLRForPreTraining(config).eval()


def test_a_tuple_is_returned_on_request() -> None:
    model, views = simclr(BACKBONES["resnet"]), torch.randn(4, 2, 3, 32, 32)
    output, values = model(pixel_values=views), model(pixel_values=views, return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[0], output.loss)
    assert output.hidden_states is None and output.attentions is None
    assert isinstance(simclr(BACKBONES["resnet"], return_dict=False)(pixel_values=views), tuple)


@pytest.mark.parametrize(
    "name", ["resnet", "convnextv2", "vit", "poolformer", "mobilenet_v2", "resnet18", "convnext_atto"]
)
def test_hidden_states_are_those_of_the_backbone(name: str) -> None:
    model, views = simclr(config_of(name)), torch.randn(4, 2, 3, 32, 32)
    output = model(pixel_values=views, output_hidden_states=True)
    expected = model.backbone(views.flatten(0, 1), output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected)
    for got, wanted in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    some = model(pixel_values=views, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, *[True] * (len(some) - 2), False]


def test_attention_weights_are_those_of_the_backbone() -> None:
    model, views = simclr(VIT), torch.randn(4, 2, 3, 32, 32)
    model.set_attn_implementation("eager")
    output = model(pixel_values=views, output_attentions=True)
    expected = model.backbone(views.flatten(0, 1), output_attentions=True).attentions
    assert len(output.attentions) == len(expected) == 2
    for got, wanted in zip(output.attentions, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", [1, "all", [0.5], [True]])
def test_hidden_states_that_are_no_indices_are_rejected(wanted: Any) -> None:
    with pytest.raises(UserError, match=mentions("output_hidden_states", wanted)):
        simclr(VIT)(pixel_values=torch.randn(4, 2, 3, 32, 32), output_hidden_states=wanted)


@pytest.mark.parametrize("index", [3, 99, -4])
def test_an_index_out_of_range_is_rejected_before_the_memory_changes(index: int) -> None:
    config = MoCoConfig(backbone_config=copy.deepcopy(VIT), queue_size=8)
    model = MoCoForPreTraining(config).train()
    before = copy.deepcopy(model.state_dict())
    hooks = []
    for _ in range(2):  # transformers installs its own hooks once
        with pytest.raises(UserError, match=mentions("output_hidden_states", -3, 2, index)):
            model(pixel_values=torch.randn(4, 2, 3, 32, 32), output_hidden_states=[0, index])
        hooks.append(sum(len(module._forward_hooks) for module in model.modules()))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert hooks[0] == hooks[1]


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_missing_attention_weights_are_reported_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    recorded_outputs.logger.warning_once.cache_clear()
    model: Any = simclr(VIT)
    if method == "mae":
        model = MAEForPreTraining(MAEConfig(backbone_config=copy.deepcopy(VIT), decoder_hidden_size=32))
    views = torch.randn(4, 2 if method == "simclr" else 1, 3, 32, 32)
    for _ in range(2):  # transformers gives no weights without "eager" either
        assert model(pixel_values=views, output_attentions=True).attentions == ()
    (message,) = [
        record.getMessage() for record in caplog.records if record.name == recorded_outputs.__name__
    ]
    assert re.search(mentions("output_attentions", 'attn_implementation="eager"', "sdpa"), message)


@pytest.mark.parametrize("name", ["resnet", "resnet18"])
def test_an_encoder_without_attention_is_reported(name: str) -> None:
    with pytest.raises(UserError, match=mentions("output_attentions", "false")):
        simclr(config_of(name))(pixel_values=torch.randn(4, 2, 3, 32, 32), output_attentions=True)


def test_mae_returns_the_states_of_visible_patches() -> None:
    config = MAEConfig(
        backbone_config=copy.deepcopy(VIT), decoder_hidden_size=32, decoder_num_hidden_layers=1
    )
    output = MAEForPreTraining(config).eval()(
        pixel_values=torch.randn(2, 1, 3, 32, 32), output_hidden_states=True
    )
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 1 + 4, 32)] * 3


def test_a_trainer_that_calls_no_hooks_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    model = BYOLForPreTraining(BYOLConfig(backbone_config=copy.deepcopy(VIT)))
    views = torch.randn(4, 2, 3, 32, 32)
    model.eval()(pixel_values=views)
    assert not caplog.records
    for _ in range(2):
        model.train()(pixel_values=views)
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert all(word in caplog.text for word in ("SSLTrainer", "after_step", "before_step"))
    caplog.clear()
    simclr(VIT).train()(pixel_values=views)  # it has no hooks
    assert not caplog.records
