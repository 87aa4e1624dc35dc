# SPDX-License-Identifier: Apache-2.0
"""Defines a row of the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.benchmarks.pairs import Pair


@dataclass(frozen=True)
class Row:
    """A comparison of hf_ssl with another library.

    Attributes:
        name: name on the command line.
        title: description of the work in the table.
        peer: name of the other library in the table.
        aim: smallest wanted ratio of the other library's time to ours.
        build: returns both programs for a device.
        unit: unit of work of the seconds in the record.
        threads: number of threads; None uses all cores. With 1, the clock counts the CPU time of the process,
            which other load on the machine affects less. Otherwise it is wall time.
        repeats: number of measured pairs.
        memory_aim: smallest wanted ratio of the other library's peak memory to ours; None if memory is not
            measured.
        accelerator: whether the row also runs on an accelerator.
        precision: the row is measured only if `auto` chooses this precision; None measures it always.
    """

    name: str
    title: str
    peer: str
    aim: float
    build: Callable[[torch.device], Pair]
    unit: str
    threads: int | None = None
    repeats: int = 9
    memory_aim: float | None = None
    accelerator: bool = False
    precision: str | None = None

    @property
    def clock(self) -> str:
        return "cpu" if self.threads == 1 else "wall"
