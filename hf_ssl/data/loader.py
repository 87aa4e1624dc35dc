# SPDX-License-Identifier: Apache-2.0
"""The loader of training data, and the batches of map-style data: the order of rows, and their images."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_ssl.data.batch import (
    DeviceRows,
    LoadedBatch,
    ProcessShare,
    UnreadableData,
    WorkerFailure,
    batch_or_error,
    is_small,
    make_batch,
)
from hf_ssl.data.config import DataConfig
from hf_ssl.data.decoded import DecodedRows, RowNumbers, decoded_rows
from hf_ssl.data.further_columns import mirrored_channels
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.inspection import common_size
from hf_ssl.data.sources import Source
from hf_ssl.data.stream import StreamShards
from hf_ssl.data.stream_loader import first_images_are_small, make_stream_loader, stop_workers
from hf_ssl.errors import UserError
from hf_ssl.random import image_seeds, permutation, random_index
from hf_ssl.views import ViewPreset

_ATTEMPTS = 100
Rows: TypeAlias = EncodedRows | DecodedRows | RowNumbers


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
    prefetch_factor: int | None = None,
    start_method: str | None = None,
    device: torch.device | str = "cpu",
    has_all_rows: bool = False,
    label_column: str | None = None,
) -> "DataLoader[LoadedBatch]":
    """Return the training loader of one process.

    The loader shuffles, divides the data between processes, and seeds by itself. Do not pass it to
    `accelerator.prepare`.

    For map-style data, each `iter(loader)` is one epoch of `len(loader)` batches, and the next `iter` is the
    next epoch. Batch b of a run is a pure function of the seed and b. To resume after b micro-batches, start
    with `start_batch=b`; the first `iter` then yields the rest of the epoch.

    A stream has no end, and each `iter(loader)` continues where the last one stopped. The loader has a length
    only if the number of rows is known. One `iter` is then about one epoch. To resume, pass the `position` of
    the last batch that was used.

    Args:
        source: the data, from `open_source`.
        preset: the views to make.
        config: how to read the data (`channels`, `cache`, `shuffle_window`, `open_shards`).
        seed: seed of the run.
        batch_size: number of images in a micro-batch of this process.
        rank: number of this process.
        world_size: number of processes.
        start_batch: number of earlier micro-batches of this process; 0 for that of `position`.
        position: position in a stream.
        num_workers: number of worker processes. It has no effect on the batches of map-style data, and
            changes the order of a stream.
        pin_memory: whether to pin the memory of batches, so that copies to an accelerator do not block.
        prefetch_factor: batches that each worker prepares in advance; None for torch's default.
        start_method: how worker processes start, "fork", "spawn" or "forkserver"; None for torch's default.
        device: the device of the model, which stores the images for `data.cache=device`.
        has_all_rows: whether each epoch has all rows of map-style data, see `RowBatchSampler`.
        label_column: the column of classes whose values the batches of a stream contain; None: no labels. It
            has no effect on map-style data, whose batches contain row numbers.

    Raises:
        UserError: there are fewer images than a batch, no image can be read, or the sizes of images differ
            although the cache needs one size.
    """
    preset.check(config.channels)
    share = ProcessShare(seed % 2**64, batch_size, rank, world_size)
    options: dict[str, Any] = {
        **worker_options(num_workers, pin_memory),
        "prefetch_factor": prefetch_factor if num_workers else None,
        "multiprocessing_context": start_method if num_workers else None,
    }
    if not holds_batch(source, share):
        raise too_few_images(source, batch_size * world_size, "a smaller one")
    if source.streaming:
        return make_stream_loader(source, preset, config, share, start_batch, position, options, label_column)
    sampler = partial(RowBatchSampler, share=share, start=start_batch, has_all_rows=has_all_rows)
    return _map_loader(source, preset, config, share, sampler, torch.device(device), options)


def worker_options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """Return the arguments of all loaders of training images, whose data set returns complete batches."""
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "collate_fn": _unchanged,
        # Without it, torch draws a seed for workers from the global generator and changes its state. hf_ssl
        # does not use that seed.
        "generator": torch.Generator().manual_seed(0),
        "worker_init_fn": _ignore_signals,
    }


def holds_batch(source: Source, share: ProcessShare) -> bool:
    """Return whether the data hold a batch of all processes, or have an unknown length."""
    return source.num_rows is None or share.batches(source.num_rows) > 0


def too_few_images(source: Source, batch_size: int, advice: str) -> UserError:
    """Return the error for data with fewer images than a batch."""
    return UserError(
        f"training.batch_size: expected at most {source.num_rows} (the images in {source.description}), got "
        f"{batch_size}; use {advice}"
    )


def holds_small_images(source: Source, config: DataConfig) -> bool:
    """Return whether the inspected images (of a stream, the first images) are small and of one size."""
    if not source.streaming:
        return is_small(common_size(source, config.channels))
    key = ("small", config.channels)
    if key not in source.cache:
        shards = StreamShards(source, config.open_shards)
        source.cache[key] = first_images_are_small(shards, config.channels)
    return source.cache[key]


def _map_loader(
    source: Source,
    preset: ViewPreset,
    config: DataConfig,
    share: ProcessShare,
    sampler: Callable[[int], "RowBatchSampler"],
    device: torch.device,
    options: dict[str, Any],
) -> "MapLoader":
    small = is_small(common_size(source, config.channels))
    decoded = decoded_rows(source, config.channels, config.cache, shared=share.world_size > 1)
    rows: Rows = EncodedRows(source, config.channels) if decoded is None else decoded
    device_images = None
    if decoded is not None and config.cache == "device":
        rows, device_images = RowNumbers(decoded), _copy_to_device(source, decoded, device)
    mirrored = mirrored_channels(source.further_columns, config.channels)
    options["batch_sampler"] = sampler(len(rows))
    options["persistent_workers"] = options["num_workers"] > 0
    return MapLoader(MapBatchDataset(rows, preset, share.seed, small, mirrored), device_images, **options)


def _copy_to_device(source: Source, decoded: DecodedRows, device: torch.device) -> Tensor:
    """Return all images (N, C, H, W) on the device. All loaders of a source share this tensor."""
    key = ("device", device)
    if key not in source.cache:
        source.cache[key] = torch.from_numpy(decoded.pixels).to(device)
    return source.cache[key]


class MapLoader(DataLoader[LoadedBatch]):
    """A loader of map-style data.

    Args:
        batches: the data set of batches.
        device_images: (N, C, H, W) uint8, all images on the device of the model; None if the batches contain
            the pixels.
        options: further arguments of torch's DataLoader.
    """

    def __init__(self, batches: "MapBatchDataset", device_images: Tensor | None, **options: Any) -> None:
        super().__init__(batches, **options)
        self.device_images = device_images

    def __iter__(self) -> Iterator[LoadedBatch]:  # type: ignore[override]
        for batch in map(batch_or_error, super().__iter__()):
            if isinstance(batch.images, DeviceRows):
                batch = replace(batch, images=replace(batch.images, pixels=self.device_images))
            yield batch

    def close(self) -> None:
        """Stop the workers (see `hf_ssl.data.stream_loader.stop_workers`)."""
        stop_workers(self._iterator)
        self._iterator = None


class RowBatch(NamedTuple):
    """The rows of one micro-batch of one process.

    Attributes:
        epoch: number of the epoch, from 0.
        rows: (B,) int64 row numbers.
    """

    epoch: int
    rows: np.ndarray


class RowBatchSampler(Sampler[RowBatch]):
    """A batch sampler of shuffled rows. Each `iter()` yields the batches of the next epoch.

    Batch b of all processes together belongs to epoch b // len(self). It is a slice of the permutation of
    this epoch. Process r takes part r of it, so that two processes with half the batch read the rows of one
    process. The epoch omits rows that do not fill a batch. With `has_all_rows`, they form a further batch
    together with the last rows of the batch before, so that all batches have the same size.

    Args:
        num_rows: number of rows of the data.
        share: the part of this process.
        start: number of earlier micro-batches. The first `iter()` yields the rest of the epoch.
        has_all_rows: whether an epoch has all rows.
    """

    def __init__(
        self, num_rows: int, share: ProcessShare, start: int = 0, has_all_rows: bool = False
    ) -> None:
        self.num_rows = num_rows
        self.share = share
        self.count = share.batches(num_rows)
        if has_all_rows and self.count * share.images < num_rows:
            self.count += 1
        self.next_batch = start

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RowBatch]:
        # This generator starts when its first batch is read. torch calls `iter` more often than it reads.
        start = self.next_batch
        epoch = start // len(self)
        self.next_batch = (epoch + 1) * len(self)  # an interrupted iteration is not continued
        order, batch_size = permutation(self.num_rows, self.share.seed, epoch), self.share.batch_size
        for number in range(start, (epoch + 1) * len(self)):
            first = min(number % len(self) * self.share.images, self.num_rows - self.share.images)
            first += self.share.rank * batch_size
            yield RowBatch(epoch, order[first : first + batch_size])


class MapBatchDataset(Dataset[LoadedBatch]):
    """Reads the batches that `RowBatchSampler` yields. A batch is a pure function of the seed and the rows.

    Args:
        rows: the images; or their row numbers, for images on the device of the model.
        preset: the views.
        seed: seed of the run.
        small: whether the images are small and of one size, so that they are cropped on the device.
        mirrored: channels whose values a horizontal flip reverses.
    """

    def __init__(
        self, rows: Rows, preset: ViewPreset, seed: int, small: bool, mirrored: tuple[int, ...] = ()
    ) -> None:
        self.rows = rows
        self.preset = preset
        self.seed = seed
        self.small = small
        self.mirrored = mirrored

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, batch: RowBatch) -> LoadedBatch | WorkerFailure:
        """Return a batch, or the reason why there is none. torch's DataLoader calls this method."""
        try:
            return self.read(batch)
        except UnreadableData as error:
            return WorkerFailure(str(error))

    def read(self, batch: RowBatch) -> LoadedBatch:
        """Return the batch, in which a random other image replaces each broken image.

        The views of a replacement are sampled with the seed of the broken row. If a batch contains an image
        twice, the views of both copies therefore differ. `sample_index` is the row number of the replacement.

        Raises:
            UnreadableData: there is no readable replacement.
        """
        rows = batch.rows.copy()
        images, broken = self.rows.read(rows)
        messages = list(broken.values())
        for position in broken:
            rows[position], image = self._replacement(batch, position, messages)
            images[position] = image
        given: list[Tensor] | Tensor | DeviceRows = images
        if isinstance(self.rows, RowNumbers) and isinstance(images, Tensor):
            given = DeviceRows(images, self.rows.size)
        seeds = image_seeds(self.seed, batch.epoch, batch.rows.astype(np.uint64))
        return make_batch(
            given,
            seeds,
            self.preset,
            small=self.small,
            sample_index=torch.from_numpy(rows),
            broken=messages,
            mirrored=self.mirrored,
        )

    def _replacement(self, batch: RowBatch, position: int, messages: list[str]) -> tuple[int, Tensor]:
        """Return the row number and the image that replace a broken image; append further messages."""
        for attempt in range(_ATTEMPTS):
            row = random_index(len(self.rows), self.seed, batch.epoch, int(batch.rows[position]), attempt)
            images, broken = self.rows.read(np.array([row]))
            if not broken:
                return row, images[0]
            messages.extend(broken.values())
        raise UnreadableData(
            f"data.path: expected readable images in {self.rows.description}, got {_ATTEMPTS} broken ones in "
            f"succession, the last one in {messages[-1]}; check the files"
        )


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Keep a worker alive after a signal that all processes of a job receive.

    A terminal sends Ctrl-C to the whole foreground group, and schedulers send SIGTERM to every process. The
    training process then finishes its step, for which it needs its workers. A worker exits at most 30 seconds
    after SIGTERM, and earlier if the training process has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # Windows has no SIGALRM and sends no SIGTERM
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
