# SPDX-License-Identifier: Apache-2.0
"""Divides the extraction of features among processes. Each process then holds all features (layer 1)."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from hf_ssl.data import LabeledImages
from hf_ssl.errors import UserError
from hf_ssl.evaluation.inputs import LabeledData
from hf_ssl.modeling.gather import from_every_process, join_rows, own_share, work_is_shared


def extract_together(
    extract: Callable[[Iterable[list[Tensor]]], dict[str, Tensor]],
    images: LabeledData,
    batch_size: int,
    names: list[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the features (N, ...) of all images by name, on every process.

    If the processes share the work (`joined_processes`), each one reads and encodes consecutive batches.
    Without broken images, the batches and the features are exactly those of a single process. A process
    without images waits for the others.

    Args:
        extract: returns the features of batches of images by name. It raises UserError if there is no batch.
        images: the N images.
        batch_size: images in a batch.
        names: names of the features.
        device: device of this process.

    Raises:
        UserError: too many images are broken, or `extract` raises this error on any process.
    """
    if not work_is_shared():
        return extract(images.iter_batches(batch_size))
    broken: dict[int, str] = {}
    batches = _own_batches(images, batch_size, broken)
    found: dict[str, Tensor] = {}
    problem = None
    try:
        first = next((batch for batch in batches if batch), None)
        if first is not None:
            found = extract(chain([first], batches))
    except UserError as error:
        problem = str(error)
    of_all = from_every_process((broken, problem, bool(found)))
    for _, problem, _ in of_all:
        if problem is not None:
            raise UserError(problem)
    if isinstance(images, LabeledImages):
        images.omit_broken({row: text for each, *_ in of_all for row, text in each.items()})
    if not any(has_images for *_, has_images in of_all):
        raise UserError("images: expected at least one, got no image")
    return {name: join_rows(found.get(name), device) for name in names}


def _own_batches(images: LabeledData, batch_size: int, broken: dict[int, str]) -> Iterator[list[Tensor]]:
    """Yield the batches of this process. Only `LabeledImages` can skip the other batches without reading."""
    if not isinstance(images, LabeledImages):
        share = own_share(-(-len(images) // batch_size))
        yield from islice(images.iter_batches(batch_size), share.start, share.stop)
        return
    rows = len(images) + len(images.broken_rows)
    share = own_share(-(-rows // batch_size))
    own = range(share.start * batch_size, min(rows, share.stop * batch_size))
    yield from images.iter_rows(own, batch_size, broken)
