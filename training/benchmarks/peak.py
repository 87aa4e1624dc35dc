# SPDX-License-Identifier: Apache-2.0
"""Memory at the peak of a program, beyond what was there before."""

import os
from pathlib import Path

import torch

from training.benchmarks.row import Row

WARM_UP = 1


def peak_mib(row: Row, side: str, device: torch.device) -> float:
    """MiB that one side ("ours" or "peer") takes at its peak, its inputs left out.

    On a CPU the growth of the resident set, whose high-water mark Linux lets us reset. A first call is not
    counted: it brings in libraries and threads, whose memory stays. What the allocator keeps of it for
        later is
    handed back before.
    """
    pair = row.build(device)
    program = pair.ours if side == "ours" else pair.peer
    if device.type != "cpu":
        return _accelerator_peak(program, device)
    _small_call(row, side)
    _hand_back()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    program()
    return (_status("VmHWM") - before) / 1024


def _small_call(row: Row, side: str) -> None:
    """Bring in what torch loads at the first product and the first backward pass."""
    weights = torch.randn(512, 512, requires_grad=True)
    (weights @ weights).exp().sum().backward()


def _hand_back() -> None:
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    """KiB, of /proc/self/status."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit("memory at the peak is measured on Linux alone")


def _accelerator_peak(program, device: torch.device) -> float:
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    program()
    torch.accelerator.synchronize(device)
    return (torch.accelerator.max_memory_allocated(device) - before) / 2**20
