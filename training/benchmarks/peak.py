# SPDX-License-Identifier: Apache-2.0
"""Measures the peak memory of a program, minus the memory before it started."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.benchmarks.row import Row


def peak_mib(row: Row, side: str, device: torch.device) -> float:
    """Return the peak memory of one side ("ours" or "peer") of a row in MiB, without its inputs."""
    pair = row.build(device)
    program = pair.ours if side == "ours" else pair.peer
    return measured_peak_mib(program) if device.type == "cpu" else _accelerator_peak(program, device)


def measured_peak_mib(program: Callable[[], Any]) -> float:
    """Return the growth of the resident memory in MiB. Linux can reset the recorded peak.

    A small product and its gradient run first, so that libraries and threads already exist. Then the
    allocator returns free memory to the system.
    """
    weights = torch.randn(512, 512, requires_grad=True)
    (weights @ weights).exp().sum().backward()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    program()
    return memory_mib("VmHWM") - before


def memory_mib(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("--peak: expected Linux, got a system without /proc/self/status fields")


def _accelerator_peak(program: Callable[[], Any], device: torch.device) -> float:
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    program()
    torch.accelerator.synchronize(device)
    return (torch.accelerator.max_memory_allocated(device) - before) / 2**20
