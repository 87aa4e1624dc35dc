# SPDX-License-Identifier: Apache-2.0
"""What a method's forward returns, and what its hooks are told."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class SSLOutput(ModelOutput):
    """Result of a method's forward.

    Attributes:
        loss: scalar; what is minimised.
        terms: the named parts of the loss, detached scalars, logged and plotted one by one.
        embeddings: (B, V, D) what the loss compares, for the monitor; gathered over all processes if the
            method gathers.
    """

    loss: Tensor | None = None
    terms: dict[str, Tensor] | None = None
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run stands when a hook is called; the only clock that a method ever sees.

    Attributes:
        step: optimiser steps done so far (in `after_step` the step just done is counted).
        total_steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps in one pass over the data; for a stream of unknown length,
            `total_steps`.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch
