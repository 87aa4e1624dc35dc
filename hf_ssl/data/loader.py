# SPDX-License-Identifier: Apache-2.0
"""The loader of training data."""

import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_ssl.data.batch import Failure, HeldRows, LoadedBatch
from hf_ssl.data.broken import delivered
from hf_ssl.data.config import DataConfig
from hf_ssl.data.images import EncodedRows, probe, probe_images
from hf_ssl.data.map_style import MapBatches, Rows
from hf_ssl.data.ordering import RowBatches, Share
from hf_ssl.data.sources import Source
from hf_ssl.data.store import DecodedRows, NumberedRows, decoded_rows
from hf_ssl.data.stream import ShardedRows
from hf_ssl.data.stream_loader import Layout, StreamBatches, StreamLoader, end_workers, start_position
from hf_ssl.errors import UserError
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)


def train_loader(
    source: Source,
    preset: ViewPreset,
    *,
    config: DataConfig,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    position: dict[str, Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    device: torch.device | str = "cpu",
) -> "DataLoader[LoadedBatch]":
    """Makes the loader of one process. It shuffles, splits and seeds by itself: do not let accelerate prepare
    it.

    Map-style, each `iter(loader)` is one pass of `len(loader)` batches, the next `iter` the next pass. Batch
    b of a run is a pure function of the seed and b. To resume after b micro-batches, either start with
    `start_batch=b` (the first `iter` yields the rest of that pass), or start at 0, call `set_epoch` and skip,
    as transformers' Trainer does.

    A stream is endless, and each `iter(loader)` continues where the last one stopped. It has a length only if
    its number of rows is known. Then one `iter` is about one pass. To resume, give the `position` of the last
    batch that was used.

    Args:
        source: from `open_source`.
        preset: the views that are to be made.
        config: how to read (`channels`, `cache`, `shuffle_window`, `open_shards`).
        seed: of the run.
        batch_size: images in a micro-batch of this process.
        rank, world_size: this process and the number of processes.
        start_batch: micro-batches of this process that were done before (map-style).
        position: of a stream.
        num_workers: results do not depend on it (for a stream the order does).
        pin_memory: for copies to an accelerator that do not wait.
        device: the model's, where images lie with `data.cache=device`.

    Raises:
        UserError: fewer images than a batch, no image that can be read, sizes that differ where a cache needs
            one.
    """
    preset.check(config.channels)
    share = Share(seed % 2**64, batch_size, rank, world_size)
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": _unchanged,
        "generator": _own_generator(),
        "worker_init_fn": _survive_signals,
    }
    needed = batch_size * world_size
    if source.num_rows is not None and source.num_rows < needed:
        raise UserError(
            f"batch_size: expected at most {source.num_rows} (the images in {source.description}), "
            f"got {needed}"
        )
    if source.streaming:
        return _stream_loader(source, preset, config, share, start_batch, position, options)
    return _map_loader(source, preset, config, share, start_batch, torch.device(device), options)


def holds_small_images(source: Source, config: DataConfig) -> bool:
    """Return whether all tested images (of a stream, the first images) are small and of one size."""
    key = ("small", config.channels)
    if key not in source.stores:
        if source.streaming:
            first = ShardedRows(source, config.open_shards).first
            places = [f"{source.description} shard 0 row {row}" for row in range(len(first))]
            source.stores[key] = probe_images(first, places, config.channels, source.description).small
        else:
            source.stores[key] = probe(source, config.channels).small
    return source.stores[key]


def _map_loader(
    source: Source,
    preset: ViewPreset,
    config: DataConfig,
    share: Share,
    start_batch: int,
    device: torch.device,
    options: dict[str, Any],
) -> "MapLoader":
    small = probe(source, config.channels).small
    decoded = decoded_rows(source, config.channels, config.cache, shared=share.world_size > 1)
    rows: Rows = EncodedRows(source, config.channels) if decoded is None else decoded
    held = None
    if decoded is not None and config.cache == "device":
        rows, held = NumberedRows(decoded), _on_device(source, decoded, device)
    options["batch_sampler"] = RowBatches(len(rows), share, start_batch)
    options["persistent_workers"] = options["num_workers"] > 0
    return MapLoader(MapBatches(rows, preset, share.seed, small), held, **options)


def _on_device(source: Source, decoded: DecodedRows, device: torch.device) -> Tensor:
    """All images (N, C, H, W) on the device, once for all loaders of a source."""
    key = ("held", device)
    if key not in source.stores:
        source.stores[key] = torch.from_numpy(decoded.pixels).to(device)
    return source.stores[key]


class MapLoader(DataLoader[LoadedBatch]):
    """A loader that can be told which pass it is in (transformers' Trainer does, on resuming).

    Args:
        held: all images, where they lie on the model's device and batches say only which.
    """

    def __init__(self, batches: MapBatches, held: Tensor | None, **options: Any) -> None:
        super().__init__(batches, **options)
        self.held = held

    def __iter__(self) -> Iterator[LoadedBatch]:  # type: ignore[override]
        for batch in map(delivered, super().__iter__()):
            if isinstance(batch.images, HeldRows):
                batch = replace(batch, images=replace(batch.images, pixels=self.held))
            yield batch

    def close(self) -> None:
        """Stop the workers (see `hf_ssl.data.stream_loader.end_workers`)."""
        end_workers(self._iterator)
        self._iterator = None

    def set_epoch(self, epoch: int) -> None:
        cast(RowBatches, self.batch_sampler).set_epoch(epoch)


def _stream_loader(
    source: Source,
    preset: ViewPreset,
    config: DataConfig,
    share: Share,
    start_batch: int,
    position: dict[str, Any] | None,
    options: dict[str, Any],
) -> StreamLoader:
    rows = ShardedRows(source, config.open_shards)
    readers = max(1, options["num_workers"])
    layout = Layout(
        revision=source.revision,
        seed=share.seed,
        rank=share.rank,
        world_size=share.world_size,
        workers=readers,
        shards=rows.count,
        groups=rows.groups(share.world_size * readers),
        window=config.shuffle_window,
        open_shards=config.open_shards,
    )
    if position is None and start_batch:
        logger.warning(
            "the stream starts at its beginning instead of after %d batches, because no position was saved",
            start_batch,
        )
    start = start_position(position, layout)
    batches = StreamBatches(rows, preset, share, config.channels, config.shuffle_window, start)
    length = None if source.num_rows is None else source.num_rows // (share.batch_size * share.world_size)
    return StreamLoader(batches, layout, length, **options)


def _unchanged(batch: LoadedBatch | Failure) -> LoadedBatch | Failure:
    return batch


def _survive_signals(worker: int) -> None:
    """Keep a worker alive after a signal that all processes of a job receive.

    A terminal sends Ctrl-C to the whole foreground group, and schedulers send SIGTERM to every process. The
    training process then finishes its step, for which it needs its workers. A worker exits at most 30 seconds
    after SIGTERM, and earlier if the training process has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # Windows has no SIGALRM and sends no SIGTERM
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def _own_generator() -> torch.Generator:
    """torch draws a seed for its workers, which nothing here uses, from the global generator or this one."""
    return torch.Generator().manual_seed(0)
