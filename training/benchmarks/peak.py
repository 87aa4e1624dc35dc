# SPDX-License-Identifier: Apache-2.0
"""Memory at the peak of a program, beyond what was there before."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.benchmarks.row import Row


def peak_mib(row: Row, side: str, device: torch.device) -> float:
    """MiB that one side ("ours" or "peer") of a row takes at its peak, its inputs left out."""
    pair = row.build(device)
    program = pair.ours if side == "ours" else pair.peer
    return measured_peak_mib(program) if device.type == "cpu" else _accelerator_peak(program, device)


def measured_peak_mib(program: Callable[[], Any]) -> float:
    """Growth of the resident set, in MiB, whose high-water mark Linux lets us reset.

    A small product and its gradient go first and bring in libraries and threads; what the allocator keeps of
    them is handed back.
    """
    weights = torch.randn(512, 512, requires_grad=True)
    (weights @ weights).exp().sum().backward()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    program()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB, of /proc/self/status."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit("memory at the peak is measured on Linux alone")


def _accelerator_peak(program: Callable[[], Any], device: torch.device) -> float:
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    program()
    torch.accelerator.synchronize(device)
    return (torch.accelerator.max_memory_allocated(device) - before) / 2**20
