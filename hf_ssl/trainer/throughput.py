# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes and how much memory it has needed."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Steps a second between two readings, without the time spent in `paused` (measuring, saving)."""

    def __init__(self) -> None:
        self.step = 0
        self.started = time.perf_counter()

    def restart(self, step: int) -> None:
        """Begin to count at `step`."""
        self.step, self.started = step, time.perf_counter()

    def read(self, step: int) -> float:
        """Steps a second since the last reading; begins to count anew."""
        rate = (step - self.step) / max(time.perf_counter() - self.started, 1e-9)
        self.restart(step)
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory that this process has held so far, in GiB: of the accelerator if it trains on one,
    else of the host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
