# SPDX-License-Identifier: Apache-2.0
"""Weighted k-NN: the nearest training images vote for the class. It trains nothing."""

from dataclasses import dataclass, field

from hf_ssl.errors import UserError, check_values
from hf_ssl.evaluation.config import MAIN_KNN, NEIGHBORS, TEMPERATURES, are_positive
from hf_ssl.evaluation.inputs import Inputs, Split, accuracy_result
from hf_ssl.evaluation.knn import Voters, accuracy_grid, scores, search
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.random import permutation

VERSION = 1
HELD_OUT = 0.1
_MAX_HELD_OUT = 5000


@dataclass
class Config:
    """Settings.

    Attributes:
        neighbors: values of k. None: 1 to 5,000, as far as there are so many training images.
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

    The first is DINO's setting, which is fixed. If it is not among the settings, `main_setting` explains
    which one replaces it. The second has the best accuracy on held-out training images: 10 % of them, at most
    5,000, classified by the others.

    Raises:
        UserError: a given k is larger than the number of training images.
    """
    train, test = inputs.train, inputs.test
    counts = _counts(inputs, config)
    with inputs.progress("k-NN"):
        found = _search(inputs, train, test, max(counts))
        grid = accuracy_grid(found, counts, config.temperatures)
        selected = _select(inputs, counts, config.temperatures)
    cells = [{"neighbors": k, "temperature": t, "accuracy": value} for (k, t), value in grid.items()]
    k, temperature = main_setting(grid)
    results = [
        accuracy_result(
            "knn",
            VERSION,
            {"neighbors": k, "temperature": temperature},
            scores(found, k, temperature),
            found.labels,
            key=f"knn_{k}",
            title=f"{k}-NN accuracy",
            column=f"{k}-NN, all labels",
            text=f"{k}-NN by cosine similarity, votes weighted by exp(cosine / {temperature:g}), bank: "
            f"{train}, tested on {test}",
            details={"neighbors": k, "temperature": temperature, "grid": cells},
        )
    ]
    if selected is None:
        return results
    (k, temperature), held_out = selected
    selected_on = f"{held_out:,} held-out images of split {train.name}"
    settings = {"neighbors": counts, "temperatures": list(config.temperatures), "seed": inputs.seed}
    results.append(
        accuracy_result(
            "knn",
            VERSION,
            settings,
            scores(found, k, temperature),
            found.labels,
            key="knn_selected",
            title="k-NN accuracy with the selected k",
            column="k-NN, selected k",
            text=f"k-NN by cosine similarity, votes weighted by exp(cosine / T). k {k} and T {temperature:g} "
            f"had the highest accuracy on {selected_on} ({len(counts)} values of k, {counts[0]:,} to "
            f"{counts[-1]:,}). Bank: {train}, tested on {test}",
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


def _search(inputs: Inputs, train: Split, test: Split, neighbors: int) -> Voters:
    return search(
        train.features, train.labels, test.features, test.labels, neighbors=neighbors, device=inputs.device
    )


def _select(
    inputs: Inputs, counts: list[int], temperatures: list[float]
) -> tuple[tuple[int, float], int] | None:
    """Return the best k and temperature on held-out training images, and the number of these images.

    Return None if there is nothing to select, or if there are too few images.
    """
    train = inputs.train
    order = permutation(len(train), inputs.seed)
    held_out = min(_MAX_HELD_OUT, max(1, round(HELD_OUT * len(train))))
    chosen, kept = order[:held_out], order[held_out:]
    bank, queries = (Split(train.features[rows], train.labels[rows], train.name) for rows in (kept, chosen))
    usable = [k for k in counts if k <= len(bank)]
    if len(usable) * len(temperatures) < 2 or len(bank.labels.unique()) < 2:
        return None
    grid = accuracy_grid(_search(inputs, bank, queries, max(usable)), usable, temperatures)
    return max(grid, key=lambda setting: grid[setting]), held_out


def main_setting(grid: dict[tuple[int, float], float]) -> tuple[int, float]:
    """Return the main k and temperature, which are chosen independently.

    k is the largest measured one up to 20, or the smallest one if all are above 20. The temperature is 0.07
    if it was measured, otherwise the first one.
    """
    counts = sorted({k for k, _ in grid})
    temperatures = [temperature for _, temperature in grid]
    below = [k for k in counts if k <= MAIN_KNN[0]]
    temperature = MAIN_KNN[1] if MAIN_KNN[1] in temperatures else temperatures[0]
    return below[-1] if below else counts[0], temperature
