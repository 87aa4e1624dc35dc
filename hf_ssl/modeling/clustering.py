# SPDX-License-Identifier: Apache-2.0
"""Spherical k-means, shared among processes."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from hf_ssl.modeling.gather import own_share, sum_over_processes

# Scores of so many rows exist at once: 16,384 x 3000 floats are 188 MiB.
_ROWS = 16384


@torch.no_grad()
def spherical_kmeans(
    rows_ND: Tensor, clusters: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cluster unit vectors by cosine.

    Centroids start as rows drawn without replacement. A cluster that no row is assigned to takes over the row
    that is farthest from its own centroid; of several empty ones each takes another row. Every process is
    given all rows and the same generator, compares its share of the rows with the centroids, and gets the
    same result.

    Args:
        rows_ND: unit vectors, N >= `clusters`.
        clusters: how many.
        iterations: of assigning and averaging; rows are assigned once more at the end.
        generator: on the CPU, of the initial draw.

    Returns:
        Unit centroids (clusters, D), and the cluster (N,) of each row.

    Raises:
        ValueError: fewer rows than clusters.

    Source: facebookresearch/swav, main_deepclusterv2.py (`cluster_memory`), which leaves an empty cluster
    where it was.
    """
    if len(rows_ND) < clusters:
        raise ValueError(f"{clusters} clusters need at least as many rows, got {len(rows_ND)}")
    first = torch.randperm(len(rows_ND), generator=generator)[:clusters].to(rows_ND.device)
    centroids_KD = rows_ND[first].clone()
    for _ in range(iterations):
        cosine_N, cluster_N = _nearest(rows_ND, centroids_KD)
        sums_KD, counts_K = _sums(rows_ND, cluster_N, clusters)
        empty_K = counts_K == 0
        # as many candidates as there are clusters, so that their number need not be known to the host
        farthest_K = cosine_N.topk(clusters, largest=False).indices
        rank_K = (empty_K.cumsum(0) - 1).clamp_min(0)
        sums_KD = torch.where(empty_K[:, None], rows_ND[farthest_K[rank_K]], sums_KD)
        centroids_KD = normalize(sums_KD, dim=1)
    return centroids_KD, _nearest(rows_ND, centroids_KD)[1]


def _nearest(rows_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the nearest centroid and its number, (N,) each."""
    share = own_share(len(rows_ND))
    found = [(part @ centroids_KD.T).max(dim=1) for part in rows_ND[share].split(_ROWS)]
    cosine_N = rows_ND.new_zeros(len(rows_ND))
    cluster_N = torch.zeros_like(cosine_N, dtype=torch.int64)
    cosine_N[share] = torch.cat([f.values for f in found])
    cluster_N[share] = torch.cat([f.indices for f in found])
    return sum_over_processes(cosine_N), sum_over_processes(cluster_N)


def _sums(rows_ND: Tensor, cluster_N: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sum (clusters, D) and number (clusters,) of each cluster's rows.

    By a product, because adding rows by number is in no fixed order on a GPU.
    """
    share = own_share(len(rows_ND))
    sums_KD = rows_ND.new_zeros(clusters, rows_ND.shape[1])
    for rows, numbers in zip(rows_ND[share].split(_ROWS), cluster_N[share].split(_ROWS), strict=True):
        sums_KD += one_hot(numbers, clusters).to(rows.dtype).T @ rows
    return sum_over_processes(sums_KD), torch.bincount(cluster_N, minlength=clusters)
