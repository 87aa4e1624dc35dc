# SPDX-License-Identifier: Apache-2.0
"""What a method remembers of earlier batches."""

from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import normalize


class Memory(nn.Module):
    """Persistent buffers that a method's steps move and no gradient does.

    transformers builds models without memory and fills in what a checkpoint holds; `initialize` writes what
    it does not hold, with the functions of `transformers.initialization`, which leave loaded tensors alone.
    """

    def initialize(self) -> None:
        """Write the state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it begins")


class Counter(Memory):
    """A number that only grows, kept on the host and in a checkpoint."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self._count: int | None = None

    def initialize(self) -> None:
        """Nothing counted."""
        init.zeros_(self.count)

    @property
    def total(self) -> int:
        """`count` as a number; waits for the device at most once, after loading."""
        if self._count is None:
            self._count = int(self.count)
        return self._count

    @torch.no_grad()
    def increase(self, by: int = 1) -> None:
        """Count on."""
        self._count = self.total + by
        self.count.fill_(self._count)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None


class Queue(Counter):
    """The last `size` rows that were put in, unit vectors at random before that.

    Processes agree on it because gathered rows are put in. The host counts along, so that no step waits for
    the device.

    Attributes:
        rows: (size, D). The counter says how many rows were ever put in; the next one goes to `count % size`.
    """

    rows: Tensor

    def __init__(self, size: int, dims: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.empty(size, dims))
        self.latest = 0
        """Rows that were put in at once the last time."""
        self.initialize()

    def initialize(self) -> None:
        """Random unit rows, and none of them counted."""
        init.copy_(self.rows, normalize(torch.randn(self.rows.shape, device=self.rows.device), dim=1))
        super().initialize()

    @property
    def is_full(self) -> bool:
        """Whether every row has been put in, so that none is random any more."""
        return self.total >= self.size

    @torch.no_grad()
    def enqueue(self, rows_ND: Tensor) -> None:
        """Put rows (N, D) in the place of the oldest; of more than `size` rows the last ones."""
        self.latest = len(rows_ND)
        position = (self.total + max(0, self.latest - self.size)) % self.size
        kept = rows_ND[-self.size :].to(self.rows.dtype)
        first = min(len(kept), self.size - position)
        self.rows[position : position + first] = kept[:first]
        self.rows[: len(kept) - first] = kept[first:]
        self.increase(self.latest)


class Center(Memory):
    """A mean of outputs that moves with the batches.

    Attributes:
        mean: (K,).
    """

    mean: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def initialize(self) -> None:
        """Zero."""
        init.zeros_(self.mean)


class Bank(Memory):
    """A place for each image of the training data.

    Attributes:
        rows: (V, N, D), the last embedding of each of V views.
        seen: (N,), whether the image was ever put in.
        labels: (H, N) int64, what each of H heads says of the image; -100, which losses ignore, where nothing
            is known.
    """

    rows: Tensor
    seen: Tensor
    labels: Tensor

    def __init__(self, size: int, views: int, dims: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(views, size, dims))
        self.register_buffer("seen", torch.empty(size, dtype=torch.bool))
        self.register_buffer("labels", torch.empty(labels, size, dtype=torch.int64))
        self.initialize()

    def initialize(self) -> None:
        """Nothing seen, nothing known."""
        init.zeros_(self.rows)
        init.zeros_(self.seen)
        init.constant_(self.labels, -100)

    @torch.no_grad()
    def store(self, index_B: Tensor, rows_BVD: Tensor) -> None:
        """Put the embeddings of images (B,) into their places."""
        self.rows[:, index_B] = rows_BVD.transpose(0, 1).to(self.rows.dtype)
        self.seen[index_B] = True
