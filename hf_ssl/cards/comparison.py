# SPDX-License-Identifier: Apache-2.0
"""Compares the results of runs. The runs of a row differ only in the seed; see `Column` for the columns.

All functions are pure. `hf_ssl.comparing` reads the runs and writes the files.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_ssl.cards.facts_files import facts_of_weights
from hf_ssl.cards.row_labels import pooling_of, row_labels, weight_overrides
from hf_ssl.cards.short_texts import distinguished, joined
from hf_ssl.errors import counted
from hf_ssl.evaluation.bootstrap import Difference, paired_bootstrap, unpack_right
from hf_ssl.evaluation.results import ACCURACY, ProtocolResult, is_measured, mean_error, metric_of


class Tested(NamedTuple):
    """The images of a number. Numbers are comparable only if all these values are equal.

    Attributes:
        name, revision, split, images: name, revision, split and number of the test images.
        classes: number of classes, None if it is not known. Another column of labels of the same images
            usually has another one.
        train_split, train_images: split and number of the training images.
    """

    name: str
    revision: str
    split: str
    images: int
    classes: int | None
    train_split: str
    train_images: int


@dataclass(frozen=True)
class Column:
    """Numbers that can be compared: of one protocol id, measured on the same test images.

    Attributes:
        id: see `hf_ssl.evaluation.results.result_id`.
        key: the key of the number.
        data: the images.
        heading: a text that differs from the headings of all other columns.
        text: how the numbers were measured. Numbers that differ between the runs are given as a range.
        metric: see `hf_ssl.evaluation.results.metric_of`.
    """

    id: str
    key: str
    data: Tested
    heading: str
    text: str
    metric: str = ACCURACY

    @property
    def place(self) -> tuple[Any, ...]:
        return self.id, self.key, self.data


@dataclass
class Cell:
    """The numbers of the runs of one row in one column.

    Attributes:
        values: one number for each run.
        standard_errors: the standard error of each run, in most protocols over the test images. They are not
            independent, because all runs have the same test images.
        seeds: the seed of each run.
        selections: for each run, the settings that its protocol selected: {"learning_rate": 0.1}.
        precisions: the precisions of the features, if they are known.
        right: for each run, which test images were classified correctly; empty if a run did not record it.
        difference: mean of this row minus that of the best row; None: this is the best row, or there are no
            predictions to compare.
    """

    values: list[float]
    standard_errors: list[float]
    seeds: list[int | None] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)
    precisions: set[str] = field(default_factory=set)
    right: list[Any] = field(default_factory=list)
    difference: Difference | None = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation (n - 1) over the runs; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error_over_runs(self) -> float | None:
        """Return the standard error of the mean over the runs; None for a single run."""
        return mean_error(self.values) if len(self.values) > 1 else None


@dataclass
class Row:
    """Runs that differ only in the seed. `cells` has no entry for a column that was not measured.

    The seed is None for an encoder that was not trained by hf_ssl.
    """

    label: str
    seeds: list[int | None]
    cells: dict[Column, Cell]
    is_baseline: bool = False


@dataclass
class Comparison:
    """The rows and the columns of a comparison.

    Attributes:
        rows: the rows.
        columns: the columns.
        skipped: runs without a number, with the reason, in words.
        repeated: runs that were given several times and count once, in words.
    """

    rows: list[Row]
    columns: list[Column]
    skipped: list[str]
    repeated: list[str]

    @property
    def quantity(self) -> str:
        """Return what the numbers are: "accuracy", or "numbers" if a column has another metric."""
        return "accuracy" if all(column.metric == ACCURACY for column in self.columns) else "numbers"

    def best(self, column: Column) -> Row:
        """Return the row with the highest mean in a column. Baselines count only if there is no other row."""
        rows = [row for row in self.rows if column in row.cells]
        trained = [row for row in rows if not row.is_baseline]
        return max(trained or rows, key=lambda row: row.cells[column].mean)


@dataclass
class _Run:
    """One encoder of a training.

    Attributes:
        name: its key in the results: "trained", "start", "untrained" or "raw_pixels".
        entries: its evaluations, with different protocols or images; the newest one is the first.
    """

    name: str
    entries: list[dict[str, Any]]

    @property
    def seed(self) -> int | None:
        seed: int | None = self.entries[0]["seed"]
        return seed

    def numbers(self) -> Iterator[tuple[ProtocolResult, Tested]]:
        """Yield each number once, with its test images. See `measured`."""
        for number, data, _ in self.measured():
            yield number, data

    def measured(self) -> Iterator[tuple[ProtocolResult, Tested, str | None]]:
        """Yield each number once, with its test images and the precision of the features (None: unknown).

        Of repeated measurements, the newest one counts. Numbers that are not finite are omitted.
        """
        found = set()
        for entry in self.entries:
            data = _tested(entry, self.name)
            for number in entry["results"][self.name]["protocols"]:
                place = number["id"], number["key"], data
                if (
                    place not in found
                    and is_measured(number["value"])
                    and is_measured(number["standard_error"])
                ):
                    found.add(place)
                    yield number, data, entry["results"][self.name].get("precision")

    def equals(self, other: "_Run") -> bool:
        """Return whether two baselines are equal: both are raw pixels, or have the same random weights."""
        if self.name == "raw_pixels":
            return True
        own, others = (
            {(number["id"], number["key"], data): number["value"] for number, data in run.numbers()}
            for run in (self, other)
        )
        shared = own.keys() & others.keys()
        return self.seed == other.seed and bool(shared) and all(own[at] == others[at] for at in shared)


def compare(entries: Sequence[dict[str, Any]], baselines: bool = False) -> Comparison:
    """Return the comparison of runs.

    Args:
        entries: what `hf_ssl.cards.result_files.read_results` returns for each run. A run counts once, also
            if several entries contain its results: copies, or further evaluations of its encoder.
        baselines: whether the encoders before training and raw pixels are further rows.
    """
    skipped, repeated = [], []
    groups: dict[str, list[_Run]] = {}
    trainings: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        trainings.setdefault(_training(entry), []).append(entry)
    for given in trainings.values():
        different = list({json.dumps(entry, sort_keys=True): entry for entry in given}.values())
        different.sort(key=lambda entry: str(entry["date"]), reverse=True)
        evaluated = [entry for entry in different if _has_numbers(entry)]
        measured = sum(
            len(list(_Run("trained", [entry]).numbers())) for entry in given if _has_numbers(entry)
        )
        if measured > len(list(_Run("trained", evaluated).numbers())):
            repeated.append(
                f"{_described(given[0])}: its results were given several times and count once; the newest "
                "value of each number counts"
            )
        if not evaluated:
            skipped.append(f"{_described(different[0])}: {_reason(different[0])}")
        else:
            # Older versions did not record the settings.
            known = [entry["settings"] for entry in different if entry.get("settings") is not None]
            evaluated[0] = evaluated[0] | {"settings": known[0] if known else None}
            groups.setdefault(_group("trained", evaluated[0]), []).append(_Run("trained", evaluated))
    _join_unrecorded(groups)
    for name in ("start", "untrained", "raw_pixels") if baselines else ():
        for given in trainings.values():
            _add_baseline(groups, name, given)
    columns = _columns([run for runs in groups.values() for run in runs])
    firsts = [runs[0] for runs in groups.values()]
    labels = row_labels([run.name for run in firsts], [run.entries[0] for run in firsts])
    rows = [
        Row(label, [run.seed for run in runs], _cells(runs, columns), runs[0].name != "trained")
        for label, runs in zip(labels, groups.values(), strict=True)
    ]
    comparison = Comparison([row for row in rows if row.cells], columns, skipped, repeated)
    for column in columns:
        _add_differences(comparison, column)
    return comparison


def _training(entry: dict[str, Any]) -> str:
    """Return a text that is equal for all entries of the same encoder, which may be in several folders.

    The loss is recorded with all digits. Two trainings with equal settings, seed and loss count once, because
    they have equal weights.
    """
    if entry["training"] is None:  # an encoder that hf_ssl did not train
        encoder = ["weights", entry["weights"]] if entry["weights"] else ["model", entry["model"]]
        return json.dumps([*encoder, pooling_of(entry)])
    keys = ("recipe", "seed", "method", "backbone")
    source = [entry["data"].get(key) for key in ("name", "revision", "split", "images")]
    training = facts_of_weights(entry["training"])
    values = [*(entry[key] for key in keys), weight_overrides(entry), source, training, pooling_of(entry)]
    return json.dumps(values, sort_keys=True)


def _described(entry: dict[str, Any]) -> str:
    """Return the name of a run in a sentence."""
    return entry["model"] if entry["training"] is None else f"{entry['recipe']}, seed {entry['seed']}"


def _has_numbers(entry: dict[str, Any], name: str = "trained") -> bool:
    result = entry["results"].get(name)
    return entry["evaluation"] is not None and result is not None and bool(result["protocols"])


def _reason(entry: dict[str, Any]) -> str:
    """Return why a run has no number."""
    trained = entry["results"].get("trained")
    if entry["evaluation"] is None or trained is None:
        return "it was not evaluated; use hf-ssl evaluate FOLDER --output RESULTS"
    measured = "only LiDAR and alignment, which are not accuracies" if "quality" in trained else "no accuracy"
    return f"its evaluation contains {measured}; use a further protocol, such as --protocols quality,knn"


def _join_unrecorded(groups: dict[str, list[_Run]]) -> None:
    """Add runs whose settings an older version did not record to the only row that is equal otherwise."""
    equal: dict[str, list[str]] = {}  # the group without settings -> those with settings
    for group, runs in groups.items():
        without = _group("trained", runs[0].entries[0] | {"settings": None})
        equal.setdefault(without, []).extend([group] if group != without else [])
    for without, known in equal.items():
        if without in groups and len(known) == 1:
            groups[known[0]] += groups.pop(without)


def _add_baseline(groups: dict[str, list[_Run]], name: str, entries: list[dict[str, Any]]) -> None:
    """Add the evaluations of a baseline in the entries of a training."""
    own: dict[str, _Run] = {}
    for entry in (entry for entry in entries if _has_numbers(entry, name)):
        own.setdefault(group := _group(name, entry), _Run(name, [])).entries.append(entry)
        groups.setdefault(group, [])
    for group, run in own.items():
        same = [known for known in groups[group] if name != "start" and known.equals(run)]
        if same:
            same[0].entries += run.entries
        else:
            groups[group].append(run)


def _group(name: str, entry: dict[str, Any]) -> str:
    """Return a text that is equal for runs that differ only in the seed."""
    if name == "raw_pixels":
        return json.dumps([name, _tested(entry, name)])
    backbone = [entry["backbone"].get(key) for key in ("class_name", "parameters", "image_size")]
    if name == "untrained":
        return json.dumps([name, _tested(entry, name), backbone])
    if entry["training"] is None:
        return json.dumps([name, entry["model"], entry["weights"], pooling_of(entry)])
    data, training = entry["data"], entry["training"]
    keys = ("steps", "batch_size", "optimizer", "learning_rate", "precision")
    trained = [training.get(key) for key in keys]
    source = [data.get(key) for key in ("name", "revision", "split", "images")]
    # The file of a recipe may change between two runs.
    run = [entry["method"], entry["recipe"], weight_overrides(entry), entry.get("settings"), backbone, source]
    return json.dumps([name, *run, trained, pooling_of(entry)], sort_keys=True)


def _tested(entry: dict[str, Any], name: str) -> Tested:
    images, result = entry["evaluation"], entry["results"][name]
    revision = result.get("revision") or images["revision"]
    counts, classes = result["images"], result.get("classes")
    test = images["name"], revision, images["test_split"], counts["test"], classes
    return Tested(*test, images["train_split"], counts["train"])


def _columns(runs: list[_Run]) -> list[Column]:
    """Return the columns in the order of the first run that has them, with different headings."""
    found: dict[tuple[str, str, Tested], list[ProtocolResult]] = {}
    for run in runs:
        for number, data in run.numbers():
            found.setdefault((number["id"], number["key"], data), []).append(number)
    # The parts of a heading; each is used only if a heading would be ambiguous without it.
    headings = distinguished(
        [
            [
                numbers[0]["column"],
                f"on {data.name}",
                f"{counted(data.images, 'image')} of {data.split}, revision {data.revision[:8]}",
                "" if data.classes is None else counted(data.classes, "class", "classes"),
                f"with {counted(data.train_images, 'training image')} of {data.train_split}",
                protocol_id,
            ]
            for (protocol_id, _, data), numbers in found.items()
        ]
    )
    return [
        Column(
            protocol_id, key, data, heading, joined([each["text"] for each in numbers]), metric_of(numbers[0])
        )
        for heading, ((protocol_id, key, data), numbers) in zip(headings, found.items(), strict=True)
    ]


def _cells(runs: list[_Run], columns: list[Column]) -> dict[Column, Cell]:
    measured = [
        {(each["id"], each["key"], data): (each, precision) for each, data, precision in run.measured()}
        for run in runs
    ]
    cells: dict[Column, Cell] = {}
    for column in columns:
        having = [place for place, found in enumerate(measured) if column.place in found]
        numbers = [measured[place][column.place][0] for place in having]
        precisions = {measured[place][column.place][1] for place in having}
        if numbers:
            cell = Cell(
                [each["value"] for each in numbers],
                [each["standard_error"] for each in numbers],
                [runs[place].seed for place in having],
                [each["selection"] for each in numbers],
                precisions={each for each in precisions if each is not None},
            )
            packed: list[Any] = [each["details"].get("right") for each in numbers]
            if None not in packed:
                cell.right = [unpack_right(text, column.data.images) for text in packed]
            cells[column] = cell
    return cells


def _add_differences(comparison: Comparison, column: Column) -> None:
    """Compare each row with the best one of the column, if all their predictions were recorded."""
    best = comparison.best(column)
    reference = best.cells[column]
    for row in comparison.rows:
        cell = row.cells.get(column)
        if row is not best and cell is not None and cell.right and reference.right:
            cell.difference = paired_bootstrap(cell.right, reference.right)
