# SPDX-License-Identifier: Apache-2.0
"""Compares the results of runs. The runs of a row differ only in the seed; see `Column` for the columns.

All functions are pure. `hf_ssl.comparing` reads the runs and writes the files.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_ssl.cards.text import ENCODERS
from hf_ssl.evaluation.bootstrap import Difference, paired_bootstrap, unpack_right
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.methods import METHODS

# Overrides that do not distinguish runs: they do not change the weights, or their effect is recorded.
_IGNORED = (
    "training.seed", "training.output_dir", "training.run_name", "training.report_to",
    "training.disable_tqdm", "training.dataloader_num_workers", "training.push_to_hub",
    "training.hub_model_id", "data.path", "data.cache", "evaluation", "publish",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Numbers that can be compared: of one protocol id, measured on the same test images.

    Attributes:
        id: see `hf_ssl.evaluation.results.result_id`.
        key: the key of the number.
        data: name, revision, split and number of the test images.
        heading: a text that differs from the headings of all other columns.
        text: how the number of the first run was measured.
    """

    id: str
    key: str
    data: tuple[str, str, str, int]
    heading: str
    text: str

    @property
    def place(self) -> tuple[Any, ...]:
        return self.id, self.key, self.data


@dataclass
class Cell:
    """The numbers of the runs of one row in one column.

    Attributes:
        values: one accuracy for each run.
        standard_errors: of each run, over the test images.
        right: for each run, which test images were classified correctly; empty if a run did not record it.
        difference: mean of this row minus that of the best row; None: this is the best row, or there are no
            predictions to compare.
    """

    values: list[float]
    standard_errors: list[float]
    right: list[Any] = field(default_factory=list)
    difference: Difference | None = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation (n - 1) over the runs; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Row:
    """Runs that differ only in the seed. `cells` has no entry for a column that was not measured."""

    label: str
    seeds: list[int]
    cells: dict[Column, Cell]
    is_baseline: bool = False


@dataclass
class Comparison:
    """The rows and the columns of a comparison, and entries without a result, in words."""

    rows: list[Row]
    columns: list[Column]
    skipped: list[str]

    def best(self, column: Column) -> Row:
        """Return the row with the highest mean in a column. Baselines count only if there is no other row."""
        rows = [row for row in self.rows if column in row.cells]
        trained = [row for row in rows if not row.is_baseline]
        return max(trained or rows, key=lambda row: row.cells[column].mean)


def compare(entries: Sequence[dict[str, Any]], baselines: bool = False) -> Comparison:
    """Return the comparison of runs.

    Args:
        entries: what `hf_ssl.cards.facts.result_entry` returns for each run. Equal entries count once.
        baselines: whether the encoders before training and raw pixels are further rows.
    """
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    skipped = []
    for name in ["trained", *(("start", "untrained", "raw_pixels") if baselines else ())]:
        for entry in _unique(entries):
            if entry["results"].get(name) is not None and entry["evaluation"] is not None:
                groups.setdefault(_group(name, entry), []).append((name, entry))
            elif name == "trained":
                skipped.append(f"{entry['recipe']}, seed {entry['seed']}: it was not evaluated")
    for runs in groups.values():
        if runs[0][0] == "raw_pixels":  # the same in all runs
            del runs[1:]
        elif runs[0][0] == "untrained":  # runs with the same seed have the same encoder before training
            numbers = [(entry["seed"], entry["results"][name]["protocols"]) for name, entry in runs]
            runs[:] = [run for place, run in enumerate(runs) if numbers[place] not in numbers[:place]]
    columns = _columns([run for runs in groups.values() for run in runs])
    rows = [
        Row(label, [entry["seed"] for _, entry in runs], _cells(runs, columns), runs[0][0] != "trained")
        for label, runs in zip(_labels(list(groups.values())), groups.values(), strict=True)
    ]
    comparison = Comparison(rows, columns, skipped)
    for column in columns:
        _add_differences(comparison, column)
    return comparison


