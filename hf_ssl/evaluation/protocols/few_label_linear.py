# SPDX-License-Identifier: Apache-2.0
"""Linear classifier with few labels: logistic regression on some labeled images of each class."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.data.subsets import rank_in_class
from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.image_lists import (
    LISTS,
    class_sizes,
    draw_rows,
    find_rows,
    list_error,
    possible_numbers,
    read_list,
    rows_hash,
)
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.results import Draws, ProtocolResult, result_id
from hf_ssl.evaluation.scores import class_metrics, is_right
from hf_ssl.evaluation.softmax_regression import Problem
from hf_ssl.evaluation.statistics import float64_device, unit_rows

VERSION = 1
STRENGTHS = tuple(10.0 ** (step / 2) for step in range(-4, 15))  # half-decades from 0.01 to 1e7
STRENGTH = 4000.0  # without a selection; MSN: lambda 0.00025 / N for the mean cross entropy
SHARE = 5  # one of 5 labeled images of a class is held out for the selection


@dataclass
class Config:
    """Settings.

    Attributes:
        fractions: shares of the training images whose labels are used, the same number in each class.
        labels_per_class: numbers of labeled images per class.
        lists: files with one image name per line, the labeled images of published results (`image_lists`).
        draws: number of random choices of the labeled images for each fraction and number.
        strengths: values of C (see `logistic_regression`) for L2-normalized features.
        iterations: largest number of iterations of L-BFGS for each C.
    """

    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1])
    labels_per_class: list[int] = field(default_factory=lambda: [1, 5, 10])
    lists: list[str] = field(default_factory=list)
    draws: int = 5
    strengths: list[float] = field(default_factory=lambda: list(STRENGTHS))
    iterations: int = 100

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range, or a list that cannot be read."""
        fractions, numbers = list(self.fractions), list(self.labels_per_class)
        strengths = list(self.strengths)
        given = bool(fractions or numbers or list(self.lists))
        shares = all(0 < share <= 1 for share in fractions)
        check_values(
            where,
            ("fractions", fractions, shares, "numbers above 0, at most 1"),
            ("labels_per_class", numbers, min(numbers, default=1) > 0, "positive numbers"),
            ("labels_per_class", numbers, given, "one or more numbers, or fractions or lists"),
            ("draws", self.draws, self.draws > 0, "a positive number"),
            ("strengths", strengths, are_positive(strengths), "one or more positive numbers"),
            ("iterations", self.iterations, self.iterations > 0, "a positive number"),
        )
        for path in self.lists:
            problem = list_error(path)
            if problem is not None:
                raise UserError(f"{where}.lists: expected files with image names, got {path}: {problem}")


