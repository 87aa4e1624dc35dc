# SPDX-License-Identifier: Apache-2.0
"""Tables of the results of a suite. All functions are pure (layer 3)."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_ssl.cards.text import markdown_row
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.evaluation.results import (
    ACCURACY,
    EncoderResult,
    ProtocolResult,
    find_results,
    in_percent,
    is_measured,
    metric_of,
)

_OF_CLASSES = ("top_1", "top_5", "mean_per_class")
_OWN_METRIC = ("retrieval", "segmentation", "attention_masks", "detection")
"""Protocols that do not predict the class of an image. Their columns contain their own metric."""
COLUMNS = {
    "top_1": "top-1",
    "top_5": "top-5",
    "mean_per_class": "mean per class",
    "mean_average_precision": "mAP, 11 points",
}
"""Value of `metric` in an entry -> its name in the table."""


class Measured(NamedTuple):
    """A job of a suite with its result.

    Attributes:
        entry, group, metric: names of the entry (data set), of the group of protocols, and of the metric.
        protocols: protocol of the group -> the protocol that runs.
        result: the result; None if the job failed or did not run.
        error: the reason for a missing result.
    """

    entry: str
    group: str
    metric: str
    protocols: dict[str, str]
    result: EncoderResult | None
    error: str | None


class Cell(NamedTuple):
    """A number of a data set, with its standard error if it is known, or the reason why it is missing."""

    value: float | None
    protocol: str
    id: str = ""
    reason: str = ""
    standard_error: float | None = None


@dataclass
class Column:
    """One number of a protocol, for all data sets of its group.

    Attributes:
        heading: a text that differs from the headings of all other columns.
        group: name of the group.
        protocol: protocol of the group.
        cells: the numbers by entry.
        outside: the entries of the suite that do not belong to the group.
    """

    heading: str
    group: str
    protocol: str
    cells: dict[str, Cell]
    outside: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Return the number of data sets in the suite."""
        return len(self.cells) + len(self.outside)

    @property
    def values(self) -> list[float]:
        return [cell.value for cell in self.cells.values() if cell.value is not None]

    @property
    def average(self) -> float | None:
        """Return the mean over the data sets with a number; None if there is none."""
        return statistics.mean(self.values) if self.values else None

    @property
    def missing(self) -> dict[str, str]:
        """Return the data sets without a number, with the reasons."""
        return {name: cell.reason for name, cell in self.cells.items() if cell.value is None}

    @property
    def sentence(self) -> str:
        """Return which data sets the average includes."""
        count, total = len(self.values), self.total
        if count == total:
            return f"{self.heading}: average over all {total} data sets"
        text = f"{self.heading}: average over {count} of {total} data sets"
        if self.missing:
            text += f"; missing: {', '.join(self.missing)}"
        if self.outside:
            text += f"; not in the group {self.group}: {', '.join(self.outside)}"
        return text


@dataclass
class Summary:
    """The results of a suite: title, name of the encoder, metric of each entry, and the columns.

    `precisions` contains the names of the jobs with each precision of the features.
    """

    title: str
    encoder: str
    metrics: dict[str, str]
    columns: list[Column]
    precisions: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "title": self.title,
            "encoder": self.encoder,
            "metrics": self.metrics,
            "precisions": self.precisions,
            "columns": [
                {
                    "heading": column.heading,
                    "group": column.group,
                    "protocol": column.protocol,
                    "average": column.average,
                    "data_sets": len(column.values),
                    "of": column.total,
                    "missing": column.missing,
                    "outside": column.outside,
                    "entries": {
                        name: {
                            "value": cell.value,
                            "standard_error": cell.standard_error,
                            "protocol": cell.protocol,
                            "id": cell.id,
                        }
                        for name, cell in column.cells.items()
                        if cell.value is not None
                    },
                }
                for column in self.columns
            ],
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Summary":
        """Return the summary that `to_dict` stored, also one of a version without standard errors."""
        columns = []
        for each in plain["columns"]:
            cells = {
                name: Cell(
                    found["value"], found["protocol"], found["id"],
                    standard_error=found.get("standard_error"),
                )
                for name, found in each["entries"].items()
            }  # fmt: skip
            cells |= {
                name: Cell(None, each["protocol"], reason=text) for name, text in each["missing"].items()
            }
            columns.append(Column(each["heading"], each["group"], each["protocol"], cells, each["outside"]))
        return cls(plain["title"], plain["encoder"], plain["metrics"], columns, plain.get("precisions", {}))


