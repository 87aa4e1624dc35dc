# SPDX-License-Identifier: Apache-2.0
"""Losses are computed in float32 or better, whatever precision the model runs in."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def raised(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is in half precision; float32 and float64 are left alone (gradcheck needs
    float64).
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of tensors so that autocast does not lower what it computes.

    For losses that raise half precision themselves, a block at a time, and for backward passes, which may be
    called inside an autocast region.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device_type = next(
            value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)
        )
        with torch.autocast(device_type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def full_precision(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a loss so that its tensor arguments are raised by `raised` and autocast does not lower them
    again.
    """
    loss = without_autocast(loss)

    @wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = tuple(raised(value) if isinstance(value, Tensor) else value for value in args)
        kwargs = {key: raised(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return loss(*args, **kwargs)

    return wrapped
