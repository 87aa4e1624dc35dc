# SPDX-License-Identifier: Apache-2.0
"""Runs a model without changing it (layer 1): in eval mode, without gradient and with unchanged random
states, or as a copy on the meta device.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and inference mode, and restore modes and random states afterwards.

    After the block, each module is in its earlier mode. (A frozen BatchNorm stays in eval mode inside a model
    in training mode.) The random states of the CPU and of the model's device are as before. The next block
    computes with the weights of its time (`caches_weights`).
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with unchanged_random_state(device), torch.inference_mode():
            yield
    finally:
        model.train()  # deletes the caches of `caches_weights`
        for module, training in modes:
            module.training = training


def caches_weights(module: nn.Module) -> bool:
    """Return whether a module stores a function of its weights in eval mode.

    Only `train(True)` deletes it. Setting the attribute `training` does not, and the stored values then
    ignore later changes of the weights. Such modules define `train`: the attention of LeViT (transformers
    5.24), and that of LeViT, EfficientFormer and TinyViT in timm (1.0).
    """
    return type(module).train is not nn.Module.train and not isinstance(module, PreTrainedModel)


class RandomState:
    """The states of torch's random generators of the CPU and of a device, which dropout uses.

    Args:
        device: its state is also stored if it is a GPU of CUDA, XPU or MPS.
    """

    def __init__(self, device: torch.device) -> None:
        has_state = device.type in ("cuda", "xpu", "mps")
        self._module = torch.get_device_module(device) if has_state else None
        self._device = () if device.type == "mps" else (device,)  # torch.mps takes no device
        self._cpu = torch.get_rng_state()
        self._own = None if self._module is None else self._module.get_rng_state(*self._device)

    def restore(self) -> None:
        """Give the generators the stored states."""
        torch.set_rng_state(self._cpu)
        if self._module is not None:
            self._module.set_rng_state(self._own, *self._device)


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of the CPU and of the device after the block."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


def copy_without_values(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode on torch's device "meta", which computes shapes but no values.

    The weights are not copied, so the copy needs almost no memory.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()