def summarize(title: str, encoder: str, measured: Sequence[Measured]) -> Summary:
    """Return the numbers of all jobs in columns. A protocol with several numbers has several columns.

    Args:
        title: title of the suite.
        encoder: name of the encoder.
        measured: the jobs with their results.
    """
    columns: list[Column] = []
    metrics = {job.entry: job.metric for job in measured}
    places = dict.fromkeys((job.group, protocol) for job in measured for protocol in job.protocols)
    for group, protocol in places:
        jobs = [job for job in measured if job.group == group and protocol in job.protocols]
        if protocol == "quality":  # it measures no accuracy; see the files of the jobs
            continue
        found = _aligned({job.entry: _numbers(job, protocol) for job in jobs})
        outside = [name for name in metrics if name not in found]
        for position in range(max(1, *map(len, found.values()))):
            at = {name: numbers[position] for name, numbers in found.items() if position < len(numbers)}
            own = [
                number["column"]
                for number in at.values()
                if number is not None and number["protocol"] == protocol
            ]
            heading = own[0] if len(set(own)) == 1 else PROTOCOLS[protocol].title
            if heading in [column.heading for column in columns]:
                heading = f"{heading} ({group}, {position + 1})"
            cells = {job.entry: _cell(job, protocol, at.get(job.entry)) for job in jobs}
            columns.append(Column(heading, group, protocol, cells, outside))
    precisions: dict[str, list[str]] = {}
    for job in measured:
        if job.result is not None and "precision" in job.result:
            precisions.setdefault(job.result["precision"], []).append(f"{job.entry}/{job.group}")
    return Summary(title, encoder, metrics, columns, precisions)


def _aligned(found: dict[str, list[ProtocolResult]]) -> dict[str, list[ProtocolResult | None]]:
    """Return the numbers of each data set, with None for numbers that only other data sets have.

    A data set may lack numbers, such as those with more labels than its smallest class has. Two numbers have
    the same place in the lists if `_place` returns the same text for both. If this text contains a number of
    images, it differs between data sets. The numbers of such a data set keep their own order.
    """
    most = max(found.values(), key=len)
    places = [_place(number) for number in most]
    for numbers in found.values():
        if all(_has_place(number, most[0]["protocol"]) for number in [*most, *numbers]):
            places += [place for place in map(_place, numbers) if place not in places]
    aligned: dict[str, list[ProtocolResult | None]] = {}
    for name, numbers in found.items():
        by_place = {_place(number): number for number in numbers}
        known = by_place.keys() <= set(places)
        aligned[name] = [by_place.get(place) for place in places] if known else [*numbers]
    return aligned


def _place(number: ProtocolResult) -> str:
    """Return how many labels a number used, such as "fraction 0.1"; its key if this is not recorded."""
    place: str = number["details"].get("labeled", number["key"])
    return place


def _has_place(number: ProtocolResult, protocol: str) -> bool:
    """Return whether a number belongs to a protocol, and its place does not contain a number of images."""
    return number["protocol"] == protocol and ("labeled" in number["details"] or number["key"] == protocol)


def _numbers(job: Measured, protocol: str) -> list[ProtocolResult]:
    return [] if job.result is None else find_results(job.result, job.protocols[protocol])


def _cell(job: Measured, protocol: str, number: ProtocolResult | None) -> Cell:
    """Return a number in the metric of its entry."""
    run = job.protocols[protocol]
    if job.result is None:
        return Cell(None, run, reason=job.error or "it was not measured")
    if number is None:
        start = f"{PROTOCOLS[run].title}: "
        skipped = [text.removeprefix(start) for text in job.result["skipped"] if text.startswith(start)]
        return Cell(None, run, reason=(skipped or ["the protocol does not return this number"])[0])
    if not is_measured(number["value"]):
        return Cell(None, run, reason=f"the result of {PROTOCOLS[run].title} is not finite")
    value = metric_value(number, job.metric)
    if value is None:
        return Cell(None, run, reason=f"{PROTOCOLS[run].title} does not measure {job.metric}")
    error = number["standard_error"] if _is_value(number, job.metric) else None
    return Cell(value, run, number["id"], standard_error=error)


def metric_value(result: ProtocolResult, metric: str) -> float | None:
    """Return a metric of a result; None if the protocol does not measure it.

    Accuracies are metrics of classifiers. The metric of retrieval, detection or segmentation is always that
    of the protocol.
    """
    return result["value"] if _is_value(result, metric) else result["metrics"].get(metric)


