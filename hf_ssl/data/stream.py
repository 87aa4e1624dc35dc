# SPDX-License-Identifier: Apache-2.0
"""The order of rows in a stream: readers fill a window from several shards in turn, and shuffle the window.

Each loader worker of each process is a *reader*. In each epoch, the shards are shuffled and distributed among
the readers. A reader takes rows from some open shards in turn until its window is full, shuffles the
window, and starts the next window. A window never contains rows of two epochs.

All random numbers are a function of the seed and the position of the reader. The position (`ReaderPosition`)
describes the start of the current window and counts the used rows of this window. To resume, the reader reads
the window again.
"""

import tarfile
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from heapq import heapreplace
from math import isqrt
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import IterableDataset

from hf_ssl.data.batch import UnreadableData
from hf_ssl.data.class_numbers import class_numbers
from hf_ssl.data.decode import stored_image
from hf_ssl.data.further_columns import (
    AnyStored,
    joined_rows,
    memory_size,
    stored_further_image,
    table_rows,
)
from hf_ssl.data.sources import Source
from hf_ssl.errors import UserError, first_line
from hf_ssl.random import permutation

_BLOCK_ROWS = 64  # rows that are read at once from a shard with sequential access
_WHOLE_SHARD = 1 << 20
_EVEN_SHARDS = 4  # fewest shards of a group of readers, if the groups have different numbers of shards
_MOST_EXCESS = 1 / 8  # largest excess of the rows of a group over its share, if the sizes of shards differ
_ROWS_PER_TURN = 8  # rows that a reader takes from an open shard before it takes rows from the next one
_READ_ERRORS = (OSError, ValueError, EOFError, pa.ArrowException, tarfile.TarError)
_OPEN_BYTES = 1 << 30  # of all open shards of a reader, estimated from the first shard
_SHARDS, _ROWS, _WINDOW = 1, 2, 3  # keys of the random orders


class StreamRow(NamedTuple):
    """An image of a stream, with the epoch, the shard, the number of its row in the shard, and its label.

    The label is -1 if the image has none or if labels were not requested.
    """

    epoch: int
    shard: int
    number: int
    image: AnyStored
    label: int = -1

    @property
    def key(self) -> int:
        """A number for the random numbers of this image. Equal images have different numbers."""
        return (self.shard << 40) + self.number


class Block(NamedTuple):
    """Consecutive images of a shard, their size in memory in bytes, and their labels if requested."""

    images: list[AnyStored]
    nbytes: int
    labels: list[int] | None = None


