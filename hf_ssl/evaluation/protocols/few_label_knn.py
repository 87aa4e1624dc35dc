# SPDX-License-Identifier: Apache-2.0
"""1-NN with few labels: predicts the class of the nearest image, with n labeled images of each class."""

from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.image_lists import class_sizes, draw_rows, possible_numbers
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.knn import as_features, check_classes, prepare
from hf_ssl.evaluation.neighbor_search import nearest
from hf_ssl.evaluation.results import Draws, ProtocolResult, result_id

VERSION = 2


@dataclass
class Config:
    """Settings.

    Attributes:
        labels_per_class: numbers of labeled images per class.
        draws: number of random choices of the labeled images.
    """

    labels_per_class: list[int] = field(default_factory=lambda: [1, 5, 10])
    draws: int = 20

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        numbers = list(self.labels_per_class)
        check_values(
            where,
            ("labels_per_class", numbers, min(numbers, default=0) > 0, "one or more positive numbers"),
            ("draws", self.draws, self.draws > 0, "a positive number"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean accuracy over the draws for each number of labels.

    Raises:
        UserError: each number is larger than the smallest class.
    """
    train, test = inputs.train, inputs.test
    results = []
    counts, _ = possible_numbers(inputs, "few_label_knn", config.labels_per_class)
    for labels in counts:
        accuracies = _accuracies(
            train.features, train.labels, test.features, test.labels, labels, config.draws, inputs.seed,
            inputs.device,
        )  # fmt: skip
        found = Draws.of(accuracies, len(test))
        spread = f"Mean and standard deviation are those of {config.draws:,} draws. " * (config.draws > 1)
        images = counted(labels, "labeled image")
        settings = {"labels_per_class": labels, "draws": config.draws, "seed": inputs.seed}
        results.append(
            ProtocolResult(
                protocol="few_label_knn",
                id=result_id("few_label_knn", VERSION, settings),
                key=f"few_labels_{labels}",
                title=f"1-NN accuracy, {images} per class",
                column=f"1-NN, {counted(labels, 'label')} per class",
                text=f"1-NN by cosine similarity among {images} of each class. The labeled images are drawn "
                f"at random from the {train} (seed {inputs.seed}). {spread}Tested on {test}",
                value=found.mean,
                standard_error=found.standard_error,
                metrics={},
                selection={},
                selected_on=None,
                details={"labels_per_class": labels} | found.details,
            )
        )
    return results


class FewLabel(NamedTuple):
    """Accuracy with few labels: mean and standard deviation (n - 1) over `draws` random labeled subsets."""

    labels_per_class: int
    mean: float
    std: float
    draws: int


def few_label_knn(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    labels_per_class: int,
    draws: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> FewLabel:
    """Return the 1-NN accuracy with few labeled images, over random balanced subsets.

    The subsets depend only on the labels, `labels_per_class`, `draws` and `seed`. All encoders therefore use
    the same subsets.

    Args:
        train_features, train_labels: (M, D) and (M,). The labeled images are drawn from them without
            replacement.
        test_features, test_labels: (N, D) and (N,).
        labels_per_class: images in each class of a subset.
        draws: number of subsets.
        seed: seed of the random subsets. The global random state does not change.
        device: device of the computation; None: the device of the test features.

    Raises:
        UserError: a class has fewer images than `labels_per_class`, or `knn_accuracy` would raise.
    """
    data = (train_features, train_labels, test_features, test_labels)
    accuracies = _accuracies(*data, labels_per_class, draws, seed, device)
    return FewLabel(labels_per_class, mean(accuracies), stdev(accuracies) if draws > 1 else 0.0, draws)


def _accuracies(
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    labels_per_class: int,
    draws: int,
    seed: int,
    device: torch.device | str | None,
) -> list[float]:
    """Return the accuracy of each draw; `few_label_knn` explains the arguments."""
    device = torch.device(device) if device is not None else as_features(test_features, "k-NN queries").device
    bank, bank_labels = prepare(train_features, train_labels, "few-label bank", device)
    check_classes(bank_labels, "few-label bank")
    queries, query_labels = prepare(test_features, test_labels, "few-label queries", device, bank.shape[1])
    if labels_per_class < 1 or draws < 1:
        raise UserError(
            f"few labels: expected at least 1 label and 1 draw, got {labels_per_class} and {draws}"
        )
    labels = bank_labels.cpu()
    sizes = class_sizes(labels)
    if (smallest := int(sizes.min())) < labels_per_class:
        raise UserError(
            f"few labels: expected {labels_per_class} images in each class, got {smallest} in one class"
        )
    accuracies = []
    for draw in range(draws):
        subset = draw_rows(labels, labels_per_class * len(sizes), seed, draw).to(device)
        _, index = nearest(bank[subset], queries, 1)
        predicted = bank_labels[subset][index[:, 0]]
        accuracies.append(int((predicted == query_labels).sum()) / len(queries))
    return accuracies