def _unique(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries without repetitions: a run may be in facts.json and in a results file."""
    return list({json.dumps(entry, sort_keys=True): entry for entry in entries}.values())


def _group(name: str, entry: dict[str, Any]) -> str:
    """Return a text that is equal for runs that differ only in the seed."""
    tested = _tested(entry, entry["results"][name])
    backbone = [entry["backbone"].get(key) for key in ("class_name", "parameters", "image_size")]
    if name == "raw_pixels":
        return json.dumps([name, tested])
    if name == "untrained":
        return json.dumps([name, tested, backbone])
    data, training = entry["data"], entry["training"]
    keys = ("steps", "batch_size", "optimizer", "learning_rate", "precision")
    trained = [training.get(key) for key in keys]
    source = [data.get(key) for key in ("name", "revision", "split", "images")]
    return json.dumps([name, entry["method"], entry["recipe"], _overrides(entry), backbone, source, trained])


def _overrides(entry: dict[str, Any]) -> list[str]:
    """Return the overrides that distinguish a run from others of its recipe."""
    return [
        text
        for text in entry["overrides"]
        if (key := text.partition("=")[0]) not in _IGNORED and key.partition(".")[0] not in _IGNORED
    ]


def _tested(entry: dict[str, Any], result: dict[str, Any]) -> tuple[str, str, str, int]:
    images = entry["evaluation"]
    revision = result.get("revision") or images["revision"]
    return images["name"], revision, images["test_split"], result["images"]["test"]


def _columns(runs: list[tuple[str, dict[str, Any]]]) -> list[Column]:
    """Return the columns in the order of the first run that has them, with different headings."""
    found: dict[tuple[Any, ...], tuple[ProtocolResult, tuple[str, str, str, int]]] = {}
    for name, entry in runs:
        result = entry["results"][name]
        data = _tested(entry, result)
        for number in result["protocols"]:
            found.setdefault((number["id"], number["key"], data), (number, data))
    # The parts of a heading; each is used only if a heading would be ambiguous without it.
    images = [f"{data[3]:,} images of {data[2]}, revision {data[1][:8]}" for _, data in found.values()]
    headings = distinguished(
        [
            [number["column"], f"on {data[0]}", text, number["id"]]
            for text, (number, data) in zip(images, found.values(), strict=True)
        ]
    )
    return [
        Column(number["id"], number["key"], data, heading, number["text"])
        for heading, (number, data) in zip(headings, found.values(), strict=True)
    ]


def _cells(runs: list[tuple[str, dict[str, Any]]], columns: list[Column]) -> dict[Column, Cell]:
    cells: dict[Column, Cell] = {}
    for column in columns:
        numbers = [
            number
            for name, entry in runs
            for number in entry["results"][name]["protocols"]
            if (number["id"], number["key"], _tested(entry, entry["results"][name])) == column.place
        ]
        if numbers:
            cell = Cell([each["value"] for each in numbers], [each["standard_error"] for each in numbers])
            packed = [each["details"].get("right") for each in numbers]
            if None not in packed:
                cell.right = [unpack_right(text, column.data[3]) for text in packed]
            cells[column] = cell
    return cells


def _labels(groups: list[list[tuple[str, dict[str, Any]]]]) -> list[str]:
    """Return a different name for each group: its method, and as much more as is needed."""
    parts = []
    for (name, entry), *_ in groups:
        method = METHODS[entry["method"]].title if entry["method"] in METHODS else entry["method"]
        backbone, data, training = entry["backbone"], entry["data"], entry["training"]
        network = [backbone["class_name"].removesuffix("Model"), f"{backbone['parameters']:,} parameters"]
        run = [
            f"on {data['name']}",
            f"{training['steps']:,} steps",
            f"recipe {entry['recipe']}",
            ", ".join(_overrides(entry)),
            f"revision {data['revision'][:8]}, batch size {training['batch_size']}, {training['precision']}",
        ]
        if name in ("untrained", "raw_pixels"):  # they do not depend on the training
            method, run = ENCODERS[name], [f"on {entry['evaluation']['name']}", "", "", "", ""]
        elif name == "start":
            method = f"{ENCODERS[name]} of {method}"
        parts.append([method, *(network if name != "raw_pixels" else ["", ""]), *run])
    return distinguished(parts)


def distinguished(parts: list[list[str]]) -> list[str]:
    """Return different texts: the first part, and those further parts that distinguish equal texts.

    Args:
        parts: for each text, the same number of parts. Texts whose parts are all equal get numbers.
    """
    texts = [first for first, *_ in parts]
    for number in range(1, max(map(len, parts), default=1)):
        values: dict[str, set[str]] = {}
        for text, own in zip(texts, parts, strict=True):
            values.setdefault(text, set()).add(own[number])
        texts = [
            f"{text}, {own[number]}" if len(values[text]) > 1 and own[number] else text
            for text, own in zip(texts, parts, strict=True)
        ]
    seen: dict[str, int] = {}
    for position, text in enumerate(texts):
        seen[text] = seen.get(text, 0) + 1
        if seen[text] > 1:
            texts[position] = f"{text} ({seen[text]})"
    return texts


def _add_differences(comparison: Comparison, column: Column) -> None:
    """Compare each row with the best one of the column, if all their predictions were recorded."""
    best = comparison.best(column)
    reference = best.cells[column]
    for row in comparison.rows:
        cell = row.cells.get(column)
        if row is not best and cell is not None and cell.right and reference.right:
            cell.difference = paired_bootstrap(cell.right, reference.right)
