# SPDX-License-Identifier: Apache-2.0
"""Classification by nearest neighbors. It trains nothing, so its accuracy depends only on the features.

Legend: M bank images, N queries, B queries in a chunk, D features, K classes, k neighbors.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, counted, first_line
from hf_ssl.evaluation.config import NEIGHBORS, TEMPERATURES, are_positive
from hf_ssl.evaluation.neighbor_search import nearest_in_chunks, nearest_others
from hf_ssl.evaluation.statistics import unit_rows
from hf_ssl.names import renamed_arguments

_MOST_CLASSES = 2**20  # each class number needs memory, also one without images


def as_labels(labels: Any, images: int, where: str, *, limit: int | None = _MOST_CLASSES) -> Tensor:
    """Return class numbers from an array, list or tensor as an int64 tensor (N,).

    -1 means "no label", as in `hf_ssl.data.columns.label_values`. Data sets leave out images without a label.
    The caller must leave out features and predictions without a label.

    Raises:
        UserError: the number of labels differs from the number of images, a label is not a whole number, or
            is negative (no label).
    """
    try:
        given = torch.as_tensor(labels)
        tensor = given.long()
        is_whole = bool((tensor.to(given.dtype) == given).all())  # torch does not compare uint64 with int64
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: expected class numbers, got {first_line(error)}; number the classes"
        ) from error
    if not is_whole:
        raise UserError(f"{where}: expected class numbers, got fractions or NaN; number the classes")
    if tensor.shape != (images,):
        raise UserError(
            f"{where}: expected one label for each of {counted(images, 'image')}, got {tuple(tensor.shape)}"
        )
    if images and int(tensor.min()) < 0:
        missing = int((tensor < 0).sum())
        raise UserError(
            f"{where}: expected class numbers from 0, got {int(tensor.min())} (no label) for {missing} of "
            f"{images} images; use only the rows with labels >= 0"
        )
    if images and limit is not None and int(tensor.max()) >= limit:
        raise UserError(
            f"{where}: expected class numbers below {limit:,}, got {int(tensor.max())}; number the "
            "classes of both splits from 0, for example with numpy.unique(labels, return_inverse=True)"
        )
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
        UserError: the shape is not (N, D) with N > 0 and D > 0, D differs from `width`, or the norm of a
            row is not finite.
    """
    features = as_features(features, where)
    if features.ndim != 2 or features.numel() == 0:
        shape = tuple(features.shape)
        raise UserError(f"{where}: expected features (N, D) with N > 0 and D > 0, got {shape}")
    if width not in (None, features.shape[1]):
        raise UserError(
            f"{where}: expected {counted(width or 0, 'feature')}, got {features.shape[1]}; use one encoder "
            "for both"
        )
    # A NaN or an infinity makes the norm of its row NaN or infinite. Testing the norms saves one pass.
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    broken = int((~torch.isfinite(norms)).sum())
    if broken:
        raise UserError(
            f"{where}: expected features with a finite norm in float32, got NaN or infinite in {broken} of "
            f"{counted(len(features), 'image')}; check the encoder"
        )
    return features


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
    data = (train_features, train_labels, test_features, test_labels)
    return vote(*data, neighbors=neighbors, temperatures=temperatures, device=device).accuracies


class Votes(NamedTuple):
    """The result of `vote`.

    Attributes:
        accuracies: {(k, temperature): accuracy in [0, 1]}.
        scores: {(k, temperature): sums of votes (N, K)} for the settings in `keep`.
        labels: (N,) class numbers of the queries.
    """

    accuracies: dict[tuple[int, float], float]
    scores: dict[tuple[int, float], Tensor]
    labels: Tensor


def vote(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    neighbors: Sequence[int],
    temperatures: Sequence[float],
    keep: Sequence[tuple[int, float]] = (),
    device: torch.device | str | None = None,
) -> Votes:
    """Return the accuracies of `knn_accuracy`, and the sums of votes for some settings.

    Memory holds the neighbors of one chunk of queries only: 1,024 queries with 5,000 neighbors take 60 MB.

    Args:
        keep: settings (k, temperature) whose sums of votes are returned. Each must be measured.
        Others: as for `knn_accuracy`, with the same errors.
    """
    device = torch.device(device) if device is not None else as_features(test_features, "k-NN queries").device
    counts = sorted(set(neighbors))
    if not counts or counts[0] < 1:
        raise UserError(f"k-NN: expected 1 <= k, got {list(neighbors)}")
    if not are_positive(temperatures):
        raise UserError(f"k-NN: expected positive temperatures, got {list(temperatures)}")
    bank, bank_labels = prepare(train_features, train_labels, "k-NN bank", device)
    check_classes(bank_labels, "k-NN bank")
    queries, query_labels = prepare(test_features, test_labels, "k-NN queries", device, bank.shape[1])
    if counts[-1] > len(bank):
        raise UserError(f"k-NN: expected 1 <= k <= {len(bank)} images in the bank, got {counts[-1]}")
    classes = int(bank_labels.max()) + 1
    right = {(count, temperature): 0 for temperature in temperatures for count in counts}
    kept: dict[tuple[int, float], list[Tensor]] = {setting: [] for setting in keep}
    done = 0
    for cosines, rows in nearest_in_chunks(bank, queries, counts[-1]):
        labels, voters = query_labels[done : done + len(rows)], bank_labels[rows]
        done += len(rows)
        for temperature in temperatures:
            for count, sums in _sums_of_votes(cosines, voters, counts, temperature, classes):
                right[count, temperature] += int((sums.argmax(dim=1) == labels).sum())
                if (count, temperature) in kept:
                    kept[count, temperature].append(sums.clone())
    accuracies = {setting: number / len(queries) for setting, number in right.items()}
    return Votes(accuracies, {setting: torch.cat(parts) for setting, parts in kept.items()}, query_labels)


def _sums_of_votes(
    cosines: Tensor, voters: Tensor, counts: Sequence[int], temperature: float, classes: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield each k with the sums (B, K) of the votes, in one tensor that the next k changes.

    The sums for k are those for the previous k plus the additional votes, because the neighbors are sorted.
    They are in float64. Sums of the same votes are then equal in any order, which an accelerator does not
    define.

    Args:
        cosines: (B, k) float32, best first.
        voters: (B, k) class numbers of the neighbors.
        counts: values of k in ascending order.
        temperature: a positive number.
        classes: K.
    """
    # The weights are relative to that of the nearest image, so that `exp` does not overflow.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()
    if weights.device.type != "mps":  # MPS has no float64
        weights = weights.double()
    sums = weights.new_zeros(len(weights), classes)
    done = 0
    for count in counts:
        sums.scatter_add_(1, voters[:, done:count], weights[:, done:count])
        done = count
        yield count, sums


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
    everyone = torch.arange(len(rows_ND), device=rows_ND.device)
    cosines, found = nearest_others(rows_ND, everyone, neighbors)
    classes = int(labels_N.max()) + 1
    _, sums = next(_sums_of_votes(cosines, labels_N[found], [neighbors], temperature, classes))
    return int((sums.argmax(dim=1) == labels_N).sum()) / len(labels_N)
