# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means, distributed over processes."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hf_ssl.modeling.gather import own_share, sum_over_processes

_ROWS = 16384
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
    found = [(part @ centroids_KD.T).max(dim=1) for part in rows_ND[share].split(_ROWS)]
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
    for rows, numbers in zip(rows_ND[share].split(_ROWS), cluster_N[share].split(_ROWS), strict=True):
        sums_KD += one_hot(numbers, clusters).to(rows.dtype).T @ rows
    return sum_over_processes(sums_KD), torch.bincount(cluster_N, minlength=clusters)
