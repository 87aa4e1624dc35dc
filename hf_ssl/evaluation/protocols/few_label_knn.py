# SPDX-License-Identifier: Apache-2.0
"""1-NN with few labels: the class of the nearest one of n labeled images of each class."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.knn import as_features, check_classes, nearest, prepare
from hf_ssl.evaluation.results import ProtocolResult, result_id

VERSION = 1


@dataclass
class Config:
    """Settings.

    Attributes:
        labels: numbers of labeled images of each class.
        draws: number of random choices of the labeled images.
    """

    labels: list[int] = field(default_factory=lambda: [1, 5, 10])
    draws: int = 20

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        labels = list(self.labels)
        check_values(
            where,
            ("labels", labels, min(labels, default=0) > 0, "one or more positive numbers"),
            ("draws", self.draws, self.draws > 0, "a positive number"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean accuracy over the draws for each number of labels."""
    train, test = inputs.train, inputs.test
    smallest = int(train.labels.bincount()[train.labels.unique()].min())
    results = []
    for labels in config.labels:
        if labels > smallest:
            inputs.skipped.append(f"{labels} labels per class: the smallest class has {smallest}")
            continue
        found = few_label_knn(
            train.features, train.labels, test.features, test.labels,
            labels_per_class=labels, draws=config.draws, seed=inputs.seed, device=inputs.device,
        )  # fmt: skip
        images = f"labeled image{'s'[: labels != 1]}"
        settings = {"labels": labels, "draws": config.draws, "seed": inputs.seed}
        results.append(
            ProtocolResult(
                protocol="few_label_knn",
                id=result_id("few_label_knn", VERSION, settings),
                key=f"few_labels_{labels}",
                title=f"1-NN accuracy, {labels} {images} per class",
                column=f"1-NN, {labels} label{'s'[: labels != 1]} per class",
                text=f"1-NN by cosine similarity among {labels} {images} of each class, drawn at random from "
                f"the {train}: mean and standard deviation of {config.draws} draws (seed {inputs.seed}), "
                f"tested on {test}",
                value=found.mean,
                standard_error=found.std / found.draws**0.5,
                metrics={},
                selection={},
                selected_on=None,
                details={"labels": labels, "std": found.std, "draws": found.draws},
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
        seed: seed of a separate generator. The global random state does not change.
        device: device of the computation; None: the device of the test features.

    Raises:
        UserError: a class has fewer images than `labels_per_class`, or `knn_accuracy` would raise.
    """
    device = torch.device(device) if device is not None else as_features(test_features, "k-NN queries").device
    bank, bank_labels = prepare(train_features, train_labels, "few-label bank", device)
    check_classes(bank_labels, "few-label bank")
    queries, query_labels = prepare(test_features, test_labels, "few-label queries", device, bank.shape[1])
    if labels_per_class < 1 or draws < 1:
        raise UserError(
            f"few labels: expected at least 1 label and 1 draw, got {labels_per_class} and {draws}"
        )
    generator = torch.Generator().manual_seed(seed)
    labels_on_cpu = bank_labels.cpu()
    members = [torch.nonzero(labels_on_cpu == number)[:, 0] for number in labels_on_cpu.unique().tolist()]
    smallest = min(len(rows) for rows in members)
    if smallest < labels_per_class:
        raise UserError(
            f"few labels: expected {labels_per_class} images in each class, got {smallest} in one class"
        )
    accuracies = []
    for _ in range(draws):
        chosen = [rows[torch.randperm(len(rows), generator=generator)[:labels_per_class]] for rows in members]
        subset = torch.cat(chosen).to(device)
        _, index = nearest(bank[subset], queries, 1)
        predicted = bank_labels[subset][index[:, 0]]
        accuracies.append(int((predicted == query_labels).sum()) / len(queries))
    values = torch.tensor(accuracies, dtype=torch.float64)
    return FewLabel(labels_per_class, float(values.mean()), float(values.std()) if draws > 1 else 0.0, draws)