@dataclass
class ReaderPosition:
    """The position of a reader: the start of a window, and the number of its rows that were used.

    Attributes:
        epoch: number of the epoch, from 0.
        window: number of the window in this epoch.
        rows: number of rows of this epoch in earlier windows. If the reader did not read the epoch from its
            beginning, the number of rows of a batch.
        next_shard: number of shards of this epoch that were opened.
        open: [shard, rows taken] of each open shard, in turn.
        used: number of rows of this window that were used.
    """

    epoch: int = 0
    window: int = 0
    rows: int = 0
    next_shard: int = 0
    open: list[list[int]] = field(default_factory=list)
    used: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON data. Checkpoints contain these keys; the epoch is `pass_number`."""
        state = asdict(self)
        return {"pass_number": state.pop("epoch"), **state}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ReaderPosition":
        """Return the position of a state; an empty state is the start of the stream."""
        fields = dict(state)
        return cls(fields.pop("pass_number", 0), **fields)


class StreamShards:
    """The shards of a stream. Each shard can be read from its beginning.

    Args:
        source: a stream.
        open_shards: largest number of open shards of a reader. If the first shard shows that they would need
            more than 1 GiB, the reader opens fewer, at least two.
        label_column: a column of class numbers to read in addition, of a stream with known columns; or None.

    Attributes:
        count: number of shards.
        sizes: sizes of the shards, see `Source.shard_sizes`.
        label_column: see above.
        further: the further columns of images, {name: kind}.
        first_images: the first encoded images of the first shard that is not empty, at most 64.
        first_places: the place of each of these images, for messages.
        open_shards: number of open shards of a reader.

    Raises:
        TypeError: the source is map-style data.
        UserError: the first shard is empty or cannot be read.
    """

    def __init__(self, source: Source, open_shards: int, label_column: str | None = None) -> None:
        if not isinstance(source.dataset, IterableDataset):
            raise TypeError(f"expected a stream, got the map-style data {source.description}")
        self._column, self.further = source.image_column, source.further_columns
        self._folder = source.folder
        self.label_column = label_column
        columns = [source.image_column, *source.further_columns]
        columns += [] if label_column is None else [label_column]
        self._features: Any = source.dataset.features
        self._encoded = self._features is not None
        if self._encoded:
            self.dataset = source.dataset.select_columns(columns).with_format("arrow")
        else:  # Python functions make the images
            self.dataset = source.dataset.with_format(None)
        self.description, self.value_range = source.description, source.value_range
        self.is_gray = source.is_gray
        self.source_cache = source.cache
        self.count: int = 1 if source.one_shard else self.dataset.num_shards
        self.sizes = source.shard_sizes if len(source.shard_sizes) == self.count else [1] * self.count
        self._block_rows = _WHOLE_SHARD if source.whole_shards else _BLOCK_ROWS
        parts = max(1, isqrt(self.count))
        each, more = divmod(self.count, parts)
        self._starts = [part * each + min(part, more) for part in range(parts)]
        self._parts: dict[int, IterableDataset] = {}
        blocks = ((shard, block) for shard in range(self.count) for block in self.blocks(shard))
        found = next(((shard, block) for shard, block in blocks if block.images), None)
        if found is None:
            raise UserError(
                f"data.path: expected images, got no rows in {source.description}; check the data"
            )
        shard, first = found
        self.first_images = first.images[:_BLOCK_ROWS]
        self.first_places = [self.describe(shard, row) for row in range(len(self.first_images))]
        self.open_shards = min(open_shards, max(2, _OPEN_BYTES // max(1, first.nbytes)))
        # Readers that share a shard read all of it, which is slow for a long shard with sequential access.
        self._shards_per_group = open_shards if source.whole_shards else 1

    def describe(self, shard: int, row: int) -> str:
        """Return the data set, the shard and the row of an image, for messages."""
        return f"{self.description} shard {shard} row {row}"

    def _block(self, table: pa.Table) -> Block:
        """Return the rows of a table."""
        labels = None
        if self.label_column is not None:
            count = len(self._features[self.label_column].names)
            given = table.column(self.label_column).to_pylist()
            labels = class_numbers(given, count, self.description).tolist()
            table = table.drop_columns([self.label_column])  # `nbytes` must not depend on it
        return Block(table_rows(table, self._column, self.further, self._folder), table.nbytes, labels)

    def _shard(self, shard: int) -> IterableDataset:
        """Return one shard.

        `datasets` needs time in proportion to the number of shards to find one. So the shards are divided
        into parts first, and the shard is found in its part.
        """
        if self.count == 1:
            return self.dataset
        part = bisect_right(self._starts, shard) - 1
        if part not in self._parts:
            self._parts[part] = self.dataset.shard(len(self._starts), part)
        return self._parts[part].shard(self._parts[part].num_shards, shard - self._starts[part])

    def groups(self, readers: int) -> int:
        """Return the number of groups of readers. The readers of one group read the same shards.

        It is the largest divisor of `readers` with three properties: each group has enough shards to shuffle,
        all groups have the same number of shards, or at least 4 each, and no group is much larger than the
        others because the sizes of shards differ. It is 1 if no other divisor has them. If shards were
        divided unequally, a smaller group would read its images twice in an epoch, and images of other groups
        would be missing.

        Args:
            readers: number of readers. All groups have the same number of readers.
        """
        most = max(1, self.count // self._shards_per_group)
        divisors = [groups for groups in range(1, most + 1) if readers % groups == 0]
        even = [each for each in divisors if self.count % each == 0 or self.count >= _EVEN_SHARDS * each]
        if len({*self.sizes}) > 1:
            even = [each for each in even if self._fits(self._balanced(range(self.count), each))]
        return max(even)

    def divide(self, order: Sequence[int], groups: int) -> list[list[int]]:
        """Return the shards of each group of readers, in the given order.

        Every group takes each `groups`-th shard, unless the sizes of the groups then differ too much.
        """
        parts = [list(order[group::groups]) for group in range(groups)]
        return parts if self._fits(parts) else self._balanced(order, groups)

    def _fits(self, parts: list[list[int]]) -> bool:
        """Return whether no group of readers has many more rows than its share."""
        sizes = [sum(self.sizes[shard] for shard in part) for part in parts]
        return max(sizes) * len(parts) <= (1 + _MOST_EXCESS) * sum(sizes)

    def _balanced(self, order: Sequence[int], groups: int) -> list[list[int]]:
        """Return groups of almost equal size. The largest shards go first, each to the smallest group."""
        loads = [(0, group) for group in range(groups)]  # a heap
        group_of = {}
        for shard in sorted(order, key=lambda shard: -self.sizes[shard]):
            load, group_of[shard] = loads[0]
            heapreplace(loads, (load + self.sizes[shard], group_of[shard]))
        parts: list[list[int]] = [[] for _ in range(groups)]
        for shard in order:
            parts[group_of[shard]].append(shard)
        return parts

    def blocks(self, shard: int) -> Iterator[Block]:
        """Yield the images of a shard in blocks.

        Raises:
            UserError: the shard cannot be read.
        """
        errors = _READ_ERRORS  # a local name remains defined while the interpreter shuts down
        try:
            # `__iter__` would divide the data set between the workers of torch; `iter` does not
            for block in self._shard(shard).iter(batch_size=self._block_rows):
                if self._encoded:
                    yield self._block(block)
                else:
                    further = {
                        name: [stored_further_image(item, kind) for item in block[name]]
                        for name, kind in self.further.items()
                    }
                    images = joined_rows(
                        [stored_image(item) for item in block[self._column]], self.further, further
                    )
                    yield Block(images, sum(memory_size(image) for image in images))
        except errors as error:
            raise UnreadableData(
                f"data.path: expected readable files, got an error in shard {shard} of {self.description}: "
                f"{first_line(error)}; check the file"
            ) from error


class OpenShard:
    """Reads the rows of a shard that belong to a reader, in random order within each block.

    Args:
        shards: all shards.
        shard: number of this shard.
        epoch: number of the epoch, a part of the key of the random order.
        seed: seed of the run.
        every, offset: row i of the shard belongs to the reader if (i + offset) % every == 0.
        taken: number of rows to skip, because earlier windows took them.
    """

    def __init__(
        self, shards: StreamShards, shard: int, epoch: int, seed: int, every: int, offset: int, taken: int = 0
    ) -> None:
        self.shard = shard
        self.taken = 0
        self._epoch = epoch
        self._key = (seed, _ROWS, epoch, shard)
        self._every, self._offset = every, offset
        self._unread = shards.blocks(shard)
        self._read = 0  # rows of the shard in all blocks so far, of all readers
        self._blocks = 0
        self._block: deque[StreamRow] = deque()
        while self.taken < taken and self.take(taken - self.taken):
            pass

    def take(self, count: int) -> list[StreamRow]:
        """Return the next rows, at most `count`. The list is empty only at the end of the shard."""
        while not self._block:
            block = next(self._unread, None)
            if block is None:
                return []
            self._shuffle(block)
        rows = [self._block.popleft() for _ in range(min(count, len(self._block)))]
        self.taken += len(rows)
        return rows

    def _shuffle(self, block: Block) -> None:
        """Put the own rows of the next block into random order."""
        images, labels = block.images, block.labels or [-1] * len(block.images)
        own = range(-(self._read + self._offset) % self._every, len(images), self._every)
        order = permutation(len(own), *self._key, self._blocks)
        self._block.extend(
            StreamRow(self._epoch, self.shard, self._read + own[i], images[own[i]], labels[own[i]])
            for i in order.tolist()
        )
        self._read += len(images)
        self._blocks += 1


@dataclass(eq=False)
class StreamReader:
    """The rows of one loader worker of one process, without end.

    Args:
        shards: all shards.
        seed: seed of the run.
        number: number of this reader among the readers of all processes.
        readers: number of readers of all processes. If there are too few shards for all, groups of readers
            read the same shards, and each reader keeps a part of the rows.
        window: number of rows that are shuffled together.
        min_rows: smallest number of rows of this reader in an epoch. With fewer rows than a batch, a batch
            would contain an image twice.
        window_start: where to start, by default at the start of the stream; later the start of the window.
    """

    shards: StreamShards
    seed: int
    number: int
    readers: int
    window: int
    min_rows: int
    window_start: ReaderPosition = field(default_factory=ReaderPosition)

    def __post_init__(self) -> None:
        start = self.window_start
        self._groups = self.shards.groups(self.readers)
        self._next_start = start
        self._order = self._shard_order(start.epoch)
        self._open = [self._open_shard(shard, start.epoch, taken) for shard, taken in start.open]
        self._used = start.used
        self._waiting = deque(self.next_window()[self._used :] if self._used else ())

    @property
    def position(self) -> ReaderPosition:
        """The position after the row that `next_row` returned last."""
        return replace(self.window_start, used=self._used) if self._waiting else self._next_start

    def next_row(self) -> StreamRow:
        """Return the next row.

        Raises:
            UnreadableData: see `next_window`.
        """
        if not self._waiting:
            self._waiting, self._used = deque(self.next_window()), 0
        self._used += 1
        return self._waiting.popleft()

    def next_window(self) -> list[StreamRow]:
        """Return all rows of the next window, shuffled, and set `window_start` to its start.

        Raises:
            UnreadableData: a shard cannot be read, or an epoch has fewer than `min_rows` rows.
        """
        while True:
            start = self._next_start
            rows = self._fill_window(start)
            if rows:
                self.window_start = start
                key = (self.seed, _WINDOW, start.epoch, self.number, start.window)
                return [rows[i] for i in permutation(len(rows), *key).tolist()]
            if start.rows < self.min_rows:
                raise UnreadableData(
                    f"training.dataloader_num_workers: expected at least {self.min_rows} images (one batch) "
                    f"for each of {self.readers} readers (processes x loader workers), got {start.rows} "
                    f"images for reader {self.number} of {self.shards.description}; use fewer workers"
                )
            self._next_start = ReaderPosition(start.epoch + 1)
            self._order = self._shard_order(self._next_start.epoch)

    def _fill_window(self, start: ReaderPosition) -> list[StreamRow]:
        """Return the rows of the window in reading order, none at the end of the epoch."""
        rows: list[StreamRow] = []
        next_shard, turn = start.next_shard, 0
        while len(rows) < self.window:
            while len(self._open) < self.shards.open_shards and next_shard < len(self._order):
                self._open.append(self._open_shard(self._order[next_shard], start.epoch))
                next_shard += 1
            if not self._open:
                break
            turn %= len(self._open)
            taken = self._open[turn].take(min(_ROWS_PER_TURN, self.window - len(rows)))
            if taken:
                rows += taken
                turn += 1
            else:
                del self._open[turn]
        still_open = [[shard.shard, shard.taken] for shard in self._open]
        self._next_start = ReaderPosition(
            start.epoch, start.window + 1, start.rows + len(rows), next_shard, still_open
        )
        return rows

    def _open_shard(self, shard: int, epoch: int, taken: int = 0) -> OpenShard:
        members = self.readers // self._groups
        offset = self.number // self._groups + shard + epoch  # a shard's first row changes readers
        return OpenShard(self.shards, shard, epoch, self.seed, members, offset, taken)

    def _shard_order(self, epoch: int) -> list[int]:
        order = permutation(self.shards.count, self.seed, _SHARDS, epoch).tolist()
        return self.shards.divide(order, self._groups)[self.number % self._groups]
