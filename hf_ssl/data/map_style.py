# SPDX-License-Identifier: Apache-2.0
"""Map-style training data: whole batches by row number."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_ssl.data.batch import Failure, HeldRows, LoadedBatch, assemble
from hf_ssl.data.broken import UnreadableData
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.ordering import RowBatch
from hf_ssl.data.store import DecodedRows, NumberedRows
from hf_ssl.random import image_seeds, random_index
from hf_ssl.views import ViewPreset

_ATTEMPTS = 100
Rows = EncodedRows | DecodedRows | NumberedRows


class MapBatches(Dataset[LoadedBatch]):
    """Reads the batches that `RowBatches` asks for; what comes out is a pure function of the seed and the
    rows.

    Args:
        rows: the images; or their numbers, for images that lie on the model's device.
        preset: the views.
        seed: of the run.
        small: whether images are small and of one size, so that they are cropped later.
    """

    def __init__(self, rows: Rows, preset: ViewPreset, seed: int, small: bool) -> None:
        self.rows = rows
        self.preset = preset
        self.seed = seed
        self.small = small

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, batch: RowBatch) -> LoadedBatch | Failure:
        """What torch's loader calls."""
        try:
            return self.read(batch)
        except UnreadableData as error:
            return Failure(str(error))

    def read(self, batch: RowBatch) -> LoadedBatch:
        """The batch, with a random other image in place of each that is broken.

        The views of a replacement are drawn for the row that it replaces, so that it differs from itself,
        should it be in the same batch. Its `sample_index` is its own.
        """
        rows = batch.rows.copy()
        images, broken = self.rows.read(rows)
        messages = list(broken.values())
        for position in broken:
            rows[position], image = self._another(batch, position, messages)
            images[position] = image
        given: list[Tensor] | Tensor | HeldRows = images
        if isinstance(self.rows, NumberedRows) and isinstance(images, Tensor):
            given = HeldRows(images, self.rows.size)
        seeds = image_seeds(self.seed, batch.pass_number, batch.rows.astype(np.uint64))
        return assemble(
            given, seeds, self.preset, small=self.small, sample_index=torch.from_numpy(rows), broken=messages
        )

    def _another(self, batch: RowBatch, position: int, messages: list[str]) -> tuple[int, Tensor]:
        for attempt in range(_ATTEMPTS):
            row = random_index(
                len(self.rows), self.seed, batch.pass_number, int(batch.rows[position]), attempt
            )
            images, broken = self.rows.read(np.array([row]))
            if not broken:
                return row, images[0]
            messages.extend(broken.values())
        raise UnreadableData(
            f"{_ATTEMPTS} images of {self.rows.description} were tried one after the other and none can be "
            f"read; the last "
            f"one is {messages[-1]}"
        )
