# SPDX-License-Identifier: Apache-2.0
"""The loader of a stream: its batches, and the position after each batch."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_ssl.data.batch import (
    LoadedBatch,
    ProcessShare,
    UnreadableData,
    WorkerFailure,
    batch_or_error,
    is_small,
    make_batch,
)
from hf_ssl.data.config import DataConfig
from hf_ssl.data.decode import BrokenImage
from hf_ssl.data.further_columns import decode, mirrored_channels
from hf_ssl.data.images import broken_message
from hf_ssl.data.inspection import FOUND_VALUES, inspect_images
from hf_ssl.data.sources import Source
from hf_ssl.data.stream import ReaderPosition, StreamReader, StreamShards
from hf_ssl.data.value_range import report_values
from hf_ssl.errors import UserError
from hf_ssl.random import image_seeds
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)

_MAX_BROKEN = 1000  # broken images for each readable image of a batch; more of them end the run


def make_stream_loader(
    source: Source,
    preset: ViewPreset,
    config: DataConfig,
    share: ProcessShare,
    start_batch: int,
    position: dict[str, Any] | None,
    options: dict[str, Any],
    label_column: str | None = None,
) -> "StreamLoader":
    """Return the loader of a stream; `hf_ssl.data.loader.train_loader` explains the arguments.

    Args:
        options: further arguments of torch's DataLoader.
    """
    if share.world_size > 1 and source.dataset._distributed is not None:
        raise UserError(
            "train_dataset: expected the whole stream, which hf_ssl divides among the processes, got "
            "the part of one process; leave out split_dataset_by_node"
        )
    shards = StreamShards(source, config.open_shards, label_column)
    readers = max(1, options["num_workers"])
    # The conditions under which a stream resumes exactly. Checkpoints contain these names.
    layout = {
        "revision": source.revision,
        "seed": share.seed,
        "rank": share.rank,
        "world_size": share.world_size,
        "workers": readers,  # of this process
        "shards": shards.count,
        "groups": shards.groups(share.world_size * readers),  # of readers that share shards
        "window": config.shuffle_window,
        "open_shards": config.open_shards,
    }
    start = _start_position(position, layout, start_batch, share.batch_size)
    batches = StreamBatchDataset(shards, preset, share, config.channels, config.shuffle_window, start)
    length = None if source.num_rows is None else share.batches(source.num_rows)
    return StreamLoader(batches, layout, length, **options)


def first_images_are_small(shards: StreamShards, channels: int) -> bool:
    """Return whether the first images of a stream are small and of one size.

    Raises:
        UserError: none of them can be read.
    """
    images, places, where = shards.first_images, shards.first_places, shards.description
    shards.source_cache[FOUND_VALUES] = report_values(images, shards.value_range, where)
    return is_small(inspect_images(images, places, channels, where, shards.value_range))


@dataclass(eq=False)
class StreamBatchDataset(IterableDataset[LoadedBatch]):
    """The batches of each reader. `StreamLoader` puts the batches of all readers in order.

    Args:
        shards: the shards.
        preset: the views.
        share: the part of this process.
        channels: number of channels of the image column.
        window: number of rows that are shuffled together.
        position: {"batches": number of earlier batches of this process, "readers": {number of the reader:
            state of its `ReaderPosition`}}.
    """

    shards: StreamShards
    preset: ViewPreset
    share: ProcessShare
    channels: int
    window: int
    position: dict[str, Any]

    def __post_init__(self) -> None:
        self.small = first_images_are_small(self.shards, self.channels)
        self.mirrored = mirrored_channels(self.shards.further, self.channels)

    def __iter__(self) -> Iterator[LoadedBatch | WorkerFailure]:  # type: ignore[override]
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # torch reads from worker 0 first, but the next batch of the run may come from another reader
        local = (worker + self.position["batches"]) % workers
        start = ReaderPosition.from_state_dict(self.position["readers"].get(str(local), {}))
        number, readers = self.share.rank * workers + local, self.share.world_size * workers
        try:
            reader = StreamReader(
                self.shards, self.share.seed, number, readers, self.window, self.share.batch_size, start
            )
            while True:
                yield self._batch(reader, str(local))
        except UnreadableData as error:
            yield WorkerFailure(str(error))

    def _batch(self, reader: StreamReader, name: str) -> LoadedBatch:
        images: list[Tensor] = []
        epochs: list[int] = []
        keys: list[int] = []
        labels: list[int] = []
        broken: list[str] = []
        while len(images) < self.share.batch_size:
            row = reader.next_row()
            try:
                values, is_gray = self.shards.value_range, self.shards.is_gray
                images.append(decode(row.image.read(), self.channels, values, is_gray=is_gray))
            except BrokenImage as error:
                where = self.shards.describe(row.shard, row.number)
                broken.append(broken_message(where, row.image, error))
                if len(broken) > _MAX_BROKEN * (1 + len(images)):
                    raise UnreadableData(
                        f"data.path: expected readable images, got {len(broken)} broken ones in one batch, "
                        f"the last one in {broken[-1]}; check the files"
                    ) from error
            else:
                epochs.append(row.epoch)
                keys.append(row.key)
                labels.append(row.label)
        seeds = image_seeds(self.share.seed, np.array(epochs), np.array(keys, np.uint64))
        position = {"reader": name, "place": reader.position.state_dict()}
        fields = {"broken": broken, "position": position, "mirrored": self.mirrored}
        if self.shards.label_column is not None:
            fields["labels"] = torch.tensor(labels)
        return make_batch(images, seeds, self.preset, small=self.small, **fields)


class StreamLoader(DataLoader[LoadedBatch]):
    """Yields batches of a stream, each with the new position of all readers of this process.

    `iter` continues where the last one stopped. If the number of rows is known, `iter` ends at the end of the
    epoch: after the batch whose number is the next multiple of `len(self)`. Otherwise it never ends.

    Args:
        batches: the batches of the readers.
        layout: the current conditions of reading, which checkpoints store.
        length: number of batches of this process in an epoch, if known.
        options: further arguments of torch's DataLoader.
    """

    def __init__(
        self, batches: StreamBatchDataset, layout: dict[str, Any], length: int | None, **options: Any
    ) -> None:
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
            self._running = map(batch_or_error, self._workers)
        end = None if self.length is None else (self._done // self.length + 1) * self.length
        while self._done != end:
            batch = next(self._running)
            part = cast(dict[str, Any], batch.position)
            self._done += 1
            self._readers[part["reader"]] = part["place"]
            position = {"batches": self._done, "layout": self.layout, "readers": dict(self._readers)}
            yield replace(batch, position=position)

    def close(self) -> None:
        """Stop the workers."""
        stop_workers(self._workers)
        self._running = self._workers = None


def stop_workers(iterator: Any) -> None:
    """Stop the workers of a DataLoader's iterator at once.

    Without this function, Python's garbage collector frees the workers, because a trainer and its loader
    refer to each other. The collector closes the queues first (seen with Python 3.11). torch's iterator (seen
    with 2.14) then cannot send its stop message through these queues, and waits 5 s for each worker.

    Args:
        iterator: iterator of torch's DataLoader. Nothing happens for None and for iterators without workers.
    """
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _start_position(
    position: dict[str, Any] | None, layout: dict[str, Any], start_batch: int, batch_size: int
) -> dict[str, Any]:
    """Return the position where the readers start, in the form that `StreamBatchDataset` takes.

    It is the saved position if the conditions are the same. Otherwise it is close to the saved position, and
    a warning names the differences. Epochs then end after the batches that the trainer counts. Their number
    changes if other gradient accumulation divides the same steps into more batches.

    Args:
        position: the saved position, if any.
        layout: the current conditions of reading.
        start_batch: number of earlier batches of this process; 0 for the number in `position`.
        batch_size: number of images in a batch of this process.
    """
    if position is None:
        if start_batch:
            logger.warning(
                "the stream starts at its beginning instead of after %d batches, because no position was "
                "saved", start_batch,
            )  # fmt: skip
        return {"batches": start_batch, "readers": {}}
    batches = start_batch or position["batches"]
    earlier = position["layout"] | {"batches": position["batches"]}
    changes = [
        f"{name} {earlier.get(name)} -> {value}"
        for name, value in (layout | {"batches": batches}).items()
        if earlier.get(name) != value
    ]
    if not changes:
        return position
    logger.warning(
        "the stream resumes close to its last position, not exactly there, because it is read in another "
        "way: %s",
        ", ".join(changes),
    )
    saved = [ReaderPosition.from_state_dict(state) for state in position["readers"].values()]
    epoch = min((reader.epoch for reader in saved), default=0)
    shards_of_a_reader = earlier["shards"] / earlier["groups"]
    # on average, half of each open shard was read
    parts = [
        (reader.next_shard - len(reader.open) / 2) / shards_of_a_reader
        for reader in saved
        if reader.epoch == epoch
    ]
    fraction = sum(parts) / len(parts) if parts else 0.0
    next_shard = int(min(1.0, fraction) * layout["shards"] / layout["groups"])
    start = ReaderPosition(epoch, rows=batch_size if next_shard else 0, next_shard=next_shard)
    readers = {str(reader): start.state_dict() for reader in range(layout["workers"])}
    return {"batches": batches, "readers": readers}
