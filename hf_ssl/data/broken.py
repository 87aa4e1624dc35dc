# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read: reported one by one, and the end of the run when there are too many."""

import logging
from typing import Any

from hf_ssl.data.batch import Failure, LoadedBatch
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_JUDGED_AFTER = 100
_REMEMBERED = 10_000


class UnreadableData(UserError):
    """Data that a loader cannot go on with."""


def delivered(batch: LoadedBatch | Failure) -> LoadedBatch:
    """The batch. Raises UnreadableData in place of a failure."""
    if isinstance(batch, Failure):
        raise UnreadableData(batch.reason)
    return batch


class BrokenCounter:
    """Counts images that could not be read.

    Args:
        max_fraction: of all images read (`data.max_broken_fraction`).
        images_per_pass: size of the data where it is known, for data of less than a hundred images.
    """

    def __init__(self, max_fraction: float, images_per_pass: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.judged_after = min(_JUDGED_AFTER, images_per_pass or _JUDGED_AFTER)
        self.read = 0
        self.broken = 0
        self._logged: set[str] = set()

    def add(self, batch: LoadedBatch | Failure) -> None:
        """Counts a batch. (A failure comes from a loader that was built around ours, as accelerate does.)

        Raises:
            UserError: more than the allowed share of at least 100 images (or of a pass) was broken.
        """
        batch = delivered(batch)
        self.count(len(batch), batch.broken)

    def count(self, good: int, broken: list[str]) -> None:
        """Counts images that were read and messages about those that were not; raises as `add` does."""
        self.read += good + len(broken)
        self.broken += len(broken)
        for message in broken:
            if message not in self._logged and len(self._logged) < _REMEMBERED:
                self._logged.add(message)
                logger.warning("skipped a broken image: %s", message)
        if broken and self.read >= self.judged_after and self.broken > self.max_fraction * self.read:
            raise UserError(
                f"{self.broken} of {self.read} images cannot be read, more than data.max_broken_fraction="
                f"{self.max_fraction:g} allows; the last one is {broken[-1]}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts, in terms that JSON knows."""
        return {"read": self.read, "broken": self.broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read, self.broken = int(state["read"]), int(state["broken"])
