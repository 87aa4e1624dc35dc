# SPDX-License-Identifier: Apache-2.0
"""Resumes a run in the middle of an epoch: our loaders start at the batch where the run stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer


def already_there(loader: Any, num_batches: int = 0) -> Any:
    """Return the loader unchanged; it starts after the batches of the earlier part of the run."""
    return loader


@contextmanager
def loader_that_skips_by_itself() -> Iterator[None]:
    """Make transformers' Trainer count the batches before the checkpoint without reading them.

    To resume, the Trainer (5.20 to 5.24) calls accelerate's `skip_first_batches`. That function builds a
    plain DataLoader from the data set and the batch sampler of our loader. The plain DataLoader does not hold
    the images of `data.cache=device`, and it reads a stream from the beginning. Our loaders already have a
    start position, so the replaced function returns the loader unchanged.

    `ignore_data_skip=True` would also avoid the call. But then the Trainer counts batches from the start of
    the epoch, and does not find the shorter accumulation at its end.
    """
    original = transformers.trainer.skip_first_batches
    transformers.trainer.skip_first_batches = already_there
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = original
