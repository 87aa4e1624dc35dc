# SPDX-License-Identifier: Apache-2.0
"""State that a method keeps between batches: counter, queue, center, memory bank; k-means of its rows."""

import math
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from hf_ssl.modeling.gather import own_share, sum_over_processes


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
        self._value, self._is_current = value, True

    @property
    def value(self) -> float:
        """Return the number; after `invalidate`, read the buffer once.

        The Python number has more digits than a buffer in float32, so it stays if both agree.
        """
        if not self._is_current:
            stored, self._is_current = self._module.get_buffer(self._name).item(), True
            if not math.isclose(self._value, stored, rel_tol=1e-6):
                self._value = stored
        return self._value

    @torch.no_grad()
    def write(self, value: float) -> None:
        """Write a new value to both copies."""
        self._value, self._is_current = value, True
        self._module.get_buffer(self._name).fill_(value)

    def initialize(self, value: float) -> None:
        """Write the first value to the buffer, unless a checkpoint has filled it."""
        init.constant_(self._module.get_buffer(self._name), value)

    def invalidate(self) -> None:
        """Mark the Python number as outdated, for example after loading. The next access reads the buffer."""
        self._is_current = False


class PersistentBuffers(nn.Module):
    """Base class of persistent buffers that training steps update without gradient.

    transformers creates models on the meta device and loads the tensors of a checkpoint. `initialize` writes
    the tensors that the checkpoint lacks. It uses `transformers.initialization`, which does not change loaded
    tensors.
    """

    def initialize(self) -> None:
        """Write the state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} defines no initialize")


class DeferredMemory(PersistentBuffers):
    """Base class of memory that changes only after the backward pass, because the backward pass reads it.

    `update_memory` of a method keeps new values in it, and `SSLPreTrainedModel.write_memory` calls `write`.
    """

    def write(self) -> None:
        """Write the values that were kept, if any."""
        raise NotImplementedError(f"{type(self).__name__} defines no write")

    def discard(self) -> None:
        """Delete the values that were kept, because the step was aborted."""
        raise NotImplementedError(f"{type(self).__name__} defines no discard")


class Counter(PersistentBuffers):
    """A count that only increases. Checkpoints contain it, and the host also stores it (`HostNumber`)."""

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


class ImageRows(PersistentBuffers):
    """One or several rows for each image of the training data.

    Attributes:
        rows: (..., N, D), N images.
    """

    rows: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(shape, dtype=dtype))

    @torch.no_grad()
    def replace_rows(self, index_B: Tensor, rows: Tensor) -> None:
        """Overwrite the rows of images with row numbers (B,) by `rows` (..., B, D).

        If an image occurs several times, the last one counts. On a GPU, torch alone does not define this.
        """
        numbers, order = index_B.sort(stable=True)
        last = order[torch.searchsorted(numbers, index_B, right=True) - 1]
        self.rows[..., index_B, :] = rows[..., last, :].to(self.rows.dtype)


class ClusteredRows(ImageRows):
    """The memory bank of a method that clusters it.

    Attributes:
        rows: (V, N, D), the last embedding of each of V views.
        seen: (N,) bool, whether the image was ever stored.
        labels: (H, N) int64, the pseudo-label of the image for each of H heads; -100, which losses ignore, if
            there is none.
    """

    seen: Tensor
    labels: Tensor

    def __init__(self, size: int, views: int, dims: int, labels: int) -> None:
        super().__init__(views, size, dims)
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
        self.replace_rows(index_B, rows_BVD.transpose(0, 1))
        self.seen[index_B] = True


_KMEANS_ROWS = 16384
"""Rows that are compared with the centroids at a time: 16,384 x 3000 float32 scores are 188 MiB."""


@torch.no_grad()
def spherical_kmeans(
    rows_ND: Tensor, clusters: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cluster unit vectors by cosine and return the centroids and the cluster of each row.

    The first centroids are rows sampled without replacement. An empty cluster moves to the row that is
    farthest from its own centroid; several empty clusters move to different rows. Every process has all rows
    and the same generator. Each process compares its share of the rows with the centroids. All processes then
    combine their results.

    Args:
        rows_ND: unit vectors, N >= `clusters`.
        clusters: number of clusters K.
        iterations: assignment and averaging steps. Rows are assigned once more at the end.
        generator: on the CPU, for the first centroids.

    Returns:
        Unit centroids (K, D) and the cluster (N,) of each row.

    Raises:
        ValueError: there are fewer rows than clusters.

    Source: facebookresearch/swav, main_deepclusterv2.py (`cluster_memory`). There an empty cluster does not
    move.
    """
    if len(rows_ND) < clusters:
        raise ValueError(
            f"spherical_kmeans.rows_ND: expected at least {clusters} rows, one per cluster, "
            f"got {len(rows_ND)}"
        )
    first = torch.randperm(len(rows_ND), generator=generator)[:clusters].to(rows_ND.device)
    centroids_KD = rows_ND[first].clone()
    for _ in range(iterations):
        cosine_N, cluster_N = _nearest(rows_ND, centroids_KD)
        sums_KD, counts_K = _sums(rows_ND, cluster_N, clusters)
        empty_K = counts_K == 0
        # There are as many candidates as clusters, so that the host need not know the number of empty ones.
        farthest_K = cosine_N.topk(clusters, largest=False).indices
        rank_K = (empty_K.cumsum(0) - 1).clamp_min(0)
        sums_KD = torch.where(empty_K[:, None], rows_ND[farthest_K[rank_K]], sums_KD)
        centroids_KD = normalize(sums_KD, dim=1)
    return centroids_KD, _nearest(rows_ND, centroids_KD)[1]


def _nearest(rows_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine with the nearest centroid and the index of this centroid, (N,) each."""
    share = own_share(len(rows_ND))
    found = [(part @ centroids_KD.T).max(dim=1) for part in rows_ND[share].split(_KMEANS_ROWS)]
    cosine_N = rows_ND.new_zeros(len(rows_ND))
    cluster_N = torch.zeros_like(cosine_N, dtype=torch.int64)
    cosine_N[share] = torch.cat([f.values for f in found])
    cluster_N[share] = torch.cat([f.indices for f in found])
    return sum_over_processes(cosine_N), sum_over_processes(cluster_N)


def _sums(rows_ND: Tensor, cluster_N: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sum (clusters, D) and the number (clusters,) of the rows of each cluster.

    The sum is a matrix product, because `index_add_` has no fixed order on a GPU.
    """
    share = own_share(len(rows_ND))
    sums_KD = rows_ND.new_zeros(clusters, rows_ND.shape[1])
    for rows, numbers in zip(
        rows_ND[share].split(_KMEANS_ROWS), cluster_N[share].split(_KMEANS_ROWS), strict=True
    ):
        sums_KD += one_hot(numbers, clusters).to(rows.dtype).T @ rows
    return sum_over_processes(sums_KD), torch.bincount(cluster_N, minlength=clusters)
