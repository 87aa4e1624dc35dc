# SPDX-License-Identifier: Apache-2.0
"""Images with labels, for evaluation and the monitor."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_ssl.data.broken import BrokenCounter
from hf_ssl.data.columns import label_values
from hf_ssl.data.config import DataConfig
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.ordering import permutation
from hf_ssl.data.sources import Source, open_source
from hf_ssl.data.store import DecodedRows, decoded_rows
from hf_ssl.errors import UserError

_CHUNK = 256


class LabelledImages:
    """Labelled images in a fixed order, decoded when they are asked for.

    Images that cannot be read are left out of `iter_batches` and of `labels` alike. Which ones these are is
    known once all have been decoded, so ask for `labels` after iterating: asked before, it decodes everything
    once to find out.

    Attributes:
        class_names: by label.
        revision: the commit on the Hub, else a fingerprint of the data.
        description: path and split.
        broken: "where: reason" for each image found broken so far.
    """

    def __init__(
        self,
        source: Source,
        rows: EncodedRows | DecodedRows,
        labels: np.ndarray,
        class_names: list[str],
        max_broken_fraction: float,
    ) -> None:
        self.class_names = class_names
        self.revision = source.revision
        self.description = source.description
        self._rows = rows
        self._labels = labels
        self._broken: dict[int, str] = {}
        self._complete = False
        self._counter = BrokenCounter(max_broken_fraction, len(labels))

    def __len__(self) -> int:
        """Images that were not found broken so far."""
        return len(self._labels) - len(self._broken)

    def __getitem__(self, index: int) -> Tensor:
        """(C, H, W) uint8: the image that belongs to `labels[index]`."""
        images, _ = self._rows.read(self._good()[[index]])
        return images[0]

    @property
    def broken(self) -> list[str]:
        return list(self._broken.values())

    @property
    def labels(self) -> Tensor:
        """(N,) int64, of the images that can be read."""
        return torch.from_numpy(self._labels[self._good()])

    def iter_batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """All images, in lists of `batch_size` (C, H, W) uint8 tensors; the last list may be shorter.

        Raises:
            UserError: too many of them cannot be read.
        """
        waiting: list[Tensor] = []
        for start in range(0, len(self._labels), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(self._labels)))
            images, broken = self._rows.read(rows)
            if not self._complete:
                self._broken.update({start + position: text for position, text in broken.items()})
                self._counter.count(len(rows) - len(broken), list(broken.values()))
            waiting += [image for position, image in enumerate(images) if position not in broken]
            while len(waiting) >= batch_size:
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]
        self._complete = True
        if waiting:
            yield waiting

    def _good(self) -> np.ndarray:
        if not self._complete:
            for _ in self.iter_batches(_CHUNK):
                pass
        return np.setdiff1d(np.arange(len(self._labels)), list(self._broken))


def labelled_images(
    config: DataConfig, split: str, *, max_images: int | None = None, seed: int = 0
) -> LabelledImages:
    """Opens the images of a split with their labels.

    Args:
        config: says where they are; `cache`, `channels` and `label_column` count too.
        split: which.
        max_images: at most so many, chosen at random, equally many of each class as far as there are.
        seed: of that choice.

    Raises:
        UserError: as `open_source`; no label column, several, or a split without labels.
    """
    source = open_source(replace(config, max_images=None, streaming=False), split, labels=True)
    labels, class_names = label_values(cast(Dataset, source.dataset), cast(str, source.label_column))
    chosen = np.flatnonzero(labels >= 0)
    if not len(chosen):
        raise UserError(
            f"column {source.label_column!r} of {source.description} holds no labels: choose another split"
        )
    if max_images is not None and max_images < len(chosen):
        chosen = _balanced(labels, chosen, max_images, seed)
    if len(chosen) < len(labels):
        source = source.choose(chosen)
    decoded = decoded_rows(source, config.channels, config.cache)
    rows = EncodedRows(source, config.channels) if decoded is None else decoded
    return LabelledImages(source, rows, labels[chosen], class_names, config.max_broken_fraction)


def _balanced(labels: np.ndarray, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the rows, in ascending order: one of each class, then a second of each, ..., at random."""
    shuffled = rows[permutation(len(rows), seed)]
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sorted_labels = labels[by_class]
    starts = np.searchsorted(sorted_labels, sorted_labels)
    turn = np.arange(len(by_class)) - starts
    return np.sort(by_class[np.argsort(turn, kind="stable")[:count]])
