# SPDX-License-Identifier: Apache-2.0
"""Resuming in the middle of an epoch: our loaders start where the run stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer


def already_there(loader: Any, num_batches: int = 0) -> Any:
    """Return a loader of ours, which starts behind the batches that were used before."""
    return loader


@contextmanager
def loader_that_skips_by_itself() -> Iterator[None]:
    """Let transformers' Trainer count the batches before the checkpoint without reading them.

    To resume, the Trainer (5.20 to 5.24) calls accelerate's `skip_first_batches`, which builds a plain
    DataLoader around the data set and the batch sampler of ours. That one does not hold the images of
    `data.cache=device`, and reads a stream from its beginning. Our loaders are made with their start
    position, so here the call returns the loader as it is. (`ignore_data_skip=True` would avoid the call,
    too, but then the Trainer counts from the start of the epoch and misses the last, shorter accumulation.)
    """
    original = transformers.trainer.skip_first_batches
    transformers.trainer.skip_first_batches = already_there
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = original
