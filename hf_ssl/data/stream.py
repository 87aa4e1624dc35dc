# SPDX-License-Identifier: Apache-2.0
"""A stream's order of rows: shards read in turn into a window that is shuffled, and where to go on.

The shards of a pass are put in random order and dealt out to *slots*: each loader worker of each process is
one. A slot reads from some open shards in turn until a window is full, shuffles the window, and starts the
next one; a window never spans two passes. All randomness is a function of the seed and of where the slot is,
so a position is: pass, window, which shards are open and how many of their rows the windows before this one
took, and how many rows of this window were used. To resume, the window is read again.
"""

import tarfile
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import NamedTuple

import pyarrow as pa
from datasets import IterableDataset

from hf_ssl.data.broken import UnreadableData
from hf_ssl.data.columns import encoded_images
from hf_ssl.data.decode import Encoded
from hf_ssl.data.ordering import permutation
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError

_BLOCK_ROWS = 64  # rows read at once where a shard is a sequence
_WHOLE_SHARD = 1 << 20
_TURN_ROWS = 8  # rows taken from an open shard before it is the next one's turn
_READ_ERRORS = (OSError, ValueError, EOFError, pa.ArrowException, tarfile.TarError)
_OPEN_BYTES = 1 << 30  # of the open shards of a slot together, as far as the first shard tells
_SHARDS, _ROWS, _WINDOW = 1, 2, 3  # what a random order is for


class Row(NamedTuple):
    """An image of a stream, and where it was read."""

    pass_number: int
    shard: int
    number: int
    image: Encoded


@dataclass
class Place:
    """Where a slot is: at the start of a window, and how much of it was used."""

    pass_number: int = 0
    window: int = 0
    rows: int = 0
    """Rows of this pass in earlier windows."""
    next_shard: int = 0
    """How many of the pass's shards were opened."""
    open: list[list[int]] = field(default_factory=list)
    """[shard, rows taken] of each open one, in turn."""
    used: int = 0


