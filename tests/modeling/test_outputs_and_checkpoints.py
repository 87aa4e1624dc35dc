# SPDX-License-Identifier: Apache-2.0
"""Options of `forward` that all models of transformers have, checkpoints of activations, and hooks."""

import copy
import logging
from typing import Any

import pytest
import torch
from messages import mentions
from transformers import ConvNextV2Config, PretrainedConfig, RegNetConfig, ResNetConfig, ViTConfig

from hf_ssl import (
    BYOLConfig,
    BYOLForPreTraining,
    MAEConfig,
    MAEForPreTraining,
    SimCLRConfig,
    SimCLRForPreTraining,
)
from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import checkpoint_stages

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


def trained_twice(config: PretrainedConfig, enable: bool) -> dict[str, torch.Tensor]:
    """Return weights, buffers and gradients after two forward and backward passes."""
    torch.manual_seed(0)
    model = BYOLForPreTraining(BYOLConfig(backbone_config=copy.deepcopy(config))).train()
    if enable:
        model.gradient_checkpointing_enable()
    views = torch.randn(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=views).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **{f"gradient of {name}": value for name, value in gradients.items()}}


@pytest.mark.parametrize("name", BACKBONES)
def test_checkpoints_change_no_gradient_and_no_statistics(name: str) -> None:
    plain, checkpointed = (trained_twice(BACKBONES[name], enable) for enable in (False, True))
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=0, atol=1e-6, msg=key)


def saved_bytes(model: SimCLRForPreTraining, views: torch.Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
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


def test_an_encoder_without_stages_is_rejected() -> None:
    with pytest.raises(UserError, match=mentions("training.gradient_checkpointing", "Linear")):
        checkpoint_stages(torch.nn.Linear(2, 2), True, torch.utils.checkpoint.checkpoint)


def simclr(config: PretrainedConfig, **options: Any) -> SimCLRForPreTraining:
    config = SimCLRConfig(backbone_config=copy.deepcopy(config), **options)
    return SimCLRForPreTraining(config).eval()


def test_a_tuple_is_returned_on_request() -> None:
    model, views = simclr(BACKBONES["resnet"]), torch.randn(4, 2, 3, 32, 32)
    output, values = model(pixel_values=views), model(pixel_values=views, return_dict=False)
    assert isinstance(values, tuple) and torch.equal(values[0], output.loss)
    assert output.hidden_states is None and output.attentions is None
    assert isinstance(simclr(BACKBONES["resnet"], return_dict=False)(pixel_values=views), tuple)


@pytest.mark.parametrize("name", ["resnet", "convnextv2", "vit"])
def test_hidden_states_are_those_of_the_backbone(name: str) -> None:
    model, views = simclr(BACKBONES[name]), torch.randn(4, 2, 3, 32, 32)
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
