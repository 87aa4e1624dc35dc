# SPDX-License-Identifier: Apache-2.0
"""Values for the log records of a run: terms of the loss, training time and peak memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_ssl.modeling.gather import mean_over_processes
from hf_ssl.modeling.outputs import SSLOutput


class TermMeans:
    """Sums the terms of the loss on the device, without a synchronization, until the next log record."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, output: SSLOutput) -> None:
        """Add the terms of a micro-batch."""
        for name, value in (output.terms or {}).items():
            known = self._sums.get(name)
            self._sums[name] = value.detach().clone() if known is None else known + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """Return the means over micro-batches and processes since the last call, and reset the sums.

        This method waits for the device.
        """
        names, count = list(self._sums), self._count
        means = mean_over_processes([self._sums[name] / count for name in names])
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))


class Stopwatch:
    """Measures the time of training, without the time inside `paused` (evaluation, saving)."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None
        self._read = (0, 0.0)

    def start(self, step: int) -> None:
        """Start the measurement at a training step."""
        self._started = time.perf_counter()
        self._read = (step, self.seconds)

    def stop(self) -> None:
        """Stop the measurement. `start` continues it."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including earlier parts of a resumed run."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def restore(self, seconds: float) -> None:
        """Set the seconds of the earlier parts of a resumed run."""
        self._before = seconds

    def steps_per_second(self, step: int) -> float:
        """Return the steps per second since the last call, or since the start."""
        (last_step, last_seconds), self._read = self._read, (step, self.seconds)
        return (step - last_step) / max(self._read[1] - last_seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self._started = time.perf_counter()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB, on the accelerator if it trains there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
