# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl.modeling import memory
from hf_ssl.modeling.memory import spherical_kmeans


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(count=60, clusters=4, noise=0.1):
    """Rows around orthogonal directions, and which."""
    labels = torch.arange(count) % clusters
    rows = torch.eye(clusters, 8)[labels] + noise * torch.randn(count, 8, generator=seeded())
    return normalize(rows, dim=1).double(), labels


def slow(rows, clusters, iterations, generator):
    """One row after the other."""
    centroids = rows[torch.randperm(len(rows), generator=generator)[:clusters]].clone()

    def assign():
        found = [max(range(clusters), key=lambda k, row=row: row @ centroids[k]) for row in rows]
        return found, [(row @ centroids[k]).item() for row, k in zip(rows, found, strict=True)]

    for _ in range(iterations):
        found, cosines = assign()
        farthest = sorted(range(len(rows)), key=lambda i: cosines[i])
        for k in range(clusters):
            members = [row for row, mine in zip(rows, found, strict=True) if mine == k]
            total = sum(members) if members else rows[farthest.pop(0)]
            centroids[k] = total / total.norm()
    return centroids, assign()[0]


@pytest.mark.parametrize("seed", range(4))
def test_it_equals_a_slow_version(seed, monkeypatch):
    monkeypatch.setattr(memory, "_KMEANS_ROWS", 7)
    rows, _ = planted(count=40, clusters=5, noise=0.6)
    centroids, found = spherical_kmeans(rows, 6, 5, seeded(seed))
    expected, wanted = slow(rows, 6, 5, seeded(seed))
    torch.testing.assert_close(centroids, expected)
    assert found.tolist() == wanted


def test_it_finds_planted_clusters_although_a_start_had_none_in_one():
    """With all initial centroids in the same two directions, an emptied cluster has to move."""
    rows, labels = planted()
    found = [spherical_kmeans(rows, 4, 20, seeded(seed))[1].tolist() for seed in range(5)]
    assert any(len(set(zip(labels.tolist(), clusters, strict=True))) == 4 for clusters in found)


def test_an_empty_cluster_takes_over_the_farthest_row():
    """Three equal rows start as centroids: two of the clusters get nothing."""
    rows = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    for seed in range(20):
        centroids, found = spherical_kmeans(rows, 3, 4, seeded(seed))
        assert len(set(found.tolist())) == 3, seed
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))


def test_fewer_rows_than_clusters_are_an_error():
    with pytest.raises(ValueError, match=mentions(9, 5)):
        spherical_kmeans(torch.eye(5), 9, 1, seeded())
