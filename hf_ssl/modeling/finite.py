# SPDX-License-Identifier: Apache-2.0
"""Finds weights that are not finite. No such weights are saved, exported or described."""

from collections.abc import Iterable, Mapping
from typing import Any

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


def tensors_in(state: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors and numbers with a fraction in nested dicts and lists, as {name: tensor}.

    Args:
        state: e.g. the `state_dict` of an optimizer.
        name: start of the names.
    """
    if isinstance(state, Tensor | float):
        return {name: torch.as_tensor(state)}
    if isinstance(state, Mapping):
        items: Iterable[Any] = state.items()
    else:
        items = enumerate(state) if isinstance(state, list | tuple) else ()
    return {
        inner: tensor for key, item in items for inner, tensor in tensors_in(item, f"{name}.{key}").items()
    }


def not_finite_training(model: torch.nn.Module, optimizer: Any) -> str | None:
    """Return the name of the first number of a model or its optimizer that is not finite, or None.

    Args:
        model: the model.
        optimizer: the optimizer that changes its weights; None: there is none yet.
    """
    name = not_finite(model.state_dict())
    if name is not None or optimizer is None:
        return name
    state = optimizer.state
    named = {weight: state[tensor] for weight, tensor in model.named_parameters() if tensor in state}
    return not_finite(tensors_in(named, "optimizer"))


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


def check_not_quantized(model: torch.nn.Module, where: str) -> None:
    """Raise `UserError` if a matrix of a model contains whole numbers, which a scale must follow.

    transformers (seen with 5.24) loads the int8 numbers of a quantized file as weights if `config.json` has
    no `quantization_config`.

    Args:
        model: the model.
        where: the name of the model, for the message.
    """
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or weight.numel() == 0 or weight.detach().abs().max() <= 1:
            continue
        if torch.equal(weight, weight.round()):
            raise UserError(
                f"{where}: expected weights, got whole numbers in {name}, as in a quantized checkpoint "
                "without its scales; use the checkpoint before the quantization"
            )
