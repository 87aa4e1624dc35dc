# SPDX-License-Identifier: Apache-2.0
"""Classification by nearest neighbors. It trains nothing, so its accuracy depends only on the features.

Legend: M bank images, N queries, B queries in a chunk, D features, C classes, K neighbors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, first_line
from hf_ssl.evaluation.config import NEIGHBORS, TEMPERATURES, are_positive
from hf_ssl.evaluation.statistics import unit_rows
from hf_ssl.names import renamed_arguments

# A chunk of similarities takes 4 * 1024 * 65536 bytes = 256 MiB.
QUERY_CHUNK, BANK_CHUNK = 1024, 65536


def as_labels(labels: Any, images: int, where: str) -> Tensor:
    """Return class numbers from an array, list or tensor as an int64 tensor (N,).

    Raises:
        UserError: the number of labels differs from the number of images, a label is not a whole number, or
            is negative (no label).
    """
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: expected class numbers, got {first_line(error)}; number the classes"
        ) from error
    tensor = given.long()
    if not bool((tensor == given).all()):
        raise UserError(f"{where}: expected class numbers, got fractions or NaN; number the classes")
    if tensor.shape != (images,):
        raise UserError(f"{where}: expected one label for each of {images} images, got {tuple(tensor.shape)}")
    if images and int(tensor.min()) < 0:
        raise UserError(f"{where}: expected class numbers from 0, got {int(tensor.min())}; label all images")
    return tensor


def as_features(features: Any, where: str) -> Tensor:
    """Return features from a tensor, an array or lists as a tensor without gradient, or raise UserError."""
    try:
        return torch.as_tensor(features).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(features).__name__
        raise UserError(f"{where}: expected features (N, D) as numbers, got {got}; use a tensor") from error


def check_features(features: Any, where: str, width: int | None = None) -> Tensor:
    """Return features, which may be an array, as a tensor (N, D).

    Raises:
        UserError: the shape is not (N, D) with N > 0, D differs from `width`, or the features are not finite.
    """
    features = as_features(features, where)
    if features.ndim != 2 or len(features) == 0:
        raise UserError(f"{where}: expected features (N, D) with N > 0, got {tuple(features.shape)}")
    if width not in (None, features.shape[1]):
        raise UserError(
            f"{where}: expected {width} features, got {features.shape[1]}; use one encoder for both"
        )
    # A NaN or an infinity makes the sum of its row NaN or infinite. Testing the sums saves one pass.
    broken = int((~torch.isfinite(features.sum(dim=1, dtype=torch.float32))).sum())
    if broken:
        raise UserError(
            f"{where}: expected finite features, got NaN or infinite in {broken} of {len(features)} images"
        )
    return features


def nearest(bank: Tensor, queries: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and the bank rows of the nearest neighbors of each query, both (N, K), best first.

    Args:
        bank: (M, D) float32, L2-normalized, with M >= neighbors.
        queries: (N, D) float32, L2-normalized.
        neighbors: K.
    """
    cosines = queries.new_empty(len(queries), neighbors)
    rows = torch.empty(len(queries), neighbors, dtype=torch.long, device=queries.device)
    buffer = queries.new_empty(min(QUERY_CHUNK, len(queries)) * min(BANK_CHUNK, len(bank)))
    for start in range(0, len(queries), QUERY_CHUNK):
        chunk = queries[start : start + QUERY_CHUNK]
        best, best_rows = [], []
        for first in range(0, len(bank), BANK_CHUNK):
            part = bank[first : first + BANK_CHUNK]
            # All chunks share one buffer. New memory pages for each product would take a fifth of its time.
            out = buffer[: len(chunk) * len(part)].view(len(chunk), len(part))
            torch.mm(chunk, part.T, out=out)
            values, index = out.topk(min(neighbors, len(part)), dim=1)
            best.append(values)
            best_rows.append(index + first)
        values, rank = torch.cat(best, dim=1).topk(neighbors, dim=1)
        cosines[start : start + len(chunk)] = values
        rows[start : start + len(chunk)] = torch.cat(best_rows, dim=1).gather(1, rank)
    return cosines, rows


@renamed_arguments(neighbours="neighbors")
def knn_accuracy(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    neighbors: Sequence[int] = NEIGHBORS,
    temperatures: Sequence[float] = TEMPERATURES,
    device: torch.device | str | None = None,
) -> dict[tuple[int, float], float]:
    """Return the accuracy of weighted k-NN classification for every k and temperature, from one search.

    Each of the k bank images with the largest cosine votes for its class with exp(cosine / temperature). In a
    tie, the prediction is the lower class number. The computation is in float32.

    Args:
        train_features, train_labels: the bank, (M, D) and (M,).
        test_features, test_labels: the queries, (N, D) and (N,).
        neighbors: values of k, each at most M.
        temperatures: positive numbers.
        device: device of the computation; None: the device of the test features.

    Returns:
        {(k, temperature): accuracy in [0, 1]}.

    Raises:
        UserError: k or a temperature is out of range, the number of labels is wrong, the bank has fewer than
            two classes, or features are not finite.

    Source: Wu et al. 2018 (1805.01978), section 3.4; k and T are those of DINO's eval_knn.py, which
    recommends k 20 and T 0.07. Difference: the largest cosine is subtracted before exp. This prevents
    overflow and does not change the predicted class.
    """
    found = search(
        train_features,
        train_labels,
        test_features,
        test_labels,
        neighbors=max(neighbors, default=0),
        device=device,
    )
    return accuracy_grid(found, neighbors, temperatures)


