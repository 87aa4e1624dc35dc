# SPDX-License-Identifier: Apache-2.0
"""Which rows come when: pure functions of the seed and a count, so that there is no state to save."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from hf_ssl.random import permutation


class Share(NamedTuple):
    """What one process reads of one run."""

    seed: int
    batch_size: int
    """images in a micro-batch of this process"""
    rank: int = 0
    world_size: int = 1


class RowBatch(NamedTuple):
    """The rows of one micro-batch of one process."""

    pass_number: int
    rows: np.ndarray
    """(B,) int64"""


class RowBatches(Sampler[RowBatch]):
    """Batches of shuffled rows, one pass over the data for each `iter()`, for ever.

    Batch b of all processes together belongs to pass b // len(self) and is a slice of that pass's
    permutation; process r takes part r of it, so that two processes with half the batch see exactly the rows
    of one. What does not fill a batch is left out of the pass.

    Args:
        num_rows: size of the data.
        share: seed, batch size, and this process among all.
        start: micro-batches done before; the first `iter()` yields only the rest of that pass.
    """

    def __init__(self, num_rows: int, share: Share, start: int = 0) -> None:
        self.num_rows = num_rows
        self.share = share
        self.next = start

    def __len__(self) -> int:
        return self.num_rows // (self.share.batch_size * self.share.world_size)

    def __iter__(self) -> Iterator[RowBatch]:
        # It all runs when the first batch is asked for: torch calls `iter` more often than it reads
        start = self.next
        pass_number = start // len(self)
        self.next = (pass_number + 1) * len(self)  # an iteration that is broken off is not continued
        seed, batch_size, rank, world_size = self.share
        order = permutation(self.num_rows, seed, pass_number)
        for number in range(start, (pass_number + 1) * len(self)):
            first = (number % len(self) * world_size + rank) * batch_size
            yield RowBatch(pass_number, order[first : first + batch_size])

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of that pass, unless it is in it already. (transformers' Trainer calls this.)"""
        if self.next // len(self) != epoch:
            self.next = epoch * len(self)
