# SPDX-License-Identifier: Apache-2.0
"""What a row of the benchmark is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.benchmarks.pairs import Pair


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: for the command line. title, peer: for the table: what is done, and by whom else.
        aim: how many times faster than the peer this should be.
        build: makes both programs for a device.
        threads: None uses all cores and wall time; 1 measures one core by its own time, which what else runs
            on the machine disturbs less.
        unit: of work, for the seconds in the record.
        repeats: pairs that are measured.
        memory_aim: how many times less memory at the peak it should take, where that is measured too.
        precision: measured only where `auto` chooses this precision; None: everywhere.
        accelerator: whether the row also runs where an accelerator is found.
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
