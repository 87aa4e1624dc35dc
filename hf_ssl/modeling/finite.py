# SPDX-License-Identifier: Apache-2.0
"""Finds weights that are not finite. No such weights are saved, exported or described."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ssl.errors import UserError


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None. The host waits once for the device.

    Args:
        tensors: the `state_dict` of a model: its parameters, the statistics of BatchNorm, its teachers,
            queues and centers. Integers and tensors without values (device "meta") do not count.
    """
    floats = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta
    }
    if not floats:
        return None
    device = next(iter(floats.values())).device
    finite = torch.stack([tensor.detach().isfinite().all().to(device) for tensor in floats.values()]).tolist()
    return next((name for name, fine in zip(floats, finite, strict=True) if not fine), None)


def check_finite(model: torch.nn.Module, where: str) -> None:
    """Raise `UserError` if a weight of a model is not finite.

    Args:
        model: the model.
        where: the name of the model, for the message.
    """
    name = not_finite(model.state_dict())
    if name is not None:
        raise UserError(
            f"{where}: expected finite weights, got NaN or infinity in {name}, because its training "
            "diverged; use a checkpoint of an earlier step, or train again with a lower learning rate"
        )