class Voters(NamedTuple):
    """The nearest bank images of N queries.

    Attributes:
        cosines: (N, K) float32, best first.
        classes: (N, K) class numbers of the bank images.
        labels: (N,) class numbers of the queries.
        bank_classes: number of classes C of the bank.
    """

    cosines: Tensor
    classes: Tensor
    labels: Tensor
    bank_classes: int


def search(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    neighbors: int,
    device: torch.device | str | None = None,
) -> Voters:
    """Return the nearest bank images of all queries. Arguments and errors are those of `knn_accuracy`."""
    device = torch.device(device) if device is not None else as_features(test_features, "k-NN queries").device
    bank, bank_labels = prepare(train_features, train_labels, "k-NN bank", device)
    check_classes(bank_labels, "k-NN bank")
    queries, query_labels = prepare(test_features, test_labels, "k-NN queries", device, bank.shape[1])
    if not 1 <= neighbors <= len(bank):
        raise UserError(f"k-NN: expected 1 <= k <= {len(bank)} images in the bank, got {neighbors}")
    cosines, rows = nearest(bank, queries, neighbors)
    return Voters(cosines, bank_labels[rows], query_labels, int(bank_labels.max()) + 1)


def accuracy_grid(
    found: Voters, neighbors: Sequence[int], temperatures: Sequence[float]
) -> dict[tuple[int, float], float]:
    """Return {(k, temperature): accuracy in [0, 1]} from one search; errors are those of `knn_accuracy`."""
    counts = sorted(set(neighbors))
    if not counts or counts[0] < 1:
        raise UserError(f"k-NN: expected 1 <= k, got {list(neighbors)}")
    if not are_positive(temperatures):
        raise UserError(f"k-NN: expected positive temperatures, got {list(temperatures)}")
    return {
        (count, temperature): accuracy
        for temperature in temperatures
        for count, accuracy in _accuracies(found, counts, temperature).items()
    }


def scores(found: Voters, neighbors: int, temperature: float) -> Tensor:
    """Return the sum (N, C) of the votes for each class by the first `neighbors` bank images."""
    weights = _weights(found.cosines[:, :neighbors], temperature)
    votes = weights.new_zeros(len(weights), found.bank_classes)
    return votes.scatter_add_(1, found.classes[:, :neighbors], weights)


def check_classes(labels: Tensor, where: str) -> None:
    """Raise UserError for labels of a single class, which every classifier would predict."""
    if len(labels.unique()) < 2:
        raise UserError(
            f"{where}: expected images of at least 2 classes, got {len(labels)} of 1 class; add images"
        )


def prepare(
    features: Tensor, labels: Any, where: str, device: torch.device, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return float32 unit rows (N, D) and class numbers (N,) on a device, or raise UserError."""
    features = check_features(features, where, width)
    class_numbers = as_labels(labels, len(features), where)
    return unit_rows(features.to(device, torch.float32)), class_numbers.to(device)


def leave_one_out_knn(features: Tensor, labels: Any, *, neighbors: int, temperature: float) -> float:
    """Return the accuracy of `knn_accuracy` if each image is classified by all other images.

    Args:
        features, labels: (N, D) and (N,).
        neighbors: k, less than N.
        temperature: a positive number.

    Raises:
        UserError: k or the temperature is out of range, the number of labels is wrong, there are fewer than
            two classes, or features are not finite.
    """
    rows_ND, labels_N = prepare(features, labels, "k-NN", features.device)
    check_classes(labels_N, "k-NN")
    if not are_positive([temperature]):
        raise UserError(f"k-NN: expected a positive temperature, got {temperature}")
    if not 1 <= neighbors < len(features):
        raise UserError(f"k-NN: expected 1 <= k < {len(features)}, the number of images, got {neighbors}")
    cosines, found = nearest(rows_ND, rows_ND, neighbors + 1)
    dropped = found == torch.arange(len(found), device=found.device)[:, None]
    dropped[:, -1] |= ~dropped.any(dim=1)  # an image with many copies may not be among its own neighbors
    voters = labels_N[found[~dropped].view(-1, neighbors)]
    kept = cosines[~dropped].view(-1, neighbors)
    found_voters = Voters(kept, voters, labels_N, int(labels_N.max()) + 1)
    return _accuracies(found_voters, [neighbors], temperature)[neighbors]


def _weights(cosines: Tensor, temperature: float) -> Tensor:
    """Return the weights of votes, relative to that of the nearest image, so that `exp` does not overflow."""
    return ((cosines - cosines[:, :1]) / temperature).exp()


def _accuracies(found: Voters, counts: list[int], temperature: float) -> dict[int, float]:
    """Return {k: accuracy}.

    Because the neighbors are sorted, the scores for k are those for the previous k plus the additional votes.
    """
    right = dict.fromkeys(counts, 0)
    for start in range(0, len(found.labels), QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        weights, voters = _weights(found.cosines[chunk], temperature), found.classes[chunk]
        sums = weights.new_zeros(len(weights), found.bank_classes)
        done = 0
        for count in counts:
            sums.scatter_add_(1, voters[:, done:count], weights[:, done:count])
            done = count
            right[count] += int((sums.argmax(dim=1) == found.labels[chunk]).sum())
    return {count: right[count] / len(found.labels) for count in counts}
