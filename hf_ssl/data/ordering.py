# SPDX-License-Identifier: Apache-2.0
"""The order of rows in an epoch, as a function of the seed and a count. No state has to be saved."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of 0 ... size - 1 that depends on the key alone: (size,) int64.

    Made from the raw output of a counter-based generator, which NumPy keeps the same for ever (NEP 19), while
    what `Generator.permutation` does with it may change.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(bits, kind="stable")


def replacement(size: int, *key: int) -> int:
    """A random row that depends on the key alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % np.uint64(size))


class ProcessShare(NamedTuple):
    """The part of each batch that one process reads.

    Attributes:
        seed: seed of the run, below 2**64.
        batch_size: number of images in a micro-batch of this process.
        rank: number of this process.
        world_size: number of processes.
    """

    seed: int
    batch_size: int
    rank: int = 0
    world_size: int = 1


class RowBatch(NamedTuple):
    """The rows of one micro-batch of one process.

    Attributes:
        epoch: number of the epoch, from 0.
        rows: (B,) int64 row numbers.
    """

    epoch: int
    rows: np.ndarray


class RowBatches(Sampler[RowBatch]):
    """A batch sampler of shuffled rows. Each `iter()` yields the batches of the next epoch, without end.

    Batch b of all processes together belongs to epoch b // len(self). It is a slice of the permutation of
    this epoch. Process r takes part r of it, so that two processes with half the batch read the rows of one
    process. The epoch omits rows that do not fill a batch.

    Args:
        num_rows: number of rows of the data.
        share: the part of this process.
        start: number of micro-batches before. The first `iter()` yields the rest of the epoch.
    """

    def __init__(self, num_rows: int, share: ProcessShare, start: int = 0) -> None:
        self.num_rows = num_rows
        self.share = share
        self.next_batch = start

    def __len__(self) -> int:
        return self.num_rows // (self.share.batch_size * self.share.world_size)

    def __iter__(self) -> Iterator[RowBatch]:
        # This generator starts when its first batch is read. torch calls `iter` more often than it reads.
        start = self.next_batch
        epoch = start // len(self)
        self.next_batch = (epoch + 1) * len(self)  # an interrupted iteration is not continued
        seed, batch_size, rank, world_size = self.share
        order = permutation(self.num_rows, seed, epoch)
        for number in range(start, (epoch + 1) * len(self)):
            first = (number % len(self) * world_size + rank) * batch_size
            yield RowBatch(epoch, order[first : first + batch_size])

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch, unless it has begun. transformers' Trainer calls this method."""
        if self.next_batch // len(self) != epoch:
            self.next_batch = epoch * len(self)
