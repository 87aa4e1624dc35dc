# SPDX-License-Identifier: Apache-2.0
"""Makes losses compute in float32 or better, independent of the precision of the model."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

SMALLEST_TEMPERATURE = 0.003
"""With a smaller temperature, the exponentials of `nt_xent` would underflow in float64."""


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in half precision as float32, and any other tensor as it is.

    float64 does not change because gradcheck needs it.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of tensors so that autocast does not lower its precision.

    This is for losses that convert half precision themselves, one block at a time. It is also for backward
    passes, because they may run inside an autocast region.
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
    """Wrap a loss so that it computes in float32 or better, also for half precision and under autocast."""
    loss = without_autocast(loss)

    @wraps(loss)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        args = tuple(upcast(value) if isinstance(value, Tensor) else value for value in args)
        kwargs = {key: upcast(value) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        return loss(*args, **kwargs)

    return wrapped
