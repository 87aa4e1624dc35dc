# SPDX-License-Identifier: Apache-2.0
"""Runs a model without changing it (layer 1): eval mode, no gradient, and unchanged random states."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and inference mode, and restore modes and random states afterwards.

    After the block, each module is in its earlier mode. (A frozen BatchNorm stays in eval mode inside a model
    in training mode.) The random states of the CPU and of the model's device are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with unchanged_random_state(device), torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def unchanged_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the random states of the CPU and of the device at its end."""
    if device.type not in ("cuda", "xpu"):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
