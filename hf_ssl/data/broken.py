# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read: reported one by one, and the end of the run when there are too many."""

import logging
import math
from typing import Any

from hf_ssl.data.batch import Failure, LoadedBatch
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

_JUDGED_AFTER = 100


class UnreadableData(UserError):
    """Data that a loader cannot go on with."""


def delivered(batch: LoadedBatch | Failure) -> LoadedBatch:
    """The batch. Raises UnreadableData in place of a failure."""
    if isinstance(batch, Failure):
        raise UnreadableData(batch.reason)
    return batch


class BrokenCounter:
    """Counts images that cannot be read. An image counts once, even if several epochs try to read it.

    Args:
        max_fraction: largest share of all images that may be broken (`data.max_broken_fraction`).
        num_images: number of images in the data; None for a stream of unknown length. For such a stream, the
            share refers to the images read so far. It is checked from 100 images on, with a tolerance of
            three standard deviations.
    """

    def __init__(self, max_fraction: float, num_images: int | None = None) -> None:
        self.max_fraction = max_fraction
        self.num_images = num_images
        self.read = 0
        self._found: dict[str, None] = {}

    @property
    def broken(self) -> int:
        """Number of different images that could not be read."""
        return len(self._found)

    def add(self, batch: LoadedBatch | Failure) -> None:
        """Counts a batch. (A failure comes from a loader that was built around ours, as accelerate does.)

        Raises:
            UserError: more images are broken than `max_fraction` allows.
        """
        batch = delivered(batch)
        self.count(len(batch), batch.broken)

    def count(self, good: int, broken: list[str]) -> None:
        """Counts images that were read and messages about those that were not; raises as `add` does."""
        self.read += good + len(broken)
        for message in broken:
            if message not in self._found:
                self._found[message] = None
                logger.warning("skipped a broken image: %s", message)
        if broken and self.broken > self._allowed():
            total = self.read if self.num_images is None else self.num_images
            share = min(1.0, math.ceil(100 * self.broken / total) / 100)
            raise UserError(
                f"data.max_broken_fraction: expected a share of at most {self.max_fraction:g} broken images, "
                f"got {self.broken} of {total} images (the last one is {broken[-1]}); to skip them, use "
                f"data.max_broken_fraction={max(2 * self.max_fraction, share):g}"
            )

    def _allowed(self) -> float:
        if self.num_images is not None:
            return max(self.max_fraction * self.num_images, float(self.max_fraction > 0))
        if self.read < _JUDGED_AFTER:
            return math.inf
        expected = self.max_fraction * self.read
        return expected + 3 * math.sqrt(expected)

    def state_dict(self) -> dict[str, Any]:
        """The counts, in terms that JSON knows."""
        return {"read": self.read, "found": list(self._found)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from such counts. (Older ones say how many were broken, not which: they count again.)"""
        self.read, self._found = int(state["read"]), dict.fromkeys(state.get("found", ()))