class Choice(NamedTuple):
    """A choice of labeled images.

    Attributes:
        key, column: parts of the names of the result.
        words: the labeled images in words.
        settings: what determines the choice, for the id of the result.
        draws: row numbers of the training images, sorted; one tensor for each draw.
        drawn: whether the images were drawn at random.
    """

    key: str
    column: str
    words: str
    settings: dict[str, Any]
    draws: list[Tensor]
    drawn: bool = True


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the mean accuracy over the draws for each fraction, number of labels and list.

    The features have length 1. The selected C is the best one on a held-out fifth of the images of each
    class. Of several best values, it is the one with the lowest cross entropy there. The final classifier is
    trained on all labeled images of the draw. If a class has only one labeled image, C is 4,000 and nothing
    is selected. All encoders use the same labeled images, which depend only on the labels and the seed.

    Raises:
        UserError: no fraction, number or list can be measured.

    Source: SimCLR (2002.05709) for 1 % and 10 % of the labels; MSN (2204.07141), `logistic_eval.py`, for
    logistic regression on normalized, centered features and for the C without a selection. Differences: MSN
    selects nothing, and its classifier has no bias.
    """
    choices = _choices(inputs, config)
    device = float64_device(inputs.device)
    train, test = (unit_rows(split.features.to(device)) for split in (inputs.train, inputs.test))
    labels = inputs.train.labels.to(device)
    results = []
    total = sum(len(choice.draws) for choice in choices)
    with inputs.progress("linear classifier with few labels", total, "draw") as bar:
        for choice in choices:
            measured, selected = [], []
            for rows in choice.draws:
                rows = rows.to(device)
                scores, strength = _classify(train[rows], labels[rows], test, inputs.classes, config)
                measured.append(class_metrics(scores, inputs.test.labels.to(device)))
                selected.append(strength)
                bar.update(1)
            results.append(_result(inputs, config, choice, measured, selected))
    return results


def _choices(inputs: Inputs, config: Config) -> list[Choice]:
    """Return the labeled images of all measurements. Add the impossible ones to `inputs.skipped`."""
    labels = inputs.train.labels.cpu()
    classes = len(class_sizes(labels))
    counts, shares = possible_numbers(
        inputs, "few_label_linear", config.labels_per_class, config.fractions, len(config.lists)
    )
    found = []
    for share in shares:
        count = round(share * len(labels))
        percent = f"{100 * share:g} %"
        draws = [draw_rows(labels, count, inputs.seed, draw) for draw in range(config.draws)]
        words = f"{percent} of the images ({count:,} with balanced classes)"
        key = f"{100 * share:g}_percent".replace(".", "_")
        found.append(Choice(key, f"{percent} of the labels", words, {"fraction": share}, draws))
    for count in counts:
        draws = [draw_rows(labels, count * classes, inputs.seed, draw) for draw in range(config.draws)]
        column = f"{counted(count, 'label')} per class"
        words = f"{counted(count, 'image')} of each class"
        found.append(Choice(str(count), column, words, {"labels_per_class": count}, draws))
    for path in config.lists:
        names, digest = read_list(path)
        rows = find_rows(names, inputs.train.images, path)
        title = LISTS[digest].title if digest in LISTS else Path(path).name
        words = f"the {counted(len(rows), 'image')} of {title} (SHA-256 {digest[:12]})"
        found.append(Choice(digest[:12], title, words, {"list": digest}, [rows], drawn=False))
    return found


def _classify(
    rows: Tensor, labels: Tensor, test: Tensor, classes: int, config: Config
) -> tuple[Tensor, float | None]:
    """Return the scores of the test images, and the selected C; None: nothing was selected.

    Args:
        rows, labels: the labeled images.
        test: features of the test images.
        classes: number of classes.
        config: settings.
    """
    problem = Problem(rows, labels, classes)
    strengths = sorted(set(config.strengths))
    if int(class_sizes(labels).min()) < 2 or len(strengths) < 2:
        strength = STRENGTH if len(strengths) > 1 else strengths[0]
        (final,) = problem.solve([strength], iterations=config.iterations)
        return problem.scores(final, test), None
    # The row numbers are sorted. The held-out images of a class are those with the lowest row numbers.
    ranks = torch.from_numpy(rank_in_class(labels.cpu().numpy())).to(labels.device)
    held_out = ranks < (labels.bincount() // SHARE).clamp_min(1)[labels]
    solutions = problem.subset(~held_out).solve(strengths, iterations=config.iterations)
    targets = labels[held_out]
    quality = []
    for solution in solutions:
        scores = problem.scores(solution, rows[held_out])
        right = int(is_right(scores, targets).sum())
        quality.append((right, -float(torch.nn.functional.cross_entropy(scores, targets))))
    best = max(range(len(strengths)), key=lambda number: quality[number])
    start = solutions[best].weights
    (final,) = problem.solve([strengths[best]], iterations=config.iterations, start=start)
    return problem.scores(final, test), strengths[best]


def _result(
    inputs: Inputs,
    config: Config,
    choice: Choice,
    measured: list[dict[str, float]],
    selected: list[float | None],
) -> ProtocolResult:
    found, draws = Draws.of([each["top_1"] for each in measured], len(inputs.test)), len(measured)
    hashed = rows_hash(choice.draws, inputs.train.labels.cpu())
    strengths = [strength for strength in selected if strength is not None]
    how = "selected on a held-out fifth of the labeled images of each class" if strengths else "fixed"
    of = f"drawn at random from the {inputs.train}" if choice.drawn else f"in the {inputs.train}"
    spread = f"Mean and standard deviation are those of {draws:,} draws (seed {inputs.seed}). " * (draws > 1)
    kept = ("draws", "strengths", "iterations")
    settings = {key: each for key, each in asdict(config).items() if key in kept}
    settings |= choice.settings | {"rows_hash": hashed} | ({"seed": inputs.seed} if choice.drawn else {})
    details = {"rows_hash": hashed, "images": len(choice.draws[0])} | found.details
    return ProtocolResult(
        protocol="few_label_linear",
        id=result_id("few_label_linear", VERSION, settings),
        key=f"few_label_linear_{choice.key}",
        title=f"Linear classifier accuracy, {choice.words}",
        column=f"linear, {choice.column}",
        text=f"logistic regression on frozen, L2-normalized features. C was {how}. Labeled images: "
        f"{choice.words}, {of}. {spread}Tested on {inputs.test}. Hash of the labeled rows: {hashed}",
        value=found.mean,
        standard_error=found.standard_error,
        metrics={key: mean(each[key] for each in measured) for key in ("top_5", "mean_per_class")},
        selection={"C": strengths} if strengths else {},
        selected_on="a held-out fifth of the labeled images of each draw" if strengths else None,
        details=details,
    )
