# SPDX-License-Identifier: Apache-2.0
"""Batches of a stream, and where to go on after each of them."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ssl.data.batch import Failure, LoadedBatch, assemble
from hf_ssl.data.broken import UnreadableData, delivered
from hf_ssl.data.decode import BrokenImage, decode
from hf_ssl.data.images import message, probe_images
from hf_ssl.data.ordering import Share
from hf_ssl.data.stream import Place, ShardedRows, Slot
from hf_ssl.random import image_seeds
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)

_MOST_BROKEN = 1000  # for each image that can be read: there will hardly be more of these


@dataclass(frozen=True)
class Layout:
    """What has to be as it was for a stream to go on exactly."""

    revision: str
    seed: int
    rank: int
    world_size: int
    workers: int
    shards: int
    groups: int
    window: int
    open_shards: int


class StreamBatches(IterableDataset[LoadedBatch]):
    """The batches of each loader worker; in which order they come is the business of `StreamLoader`.

    Args:
        rows: the shards.
        preset: the views.
        share: this process's.
        channels: of the decoded images.
        window: rows that are shuffled together.
        position: see `StreamLoader`.
    """

    def __init__(
        self,
        rows: ShardedRows,
        preset: ViewPreset,
        share: Share,
        channels: int,
        window: int,
        position: dict[str, Any],
    ) -> None:
        self.rows = rows
        self.preset = preset
        self.share = share
        self.channels = channels
        self.window = window
        self.position = position
        places = [f"{rows.description} shard 0 row {row}" for row in range(len(rows.first))]
        self.small = probe_images(rows.first, places, channels, rows.description).small

    def __iter__(self) -> Iterator[LoadedBatch | Failure]:  # type: ignore[override]
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # torch asks worker 0 first, but the next batch of the run is that of the worker whose turn it was
        reader = (worker + self.position["batches"]) % workers
        place = Place(**self.position["readers"].get(str(reader), {}))
        number, slots = self.share.rank * workers + reader, self.share.world_size * workers
        try:
            slot = Slot(self.rows, self.share.seed, number, slots, self.window, self.share.batch_size, place)
            while True:
                yield self._batch(slot, str(reader))
        except UnreadableData as error:
            yield Failure(str(error))

    def _batch(self, slot: Slot, reader: str) -> LoadedBatch:
        images: list[Tensor] = []
        passes: list[int] = []
        keys: list[int] = []
        broken: list[str] = []
        while len(images) < self.share.batch_size:
            row = slot.next_row()
            try:
                data = row.image.read()
                images.append(decode(data, self.channels))
            except BrokenImage as error:
                where = f"{self.rows.description} shard {row.shard} row {row.number}"
                broken.append(message(where, row.image, error))
                if len(broken) > _MOST_BROKEN * (1 + len(images)):
                    raise UnreadableData(
                        f"{len(broken)} images cannot be read; the last is {broken[-1]}"
                    ) from error
            else:
                passes.append(row.pass_number)
                keys.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
        seeds = image_seeds(self.share.seed, np.array(passes), np.array(keys, np.uint64))
        position = {"reader": reader, "place": asdict(slot.here)}
        return assemble(images, seeds, self.preset, small=self.small, broken=broken, position=position)


class StreamLoader(DataLoader[LoadedBatch]):
    """Yields endless batches of a stream, each with the later position of all readers of this process.

    `iter` continues where the last one stopped. If the number of rows is known, `iter` ends after
    `len(self)` batches.

    Args:
        batches: the readers' batches.
        layout: of the stream as it is read now.
        length: batches of this process in a pass, if known.
        options: for torch's loader.
    """

    def __init__(self, batches: StreamBatches, layout: Layout, length: int | None, **options: Any) -> None:
        super().__init__(batches, batch_size=None, **options)
        self.layout = layout
        self.length = length
        self._done: int = batches.position["batches"]
        self._readers: dict[str, Any] = dict(batches.position["readers"])
        self._running: Iterator[LoadedBatch] | None = None
        self._workers: Any = None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the length of this stream is not known")
        return self.length

    def __iter__(self) -> Iterator[LoadedBatch]:  # type: ignore[override]
        if self._running is None:
            self._workers = super().__iter__()
            self._running = map(delivered, self._workers)
        end = None if self.length is None else (self._done // self.length + 1) * self.length
        while self._done != end:
            batch = next(self._running)
            part = cast(dict[str, Any], batch.position)
            self._done += 1
            self._readers[part["reader"]] = part["place"]
            position = {"batches": self._done, "layout": vars(self.layout), "readers": dict(self._readers)}
            yield replace(batch, position=position)

    def close(self) -> None:
        """Stop the workers."""
        end_workers(self._workers)
        self._running = self._workers = None


def end_workers(iterator: Any) -> None:
    """Stop the workers of a DataLoader's iterator at once.

    Without this function, Python's garbage collector frees the workers, because a trainer and its loader
    refer to each other. The collector closes the queues first (seen with Python 3.11). torch's iterator (seen
    with 2.14) then cannot send its stop message through these queues, and waits 5 s for each worker.

    Args:
        iterator: iterator of torch's DataLoader. Nothing happens for None and for iterators without workers.
    """
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def start_position(position: dict[str, Any] | None, layout: Layout) -> dict[str, Any]:
    """Where readers begin: where they were, if the stream is read as it was; else nearby, with a warning.

    Returns:
        {"batches": that this process did before, "readers": {number: state of its `Place`}}.
    """
    if position is None:
        return {"batches": 0, "readers": {}}
    if position["layout"] == vars(layout):
        return position
    changes = [
        f"{name} {position['layout'].get(name)} -> {value}"
        for name, value in vars(layout).items()
        if position["layout"].get(name) != value
    ]
    logger.warning(
        "the stream resumes near its last position, not exactly there, because it is read in another way: %s",
        ", ".join(changes),
    )
    places = [Place(**state) for state in position["readers"].values()]
    pass_number = min((place.pass_number for place in places), default=0)
    of_a_slot = position["layout"]["shards"] / position["layout"]["groups"]
    # of the open shards about a half was read
    parts = [
        (place.next_shard - len(place.open) / 2) / of_a_slot
        for place in places
        if place.pass_number == pass_number
    ]
    share = sum(parts) / len(parts) if parts else 0.0
    place = Place(pass_number, next_shard=int(min(1.0, share) * layout.shards / layout.groups))
    readers = {str(reader): asdict(place) for reader in range(layout.workers)}
    return {"batches": position["batches"], "readers": readers}
