# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN: the nearest training images vote for the class. It trains nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.config import NEIGHBORS, TEMPERATURES, are_positive, main_knn
from hf_ssl.evaluation.inputs import Inputs, Split, hold_out
from hf_ssl.evaluation.knn import Votes, vote
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import accuracy_result

VERSION = 1
_MAX_HELD_OUT = 5000


@dataclass
class Config:
    """Settings.

    Attributes:
        neighbors: values of k. None: those of `NEIGHBORS` up to the number of training images.
        temperatures: a neighbor votes with the weight exp(cosine / temperature).
    """

    neighbors: list[int] | None = None
    temperatures: list[float] = field(default_factory=lambda: list(TEMPERATURES))

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        given, temperatures = self.neighbors, list(self.temperatures)
        neighbors = None if given is None else list(given)
        expected = "one or more positive numbers"
        check_values(
            where,
            ("neighbors", neighbors, neighbors is None or are_positive(neighbors), expected),
            ("temperatures", temperatures, are_positive(temperatures), expected),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy with k 20 and temperature 0.07, and with the selected k and temperature.

    The first is DINO's setting, which is fixed. If it is not among the settings, `main_knn` explains
    which one replaces it. The second has the best accuracy on held-out training images: 10 % of them, at most
    5,000, classified by the others.

    Raises:
        UserError: a given k is larger than the number of training images.
    """
    train, test = inputs.train, inputs.test
    counts = _counts(inputs, config)
    main = main_knn(config, len(train))
    with inputs.progress("k-NN"):
        selected = _select(inputs, counts, config.temperatures)
        best = () if selected is None else (selected[0],)
        found = _vote(inputs, train, test, counts, config.temperatures, keep=(main, *best))
    cells = [
        {"neighbors": k, "temperature": t, "accuracy": value} for (k, t), value in found.accuracies.items()
    ]
    k, temperature = main
    results = [
        accuracy_result(
            "knn",
            VERSION,
            {"neighbors": k, "temperature": temperature},
            found.scores[main],
            found.labels,
            key=f"knn_{k}",
            title=f"{k}-NN accuracy",
            column=f"{k}-NN, all labels",
            text=f"{k}-NN by cosine similarity. Each neighbor votes with the weight exp(cosine / "
            f"{temperature:g}). Bank: {train}. Tested on {test}",
            details={"neighbors": k, "temperature": temperature, "grid": cells},
        )
    ]
    if selected is None:
        return results
    (k, temperature), held_out, tested = selected
    selected_on = f"{held_out:,} held-out images of split {train.name}"
    settings = {"neighbors": counts, "temperatures": list(config.temperatures), "seed": inputs.seed}
    results.append(
        accuracy_result(
            "knn",
            VERSION,
            settings,
            found.scores[selected[0]],
            found.labels,
            key="knn_selected",
            title="k-NN accuracy with the selected k",
            column="k-NN, selected k",
            text="k-NN by cosine similarity. Each neighbor votes with the weight exp(cosine / T). k "
            f"{k} and T {temperature:g} had the highest accuracy on {selected_on} "
            f"({counted(len(tested), 'value')} of k, {tested[0]:,} to {tested[-1]:,}). Bank: {train}. "
            f"Tested on {test}",
            selection={"neighbors": k, "temperature": temperature},
            selected_on=selected_on,
        )
    )
    return results


def _counts(inputs: Inputs, config: Config) -> list[int]:
    """Return the values of k in ascending order."""
    bank = len(inputs.train)
    if config.neighbors is None:
        larger = ", ".join(f"{k:,}" for k in NEIGHBORS if k > bank)
        if larger:
            inputs.skipped.append(f"k-NN with k {larger}: the bank has {bank:,} images")
        return [k for k in NEIGHBORS if k <= bank]
    counts = sorted(set(config.neighbors))
    if counts[-1] > bank:
        raise UserError(
            f"evaluation.settings.knn.neighbors: expected at most {bank}, the number of training images, got "
            f"{counts[-1]}; use a smaller k"
        )
    return counts


def _vote(
    inputs: Inputs,
    bank: Split,
    queries: Split,
    counts: list[int],
    temperatures: list[float],
    keep: Sequence[tuple[int, float]] = (),
) -> Votes:
    return vote(
        bank.features, bank.labels, queries.features, queries.labels,
        neighbors=counts, temperatures=temperatures, keep=keep, device=inputs.device,
    )  # fmt: skip


def _select(
    inputs: Inputs, counts: list[int], temperatures: list[float]
) -> tuple[tuple[int, float], int, list[int]] | None:
    """Return the best (k, temperature), the number of held-out training images, and the tested values of k.

    The bank contains the other training images. A k larger than the bank is not tested. Return None if there
    is nothing to select, or if there are too few images.
    """
    train = inputs.train
    kept, chosen = hold_out(len(train), inputs.seed, _MAX_HELD_OUT)
    bank, queries = (Split(train.features[rows], train.labels[rows], train.name) for rows in (kept, chosen))
    usable = [k for k in counts if k <= len(bank)]
    if len(usable) * len(temperatures) < 2 or len(bank.labels.unique()) < 2:
        return None
    grid = _vote(inputs, bank, queries, usable, temperatures).accuracies
    return max(grid, key=lambda setting: grid[setting]), len(chosen), usable
