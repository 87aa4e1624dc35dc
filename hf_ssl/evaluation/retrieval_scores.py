# SPDX-License-Identifier: Apache-2.0
"""Mean average precision and recall at k of image retrieval with class labels (layer 1).

Legend: M gallery images, N queries, B queries in a chunk, D features, R relevant gallery images of a query.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.evaluation.knn import prepare
from hf_ssl.evaluation.neighbor_search import find_copies

CHUNK_NUMBERS = 2**24
"""Largest number of similarities in a chunk. They need 64 MiB, and another 64 MiB during sorting."""


class Retrieval(NamedTuple):
    """Result of `retrieval_scores`, in the order of the queries.

    Attributes:
        average_precision: (N,) float64, NaN for a query without a relevant gallery image.
        first_rank: (N,) int64, the rank of the first relevant image, from 1. It is one more than the number
            of irrelevant images that are at least as similar. 0: the query has no relevant image.
    """

    average_precision: Tensor
    first_rank: Tensor

    def mean_average_precision(self) -> float:
        """Return the mean over the queries with a relevant gallery image."""
        return float(self.average_precision[self.first_rank > 0].mean())

    def recall(self, k: int) -> float:
        """Return the share of the queries with a relevant image among the first k.

        Queries without any relevant gallery image do not count.
        """
        ranks = self.first_rank[self.first_rank > 0]
        return float((ranks <= k).double().mean())


def retrieval_scores(
    gallery_features: Tensor,
    gallery_labels: Any,
    query_features: Tensor | None = None,
    query_labels: Any = None,
    *,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda queries: None,
) -> Retrieval:
    """Return the average precision of each query, and the rank of its first relevant gallery image.

    The gallery is ranked by the cosine of the features. A gallery image is relevant if it has the class of
    the query. Gallery images with equal cosines are treated as follows:

    - Average precision: for each relevant image, the precision is computed over all images that are at least
      as similar. The result is the mean of these precisions. It equals `average_precision_score` of
      scikit-learn. There is neither interpolation nor a limit on the rank.
    - First rank: irrelevant images precede relevant images with equal cosines. An encoder with equal features
      for all images therefore has the lowest possible recall.

    Args:
        gallery_features, gallery_labels: (M, D) and (M,).
        query_features, query_labels: (N, D) and (N,). None: each gallery image is a query for all other
            gallery images (leave-one-out).
        device: device of the computation; None: the device of the gallery.
        advance: callback for a progress bar, called with the number of finished queries.

    Raises:
        UserError: no query has a relevant gallery image, the number of labels is wrong, or features are not
            finite.

    Source: Oh Song et al. 2016 (1511.06452), for recall at k. The paper does not define ties.
    """
    device = torch.device(device) if device is not None else torch.as_tensor(gallery_features).device
    gallery, classes = prepare(gallery_features, gallery_labels, "retrieval, gallery", device)
    leave_one_out = query_features is None
    if query_features is None:
        queries, targets = gallery, classes
    else:
        queries, targets = prepare(
            query_features, query_labels, "retrieval, queries", device, gallery.shape[1]
        )
    # Queries of one class have the same relevant images, which are neighbors in the sorted gallery.
    order = classes.argsort(stable=True)
    gallery, classes = gallery[order], classes[order]
    precision = torch.full((len(queries),), torch.nan, dtype=torch.float64)
    ranks = torch.zeros(len(queries), dtype=torch.int64)
    copies = find_copies(gallery, len(gallery))  # matrix products can round the cosines of copies differently
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    rows = max(1, CHUNK_NUMBERS // len(gallery))
    for label in targets.unique().tolist():
        first, end = (int(torch.searchsorted(classes, label, right=right)) for right in (False, True))
        members = torch.nonzero(targets == label)[:, 0]
        if end - first > leave_one_out:  # otherwise, no image but the query itself is relevant
            for index in members.split(rows):
                cosines = queries[index] @ gallery.T
                if copies is not None:
                    ((columns, numbers),) = copies.places
                    cosines.index_copy_(1, columns, (queries[index] @ copies.rows.T)[:, numbers])
                if leave_one_out:
                    cosines.scatter_(1, place[index][:, None], -torch.inf)
                found = _scores(cosines, first, end, leave_one_out)
                precision[index.cpu()], ranks[index.cpu()] = (each.cpu() for each in found)
        advance(len(members))
    if not bool((ranks > 0).any()):
        raise UserError(
            "retrieval: expected gallery images of the classes of the queries, got none; add images"
        )
    return Retrieval(precision, ranks)


def _scores(cosines: Tensor, first: int, end: int, leave_one_out: bool) -> tuple[Tensor, Tensor]:
    """Return the average precisions and the ranks of the first relevant images (B,).

    Args:
        cosines: (B, M). The columns from `first` to `end` are those of the relevant images.
        leave_one_out: whether the cosine of one relevant image, the query itself, is -infinity.
    """
    relevant = _sorted(cosines[:, first:end].clone())[:, int(leave_one_out) :].contiguous()
    ranked = _sorted(cosines)
    # The numbers of images, and of relevant images, that are at least as similar as each relevant image.
    above = ranked.shape[1] - torch.searchsorted(ranked, relevant)
    hits = relevant.shape[1] - torch.searchsorted(relevant, relevant)
    # MPS has no float64.
    kind = torch.float32 if cosines.device.type == "mps" else torch.float64
    precision = (hits.to(kind) / above.to(kind)).mean(dim=1)
    return precision, above[:, -1] - hits[:, -1] + 1


def _sorted(values: Tensor) -> Tensor:
    """Return rows in ascending order. On a CPU, the vectorized `sort` of NumPy works in place."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    values.numpy().sort(axis=1)
    return values


def usable_ranks(wanted: Sequence[int], gallery: int) -> list[int]:
    """Return the values of k below the number of gallery images, ascending, or [1] if there are none."""
    return sorted({k for k in wanted if k < gallery}) or [1]
