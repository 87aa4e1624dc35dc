# SPDX-License-Identifier: Apache-2.0
"""The names of precisions, and the fastest one of a device, for `training.precision=auto` and
`evaluation.precision=auto` (layer 0). Only the functions import torch, because recipes need no torch.
"""

import os
import time
from collections.abc import Container
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from hf_ssl.errors import UserError, check_name

if TYPE_CHECKING:
    import torch

AUTO = "auto"
PRECISIONS = ("float32", "bfloat16", "float16")
"""All precisions. Training and evaluation also accept `AUTO`."""
ACCELERATE = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Name of a precision in accelerate -> its name here."""

_GAIN = 1.2
_REPEATS = 6
_FINE = 1e-5  # seconds


def autocast_dtype(precision: str) -> "torch.dtype | None":
    """Return the dtype of autocast for a precision; None: no autocast (float32, float64)."""
    import torch

    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def autocast(device: "torch.device", dtype: "torch.dtype | None") -> "torch.autocast":
    """Return a context for a forward pass on the device; `dtype` is a result of `autocast_dtype`."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def launched_precision() -> str | None:
    """Return the precision that the user gave to `accelerate launch --mixed_precision`; None: none, or "no".

    transformers (5.24) uses it if neither `bf16` nor `fp16` is true.

    Raises:
        UserError: the precision is not one of `PRECISIONS`.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    check_name("--mixed_precision of accelerate launch", given, ACCELERATE, "no, bf16 or fp16")
    return None if given == "no" else ACCELERATE[given]


def check_launched_precision(precision: str, excluded: Container[str] = ()) -> None:
    """Raise `UserError` if `accelerate launch` was started with another precision than that of the run.

    Args:
        precision: the precision of the run, or `AUTO`.
        excluded: precisions that `AUTO` must not select.
    """
    launched = launched_precision()
    if launched is not None and (precision not in (AUTO, launched) or launched in excluded):
        raise UserError(
            f"training.precision: expected {launched}, as --mixed_precision of accelerate launch, got "
            f"{precision}; leave --mixed_precision out, or change it"
        )


class Precision(NamedTuple):
    """A choice of precision."""

    name: str
    """One of `PRECISIONS`."""
    reason: str
    """The reason as a clause: "bfloat16 is 2.4 times as fast as float32 on this CPU"."""


@cache
def fastest_precision(device_type: str) -> Precision:
    """Return the fastest precision of the current device of this type.

    On CUDA, the compute capability determines the precision: bfloat16 from 8.0 on (Ampere), float16 from 7.0
    on, and float32 below. Volta and Turing (7.0 and 7.5) have no fast bfloat16. On other devices, this
    function measures the forward and backward pass of a convolution and two linear layers, which takes a few
    milliseconds.
    bfloat16 is selected only if it is more than 1.2 times as fast as float32. A CPU without AVX512-BF16 or
    AMX needs 2 to 6 times longer in bfloat16.

    Args:
        device_type: "cpu", "cuda", "mps", ...
    """
    import torch

    if device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        name = "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
        return Precision(name, f"known for compute capability {capability[0]}.{capability[1]}")
    full, half = _seconds(device_type)
    name = "bfloat16" if full > _GAIN * half else "float32"
    device = device_type.upper()
    return Precision(name, f"bfloat16 is {full / half:.2g} times as fast as float32 on this {device}")


def _seconds(device_type: str) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass of small layers in float32 and in bfloat16.

    Each number is the shortest of several measurements. On a CPU, they are seconds of this process, because
    other programs on the machine lengthen some measurements and not others.
    """
    import torch
    from torch import nn

    exact = time.get_clock_info("process_time").resolution < _FINE  # not on Windows
    clock = time.process_time if device_type == "cpu" and exact else time.perf_counter

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        convolution = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last).to(device_type)
        linear = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).to(device_type)
        images = torch.randn(8, 64, 16, 16).to(device_type, memory_format=torch.channels_last)
        tokens = torch.randn(512, 256).to(device_type)

    def run(half: bool) -> float:
        start = clock()
        with torch.enable_grad():
            with torch.autocast(device_type, torch.bfloat16, enabled=half):
                total = convolution(images).float().sum() + linear(tokens).float().sum()
            total.backward()
        total.item()  # waits for the device
        return clock() - start

    run(False), run(True)  # the first calls prepare kernels
    rounds = [(run(False), run(True)) for _ in range(_REPEATS)]
    full, half = zip(*rounds, strict=True)
    return min(full), min(half)
