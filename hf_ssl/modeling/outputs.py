# SPDX-License-Identifier: Apache-2.0
"""The output of a method's forward pass, and the argument of its hooks."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class SSLOutput(ModelOutput):
    """Output of a method's forward pass.

    Attributes:
        loss: scalar.
        terms: the named parts of the loss, detached scalars. The trainer logs and plots them separately.
        embeddings: (B, V, D) the vectors that the loss compares, for the monitor; of all processes if the
            method gathers.
    """

    loss: Tensor | None = None
    terms: dict[str, Tensor] | None = None
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """Progress of a run when a hook is called. A method knows no other clock.

    Attributes:
        step: completed optimizer steps (in `after_step` including the last one).
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch; `total_steps` for a stream of unknown length.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Return the completed share of the run, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Return the completed epochs."""
        return self.step / self.steps_per_epoch