class ShardedRows:
    """A stream's shards, each of which can be read from its beginning.

    Args:
        source: a stream.
        open_shards: how many a slot may have open; fewer (but two) if the first shard shows that they would
            take more than 1 GiB.

    Raises:
        UserError: the first shard holds nothing or cannot be read.
    """

    def __init__(self, source: Source, open_shards: int) -> None:
        if not isinstance(source.dataset, IterableDataset):
            raise TypeError(f"expected a stream, got the map-style data {source.description}")
        self.dataset = source.dataset.select_columns([source.image_column]).with_format("arrow")
        self.description = source.description
        self.count: int = self.dataset.num_shards
        self.block_rows = _WHOLE_SHARD if source.whole_shards else _BLOCK_ROWS
        parts = max(1, isqrt(self.count))
        each, more = divmod(self.count, parts)
        self._starts = [part * each + min(part, more) for part in range(parts)]
        self._parts: dict[int, IterableDataset] = {}
        first = next(self.tables(0), None)
        if first is None or not len(first):
            raise UserError(f"there are no images in {source.description}")
        self.first = encoded_images(first.slice(0, _BLOCK_ROWS))
        self.open_shards = min(open_shards, max(2, _OPEN_BYTES // max(1, first.nbytes)))
        # Slots that share a shard each read all of it, which is slow where it is a long sequence.
        self.least_shards = open_shards if source.whole_shards else 1

    def _shard(self, shard: int) -> IterableDataset:
        """One shard, out of a part of them: finding it takes time in proportion to how many there are."""
        part = bisect_right(self._starts, shard) - 1
        if part not in self._parts:
            self._parts[part] = self.dataset.shard(len(self._starts), part)
        return self._parts[part].shard(self._parts[part].num_shards, shard - self._starts[part])

    def groups(self, slots: int) -> int:
        """How many groups of equal size the slots form, so that each has enough shards to mix."""
        most = max(1, self.count // self.least_shards)
        return max(groups for groups in range(1, slots + 1) if slots % groups == 0 and groups <= most)

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """The shard's images, in blocks. Raises UserError where they cannot be read."""
        errors = _READ_ERRORS  # a local name still means something when the interpreter ends
        try:
            # `iter` does not divide a data set between torch's workers, `__iter__` does
            yield from self._shard(shard).iter(batch_size=self.block_rows)
        except errors as error:
            reason = str(error).split("\n")[0]
            raise UnreadableData(f"shard {shard} of {self.description} cannot be read: {reason}") from error


class OpenShard:
    """Reads the rows of a shard that belong to a slot, each block of them in random order.

    Args:
        rows: all shards.
        shard: number of this one.
        pass_number: part of the rows' order.
        seed: of the run.
        every, offset: row i of the shard belongs to the slot if (i + offset) % every == 0.
        taken: rows to leave out at the beginning, because they were taken before.
    """

    def __init__(
        self,
        rows: ShardedRows,
        shard: int,
        pass_number: int,
        seed: int,
        every: int,
        offset: int,
        taken: int = 0,
    ) -> None:
        self.shard = shard
        self.taken = 0
        self._pass_number = pass_number
        self._key = (seed, _ROWS, pass_number, shard)
        self._every, self._offset = every, offset
        self._tables = rows.tables(shard)
        self._read = 0  # rows of the shard in all blocks so far, whosever they are
        self._blocks = 0
        self._block: deque[Row] = deque()
        while self.taken < taken and self.take(taken - self.taken):
            pass

    def take(self, count: int) -> list[Row]:
        """The next rows, at most `count`; none only when the shard is at its end."""
        while not self._block:
            if not self._load():
                return []
        rows = [self._block.popleft() for _ in range(min(count, len(self._block)))]
        self.taken += len(rows)
        return rows

    def _load(self) -> bool:
        table = next(self._tables, None)
        if table is None:
            return False
        images = encoded_images(table)
        own = range(-(self._read + self._offset) % self._every, len(images), self._every)
        order = permutation(len(own), *self._key, self._blocks)
        self._block.extend(
            Row(self._pass_number, self.shard, self._read + own[i], images[own[i]]) for i in order.tolist()
        )
        self._read += len(images)
        self._blocks += 1
        return True


class Slot:
    """The endless rows of one loader worker of one process.

    Args:
        rows: all shards.
        seed: of the run.
        number: of this slot.
        slots: how many there are. Where there are too few shards for all, groups of slots read the same
            ones, and each slot keeps its part of their rows.
        window: rows that are shuffled together.
        least: rows that a pass must have here: with fewer, an image would be in a batch twice.
        place: where to begin.
    """

    def __init__(
        self,
        rows: ShardedRows,
        seed: int,
        number: int,
        slots: int,
        window: int,
        least: int,
        place: Place | None = None,
    ) -> None:
        self.place = place or Place()
        self._rows = rows
        self._seed = seed
        self._number, self._slots = number, slots
        self._window = window
        self._least = least
        self._groups = rows.groups(slots)
        self._upcoming = self.place
        self._order = self._shard_order(self.place.pass_number)
        self._open = [self._opened(shard, self.place.pass_number, taken) for shard, taken in self.place.open]
        self._used = self.place.used
        self._waiting = deque(self.next_window()[self._used :] if self._used else ())

    @property
    def here(self) -> Place:
        """After the row that came last."""
        return replace(self.place, used=self._used) if self._waiting else self._upcoming

    def next_row(self) -> Row:
        """The next row."""
        if not self._waiting:
            self._waiting, self._used = deque(self.next_window()), 0
        self._used += 1
        return self._waiting.popleft()

    def next_window(self) -> list[Row]:
        """The rows of a whole window, shuffled; afterwards `place` is where they start."""
        while True:
            start = self._upcoming
            rows = self._fill(start)
            if rows:
                self.place = start
                order = permutation(
                    len(rows), self._seed, _WINDOW, start.pass_number, self._number, start.window
                )
                return [rows[i] for i in order.tolist()]
            if start.rows < self._least:
                raise UnreadableData(
                    f"expected at least one batch of {self._least} images for each of {self._slots} readers "
                    f"(processes x "
                    f"loader workers), got {start.rows} for reader {self._number} of {self._rows.description}"
                )
            self._upcoming = Place(start.pass_number + 1)
            self._order = self._shard_order(self._upcoming.pass_number)

    def _fill(self, start: Place) -> list[Row]:
        """The window's rows as they are read; none at the end of the pass."""
        rows: list[Row] = []
        next_shard, turn = start.next_shard, 0
        while len(rows) < self._window:
            while len(self._open) < self._rows.open_shards and next_shard < len(self._order):
                self._open.append(self._opened(self._order[next_shard], start.pass_number))
                next_shard += 1
            if not self._open:
                break
            turn %= len(self._open)
            taken = self._open[turn].take(min(_TURN_ROWS, self._window - len(rows)))
            if taken:
                rows += taken
                turn += 1
            else:
                del self._open[turn]
        still_open = [[shard.shard, shard.taken] for shard in self._open]
        self._upcoming = Place(
            start.pass_number, start.window + 1, start.rows + len(rows), next_shard, still_open
        )
        return rows

    def _opened(self, shard: int, pass_number: int, taken: int = 0) -> OpenShard:
        offset = (
            self._number // self._groups + shard + pass_number
        )  # so that no member always has the first row
        members = self._slots // self._groups
        return OpenShard(self._rows, shard, pass_number, self._seed, members, offset, taken)

    def _shard_order(self, pass_number: int) -> list[int]:
        order = permutation(self._rows.count, self._seed, _SHARDS, pass_number)
        return order[self._number % self._groups :: self._groups].tolist()
