# SPDX-License-Identifier: Apache-2.0
"""A model is the same after the block: modes of its modules, random states, weights and statistics."""

import pytest
import torch
from torch import nn

from hf_ssl.modeling.eval_mode import copy_without_values, evaluation_mode, unchanged_random_state


def model() -> nn.Module:
    """Return a model in training mode with a frozen BatchNorm in eval mode."""
    parts = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout())
    )
    parts.train()
    parts[1].eval()
    return parts


def test_every_module_gets_its_mode_back():
    parts = model()
    modes = [module.training for module in parts.modules()]
    assert len(set(modes)) == 2
    with evaluation_mode(parts):
        assert not any(module.training for module in parts.modules())
    assert [module.training for module in parts.modules()] == modes


def test_modes_come_back_after_an_error():
    parts = model()
    modes = [module.training for module in parts.modules()]
    with pytest.raises(KeyError), evaluation_mode(parts):
        raise KeyError
    assert [module.training for module in parts.modules()] == modes


def test_statistics_and_random_states_do_not_change_and_there_is_no_gradient():
    parts, images = model(), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    state = torch.get_rng_state()
    with evaluation_mode(parts):
        output = parts(images) + torch.rand(1)
    assert not output.requires_grad and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in parts.state_dict().items():
        assert torch.equal(value, before[name]), name


class FakeGPU:
    """The generator of a device; `places` contains the arguments of each call."""

    def __init__(self):
        self.state, self.places = 1, []

    def get_rng_state(self, *place):
        self.places.append(place)
        return self.state

    def set_rng_state(self, state, *place):
        self.places.append(place)
        self.state = state


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda", "xpu"])
def test_the_random_state_of_the_device_is_kept_too(monkeypatch, kind):
    device, gpu = torch.device(kind), FakeGPU()
    monkeypatch.setattr(torch, "get_device_module", lambda given: gpu)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), unchanged_random_state(device):
        torch.rand(1)
        gpu.state = 2
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    place = () if kind == "mps" else (device,)
    assert (gpu.state, gpu.places) == ((2, []) if kind == "cpu" else (1, [place, place]))


def test_a_copy_without_values_computes_shapes():
    parts = model()
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    copied = copy_without_values(parts)
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}
    assert copied(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 6, 6)
    assert not any(module.training for module in copied.modules()) and parts.training
    assert all(torch.equal(value, before[name]) for name, value in parts.state_dict().items())
    assert {type(parameter) for parameter in copied.parameters()} == {nn.Parameter}
