# SPDX-License-Identifier: Apache-2.0
"""State that a method keeps between batches: counter, queue, center, memory bank."""

from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import normalize


class HostNumber:
    """A number that is stored twice: as a persistent buffer and as a Python number.

    The buffer is for checkpoints. Computations use the Python number, because reading the buffer would wait
    for the device.

    Args:
        module: owner of the buffer.
        name: name of the buffer.
        value: value at the start.
    """

    def __init__(self, module: nn.Module, name: str, value: float) -> None:
        module.register_buffer(name, torch.tensor(value))
        self._module, self._name = module, name
        self._value: float | None = value

    @property
    def value(self) -> float:
        """Return the number; after `invalidate`, read the buffer once."""
        if self._value is None:
            self._value = self._module.get_buffer(self._name).item()
        return self._value

    @torch.no_grad()
    def write(self, value: float) -> None:
        """Write a new value to both copies."""
        self._value = value
        self._module.get_buffer(self._name).fill_(value)

    def initialize(self, value: float) -> None:
        """Write the first value to the buffer, unless a checkpoint has filled it."""
        init.constant_(self._module.get_buffer(self._name), value)

    def invalidate(self) -> None:
        """Mark the Python number as outdated, for example after loading. The next access reads the buffer."""
        self._value = None


class PersistentBuffers(nn.Module):
    """Base class of persistent buffers that training steps update without gradient.

    transformers creates models on the meta device and loads the tensors of a checkpoint. `initialize` writes
    the tensors that the checkpoint lacks. It uses `transformers.initialization`, which does not change loaded
    tensors.
    """

    def initialize(self) -> None:
        """Write the state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} defines no initialize")


class Counter(PersistentBuffers):
    """A count that only grows, known on the host and stored in checkpoints."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._number = HostNumber(self, "count", 0)
        self._number.invalidate()  # `from_pretrained` may replace the buffer

    def initialize(self) -> None:
        """Write zero."""
        self._number.initialize(0)

    @property
    def total(self) -> int:
        """Return the count; wait for the device at most once, after loading."""
        return int(self._number.value)

    def increase(self, by: int = 1) -> None:
        """Add `by` to the count."""
        self._number.write(self.total + by)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._number.invalidate()


class Queue(Counter):
    """A queue of the last `size` rows. It starts with random unit vectors.

    Gathered rows are enqueued, so all processes hold the same queue. The host also counts the rows, so that
    no step waits for the device.

    Attributes:
        rows: (size, D). The counter is the number of rows that were ever enqueued; the next row goes to
            position `count % size`.
        latest: number of rows in the last call of `enqueue`.
    """

    rows: Tensor

    def __init__(self, size: int, dims: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.empty(size, dims))
        self.latest = 0
        self.initialize()

    def initialize(self) -> None:
        """Write random unit rows and a count of zero."""
        init.copy_(self.rows, normalize(torch.randn(self.rows.shape, device=self.rows.device), dim=1))
        super().initialize()

    @property
    def is_full(self) -> bool:
        """Return whether no random row is left."""
        return self.total >= self.size

    @torch.no_grad()
    def enqueue(self, rows_ND: Tensor) -> None:
        """Overwrite the oldest rows with `rows_ND` (N, D). If N exceeds `size`, keep the last `size` rows."""
        self.latest = len(rows_ND)
        position = (self.total + max(0, self.latest - self.size)) % self.size
        kept = rows_ND[-self.size :].to(self.rows.dtype)
        first = min(len(kept), self.size - position)
        self.rows[position : position + first] = kept[:first]
        self.rows[: len(kept) - first] = kept[first:]
        self.increase(self.latest)


class Center(PersistentBuffers):
    """A moving average of outputs, for centering.

    Attributes:
        mean: (K,).
    """

    mean: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def initialize(self) -> None:
        """Write zeros."""
        init.zeros_(self.mean)


class MemoryBank(PersistentBuffers):
    """A memory bank with one entry for each image of the training data.

    Attributes:
        rows: (V, N, D), the last embedding of each of V views.
        seen: (N,) bool, whether the image was ever stored.
        labels: (H, N) int64, the pseudo-label of the image for each of H heads; -100, which losses ignore, if
            there is none.
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
        """Write an empty memory bank without labels."""
        init.zeros_(self.rows)
        init.zeros_(self.seen)
        init.constant_(self.labels, -100)

    @torch.no_grad()
    def store(self, index_B: Tensor, rows_BVD: Tensor) -> None:
        """Store the embeddings of images with row numbers (B,)."""
        self.rows[:, index_B] = rows_BVD.transpose(0, 1).to(self.rows.dtype)
        self.seen[index_B] = True