def _is_value(result: ProtocolResult, metric: str) -> bool:
    """Return whether the value of a result, to which its standard error belongs, is shown for this metric."""
    measured = metric_of(result)
    if measured == ACCURACY:
        return metric == "top_1"
    return metric == measured or (metric in _OF_CLASSES and result["protocol"] in _OWN_METRIC)


def markdown(summary: Summary) -> str:
    """Return the page of a suite in Markdown: title, encoder and table."""
    about = f"Encoder: `{summary.encoder}`. Numbers in percent, with the standard error if it is known."
    start = [f"# {summary.title}", "", about, ""]
    return "\n".join([*start, *table(summary)]) + "\n"


def table(summary: Summary) -> list[str]:
    """Return the lines of the table in Markdown, in percent, with a sentence about each average."""
    columns = summary.columns
    rows = [
        ["data set", "metric", *(column.heading for column in columns)],
        ["---"] * 2 + ["---:"] * len(columns),
    ]
    for name, metric in summary.metrics.items():
        cells = [column.cells.get(name) for column in columns]
        rows.append([name, COLUMNS[metric], *map(_cell_text, cells)])
    averages = [_text(column.average) + share(column) for column in columns]
    rows.append(["**average**", "", *averages])
    lines = [markdown_row(row) for row in rows]
    lines += ["", *(f"- {column.sentence}." for column in columns)]
    own = [column.heading for column in columns if column.protocol in _OWN_METRIC]
    lines += [f"- {heading}: the metric of this protocol, for each data set." for heading in own]
    return [*lines, *missing_reasons(summary), *replacements(summary), *different_precisions(summary)]


def missing_reasons(summary: Summary) -> list[str]:
    """Return one line for each reason why a data set has no number, with its columns if it has others."""
    columns: dict[tuple[str, str], list[str]] = {}
    for column in summary.columns:
        for name, reason in column.missing.items():
            columns.setdefault((name, reason), []).append(column.heading)
    lines = []
    for (name, reason), headings in columns.items():
        everywhere = [column.heading for column in summary.columns if name in column.cells] == headings
        where = "" if everywhere else f" ({', '.join(headings)})"
        lines.append(f"- {name}{where}: {reason.rstrip('.')}.")
    return lines


def replacements(summary: Summary) -> list[str]:
    """Return one line for each data set that has another protocol than the rest of its column."""
    return [
        f"- {name}: {PROTOCOLS[cell.protocol].title} instead of {PROTOCOLS[column.protocol].title}."
        for column in summary.columns
        for name, cell in column.cells.items()
        if cell.protocol != column.protocol and cell.value is not None
    ]


def different_precisions(summary: Summary) -> list[str]:
    """Return a line if jobs have different precisions.

    With `evaluation.precision=auto`, each machine chooses the fastest one.
    """
    if len(summary.precisions) < 2:
        return []
    jobs = "; ".join(f"{name} ({', '.join(found)})" for name, found in summary.precisions.items())
    return [
        f"- The precision of the features differs between jobs: {jobs}. To have one precision, repeat the "
        "suite in another folder with evaluation.precision=float32."
    ]


def _cell_text(cell: Cell | None) -> str:
    """Return a number with its standard error: "61.2 ± 0.4"."""
    if cell is None or cell.standard_error is None:
        return _text(None if cell is None else cell.value)
    return f"{_text(cell.value)} ± {in_percent(cell.standard_error)}"


def _text(value: float | None) -> str:
    return "-" if value is None else in_percent(value)


def share(column: Column) -> str:
    """Return " (2 of 3)" if a column has numbers for 2 of its 3 data sets, and "" for none or all."""
    count = len(column.values)
    return f" ({count} of {column.total})" if 0 < count < column.total else ""


def csv_text(summary: Summary) -> str:
    """Return the numbers as CSV, one row for each data set and column, and for each average."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = ("encoder", "data_set", "metric", "group", "column", "protocol", "id")
    writer.writerow([*names, "value", "standard_error", "missing"])
    for column in summary.columns:
        for name, cell in column.cells.items():
            about = (summary.encoder, name, summary.metrics[name], column.group, column.heading)
            numbers = _decimal(cell.value), _decimal(cell.standard_error)
            writer.writerow([*about, cell.protocol, cell.id, *numbers, cell.reason])
        about = (summary.encoder, "average", "", column.group, column.heading)
        missing = " ".join([*column.missing, *column.outside])
        writer.writerow([*about, column.protocol, "", _decimal(column.average), "", missing])
    return stream.getvalue()


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
