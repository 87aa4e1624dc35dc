# SPDX-License-Identifier: Apache-2.0
"""How fast a run goes and how much memory it has needed."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Time spent training, without the time spent in `paused` (measuring, saving)."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None
        self._read = (0, 0.0)

    def start(self, step: int) -> None:
        """Begin to run; the run stands at `step`."""
        self._started = time.perf_counter()
        self._read = (step, self.seconds)

    def stop(self) -> None:
        """The run is over, or has stopped for now."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """So far, over all parts of a run that was interrupted."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def restore(self, seconds: float) -> None:
        """Count on from what an earlier part of the run needed."""
        self._before = seconds

    def steps_per_second(self, step: int) -> float:
        """Since the last call, or since the start."""
        (last_step, last_seconds), self._read = self._read, (step, self.seconds)
        return (step - last_step) / max(self._read[1] - last_seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self._started = time.perf_counter()


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory that this process has held so far, in GiB: of the accelerator if it trains on one, else
    of the host.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
