# SPDX-License-Identifier: Apache-2.0
"""Measures the time of two programs alternately, so that other load on the machine affects both equally."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Pair:
    """Two programs that do the same work.

    Attributes:
        ours: program of hf_ssl.
        peer: program of the other library.
        ours_units: units of work in a call of `ours`.
        peer_units: units of work in a call of `peer`.
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any]
    ours_units: int = 1
    peer_units: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per unit of work on each side. `ratios` contains the peer's time divided by ours per pair."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / mine for mine, theirs in zip(self.ours, self.peer, strict=True)]

    def summary(self) -> dict[str, float]:
        low, middle, high = quartiles(self.ratios)
        return {
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "ours_seconds": statistics.median(self.ours),
            "peer_seconds": statistics.median(self.peer),
            "pairs": len(self.ours),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile. For one value, all are equal to it."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compare(pair: Pair, repeats: int, clock: str, device: torch.device) -> Timing:
    """Return the times of both sides.

    Each side runs once without measurement, then `repeats` times. The first side alternates between pairs.

    Args:
        pair: both programs.
        repeats: number of pairs.
        clock: a key of `CLOCKS`.
        device: the device of the programs.
    """
    now = CLOCKS[clock]

    def seconds(program: Callable[[], Any], units: int) -> float:
        start = now()
        program()
        finish(device)
        return (now() - start) / units

    sides = ((pair.ours, pair.ours_units), (pair.peer, pair.peer_units))
    for program, units in sides:
        seconds(program, units)
    measured: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            measured[side].append(seconds(*sides[side]))
    return Timing(*measured)


def finish(device: torch.device) -> None:
    """Wait for an accelerator, which computes asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
