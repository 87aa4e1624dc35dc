# SPDX-License-Identifier: Apache-2.0
"""The memory bank of CMC and PIRL, the constants of its NCE loss, and the base class of methods with one.

Legend: N rows of the bank (images of the training data), B images of a batch, D dimensions, K negatives.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor
from torch.nn.functional import normalize

from hf_ssl.errors import UserError
from hf_ssl.losses import memory_nce_constant
from hf_ssl.losses.upcasting import upcast
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import BankConfig
from hf_ssl.modeling.gather import gather, process_count, sum_over_processes
from hf_ssl.modeling.memory import Counter, DeferredMemory, ImageRows
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.random import FIRST_METHOD_NUMBER, draw_indices, image_seeds, uniforms

_ROWS_AT_ONCE = 2**14  # 2**14 rows of 128 random numbers are 16 MiB
_FIRST_BANK_EPOCH = 2**32  # takes the place of the epoch in the seeds of random rows
_NUMBERS_PER_DRAW = 2**32  # distance of two draws in the stream of an image


class MemoryBank(ImageRows, DeferredMemory):
    """A memory bank: one row for each image of the training data, a moving average of its embeddings.

    All processes hold the same bank, because they write gathered embeddings.

    The backward pass of `memory_scores` reads the rows again. So `update` only keeps the new embeddings, and
    `write` changes the rows after the backward pass.

    Args:
        size: number of images N.
        dims: width of the rows D.
        momentum: share of the old row in the new one (CMC, InsDis, VISSL and PyContrast: 0.5).
        start: the rows before the first step. "unit" is random unit vectors (VISSL, PyContrast). "uniform" is
            random numbers from -sqrt(3 / D) to sqrt(3 / D), whose rows have length 1 only on average (CMC).
            "images" is zeros: the first embedding of an image becomes its row. The row of an image that
            cannot be read stays zero.
        precision: precision of the rows: "float32", "bfloat16" or "float16".
        seed: seed of the run, on which the random rows before the first step depend.
        number: number of the bank in its model. Two banks with different numbers start with different rows.

    Attributes:
        rows: (N, D).
    """

    def __init__(
        self,
        size: int,
        dims: int,
        *,
        momentum: float = 0.5,
        start: str = "unit",
        precision: str = "float32",
        seed: int = 0,
        number: int = 0,
    ) -> None:
        super().__init__(size, dims, dtype=getattr(torch, precision))
        self.momentum, self.start, self.seed, self.number = momentum, start, seed, number
        self._new: tuple[Tensor, Tensor] | None = None
        self.initialize()

    def initialize(self) -> None:
        """Write the first rows. A random row is a function of `seed`, `number` and its row number."""
        if not self.rows.is_meta:
            rows = _first_rows(self.rows.shape, self.start, self.seed, self.number)
            init.copy_(self.rows, rows.to(self.rows))

    def draw(self, seeds_B: Tensor, count: int, number: int = 0) -> Tensor:
        """Return the row numbers (B, count) of random negatives, sampled with replacement from all N rows.

        They may contain the image's own row, as in the authors' code. They depend only on the seed of the
        image and on `number`. So they are equal for any number of processes and micro-batches.

        Args:
            seeds_B: (B,) int64, `draw_seeds` of the images.
            count: number of negatives K.
            number: number of the draw, for losses with several independent draws for each image.
        """
        first = FIRST_METHOD_NUMBER + number * _NUMBERS_PER_DRAW
        return draw_indices(seeds_B, first, count, len(self.rows))

    def update(self, index_B: Tensor, embeddings_BD: Tensor) -> None:
        """Keep the embeddings of images with row numbers (B,) until `write` or `discard`."""
        self._new = index_B, embeddings_BD.detach()

    @torch.no_grad()
    def write(self) -> None:
        """Replace the rows of the kept images by `momentum * row + (1 - momentum) * embedding`, normalized.

        If an image was kept several times, the last embedding counts.
        """
        if self._new is not None:
            (index_B, new_BD), self._new = self._new, None
            mixed_BD = upcast(self.rows[index_B])
            mixed_BD = mixed_BD.lerp_(upcast(new_BD).to(mixed_BD), 1 - self.momentum)
            self.replace_rows(index_B, normalize(mixed_BD, dim=1))

    def discard(self) -> None:
        """Delete the kept embeddings of an aborted step."""
        self._new = None


class NCEConstants(Counter, DeferredMemory):
    """The constants Z of `memory_nce`. The first batch sets them, and then they never change.

    In the first step, each loss uses the constant of its own batch over all processes. After this step, the
    constants of all micro-batches together are kept.

    Args:
        count: number of constants. CMC has one for each pair of a view and a bank, and PIRL has one.
        temperature: divides the scores.

    Attributes:
        values: (count,), 0 before the first batch. The counter is 1 after it.
    """

    values: Tensor

    def __init__(self, count: int, temperature: float) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))
        self.temperature = temperature
        self._new: Tensor | None = None

    def initialize(self) -> None:
        """Write zeros."""
        super().initialize()
        init.zeros_(self.values)

    @property
    def are_set(self) -> bool:
        """Return whether a batch has set the constants."""
        return self.total > 0

    @torch.no_grad()
    def get(self, number: int, positive_B: Tensor, negative_BK: Tensor, num_rows: int) -> Tensor:
        """Return constant `number`. Before the first batch has set it, return the constant of these scores.

        Args:
            number: number of the constant.
            positive_B, negative_BK, num_rows: the arguments of `memory_nce`, of this process.
        """
        if self.are_set:
            return self.values[number]
        z = self._of(positive_B, negative_BK, num_rows)
        return sum_over_processes(z) / process_count() if self.training else z

    def update(self, *scores: tuple[Tensor, Tensor], num_rows: int) -> None:
        """Keep the constants of the first batch until `write` or `discard`.

        Args:
            scores: positive scores (B,) and negative scores (B, K) of all processes, for each constant.
            num_rows: number of rows of the bank.
        """
        if not self.are_set:
            self._new = torch.stack([self._of(*pair, num_rows) for pair in scores])

    def _of(self, positive_B: Tensor, negative_BK: Tensor, num_rows: int) -> Tensor:
        return memory_nce_constant(positive_B, negative_BK, num_rows=num_rows, temperature=self.temperature)

    @torch.no_grad()
    def write(self) -> None:
        """Set the constants, if they were kept."""
        if self._new is not None:
            self.values.copy_(self._new)
            self._new = None
            self.increase()

    def discard(self) -> None:
        """Delete the kept constants of an aborted step."""
        self._new = None


class MemoryBankModel(SSLPreTrainedModel):
    """A method that compares embeddings with random rows of a memory bank.

    The config is a `BankConfig`. `embed` also returns `image_keys`. The method defines `update_banks`.
    """

    minimum_views = 1
    warmup_has_all_rows = True
    needs_sample_index = True
    mask_inputs: ClassVar[tuple[str, ...]] = ("draw_seeds",)

    def __init__(self, config: BankConfig) -> None:
        if 0 < config.num_samples < config.negatives:
            raise UserError(
                f"method.negatives: expected at most {config.num_samples}, the number of images, got "
                f"{config.negatives}"
            )
        super().__init__(config)

    def make_bank(self, dims: int, number: int = 0) -> MemoryBank:
        """Return the memory bank that the config describes, and note whether it must be filled first.

        The random rows before the first step depend on torch's last seed. In a run, this is the seed of the
        run. The function does not change the state of torch's generator.

        Args:
            dims: width of the rows.
            number: number of the bank. Two banks of a model need different ones.
        """
        config: Any = self.config
        self.needs_memory_warmup = config.bank_start == "images"
        return MemoryBank(
            config.num_samples,
            dims,
            momentum=config.bank_momentum,
            start=config.bank_start,
            precision=config.bank_precision,
            seed=torch.initial_seed(),
            number=number,
        )

    def embed_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the embeddings that `update_banks` needs. Other parts of `embed` may be left out."""
        return self.embed(inputs)

    def update_banks(self, embeddings: dict[str, Tensor]) -> None:
        """Call `MemoryBank.update` with the embeddings of all processes."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_banks")

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the embeddings for the memory bank."""
        self.update_banks(embeddings)

    @torch.no_grad()
    def fill_memory(self, inputs: dict[str, Tensor]) -> None:
        """Write the embeddings of a batch to the memory bank. This function sets no constants of NCE.

        The first training batch sets them, because an unfilled bank has no scores.
        """
        embeddings = self.embed_images(inputs)
        self.update_banks({name: gather(tensor) for name, tensor in embeddings.items()})
        self.write_memory()

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the seeds (B,) int64 of random negatives."""
        return super().sample_masks(seeds) | {"draw_seeds": torch.from_numpy(seeds.view(np.int64))}

    def after_backward(self, progress: RunProgress) -> None:
        """Write the memory bank, which the backward pass has read."""
        super().after_backward(progress)
        self.write_memory()

    @staticmethod
    def image_keys(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the row numbers (B,) and the seeds (B,) of the images of a batch.

        Raises:
            ValueError: the inputs lack one of them.
        """
        for name, advice in (("sample_index", "them"), ("draw_seeds", "**sample_masks(seeds)")):
            if name not in inputs:
                raise ValueError(f"{name}: expected a number for each image, got none; pass {advice}")
        return {name: inputs[name] for name in ("sample_index", "draw_seeds")}


def _first_rows(shape: torch.Size, start: str, seed: int, number: int) -> Tensor:
    """Return rows (N, D) float32, see `MemoryBank`."""
    size, dims = shape
    if start == "images":
        return torch.zeros(shape)
    rows = np.empty((size, dims), np.float32)
    # No epoch has such a number, so no image has the same seed.
    seeds = image_seeds(seed, _FIRST_BANK_EPOCH + number, np.arange(size, dtype=np.uint64))
    half = -(-dims // 2)
    for begin in range(0, size, _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        if start == "uniform":
            rows[part] = (2 * uniforms(seeds[part], 0, dims) - 1) * math.sqrt(3 / dims)
            continue
        numbers = uniforms(seeds[part], 0, 2 * half)
        # Box-Muller. 1 - u is never 0.
        length, angle = np.sqrt(-2 * np.log1p(-numbers[:, :half])), 2 * np.pi * numbers[:, half:]
        normal = np.concatenate((length * np.cos(angle), length * np.sin(angle)), axis=1)[:, :dims]
        rows[part] = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return torch.from_numpy(rows)
