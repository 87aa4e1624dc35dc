# SPDX-License-Identifier: Apache-2.0
"""The page, the table and the plot of a sweep. All functions but `draw` are pure (layer 3)."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten, wrap
from types import MappingProxyType
from typing import Any

from hf_ssl.cards.short_texts import joined
from hf_ssl.cards.text import ENCODERS, duration, markdown_row
from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.evaluation.results import (
    ACCURACY,
    EncoderResult,
    ProtocolResult,
    in_percent,
    is_measured,
    metric_of,
)

BASELINES = ("untrained", "start", "raw_pixels")
_IN_A_ROW = 4  # panels of the plot


@dataclass(frozen=True)
class Measured:
    """A finished run.

    Attributes:
        name: name of the combination, which all seeds share.
        arm, values, seed: see `hf_ssl.sweep_file.Run`.
        training: facts of the training; {} for an encoder that was only evaluated.
        results: the results by encoder.
        alarm: message of the collapse alarm, if any.
        images: name of the test images.
        history: measurements of the monitor with their `step`, in order.
    """

    name: str
    arm: str
    values: dict[str, Any]
    seed: int
    training: dict[str, Any]
    results: dict[str, EncoderResult]
    alarm: str | None
    images: str
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, name: str, arm: str, values: dict[str, Any], seed: int, entry: dict[str, Any],
        history: list[dict[str, Any]],
    ) -> "Measured":  # fmt: skip
        """Return the run with this entry (`hf_ssl.cards.facts.result_entry`)."""
        evaluation = entry["evaluation"]
        images = entry["data"]["name"] if evaluation is None else evaluation["name"]
        training, results = entry["training"] or {}, entry["results"]
        return cls(name, arm, values, seed, training, results, entry["collapse"], images, history)

    @property
    def seconds(self) -> float | None:
        """Duration of the training; None without a training."""
        return self.training.get("seconds")

    def further(self, column: str) -> float | None:
        """Return the number of a further column: a key of `COLUMNS`, or the last value of a measurement."""
        if column in COLUMNS:
            return COLUMNS[column][1](self)
        return next((each[column] for each in reversed(self.history) if column in each), None)

    def numbers(self, encoder: str = "trained") -> dict[str, ProtocolResult]:
        """Return {id and key: number} of an encoder."""
        result = self.results.get(encoder)
        return {} if result is None else {f"{each['id']} {each['key']}": each for each in result["protocols"]}


def _evaluation_seconds(run: Measured) -> float | None:
    seconds = run.results["trained"]["seconds"] if "trained" in run.results else {}
    return sum(seconds.values()) if seconds else None


COLUMNS: dict[str, tuple[str, Callable[[Measured], float | None]]] = {
    "memory": ("peak memory, GiB", lambda run: run.training.get("peak_memory_gib")),
    "steps": ("steps", lambda run: run.training.get("steps")),
    "evaluation_seconds": ("evaluation, s", _evaluation_seconds),
}
"""Further column of a study -> its heading and its number."""


def _groups(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the runs of each combination, which differ only in the seed."""
    found: dict[str, list[Measured]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


def _columns(runs: Sequence[Measured]) -> dict[str, str]:
    """Return {id and key: heading} of all numbers, in the order of the first run that has them."""
    found: dict[str, str] = {}
    for run in runs:
        for key, number in run.numbers().items():
            found.setdefault(key, number["column"])
    return found


def _mean(numbers: Sequence[ProtocolResult], runs: int) -> str:
    """Return a mean in percent with its error (see `_error`).

    The text names the number of values if some of the runs have none.
    """
    if not numbers:
        return "-"
    error = _error(numbers)
    deviation = "" if error is None else f" ± {in_percent(error)}"
    share = f" ({len(numbers)} of {runs})" if len(numbers) < runs else ""
    return in_percent(statistics.mean(each["value"] for each in numbers)) + deviation + share


def _error(numbers: Sequence[ProtocolResult]) -> float | None:
    """Return the standard deviation (n - 1) over seeds, or the standard error over images of a single run."""
    if len(numbers) > 1:
        return statistics.stdev(each["value"] for each in numbers)
    error = numbers[0]["standard_error"]
    return error if is_measured(error) else None


def page(
    title: str,
    question: str,
    runs: Sequence[Measured],
    failed: Mapping[str, str],
    further: Sequence[str] = (),
    ranks: bool = False,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the page of a sweep in Markdown: question, plot, table and missing runs.

    Args:
        title, question: of the study.
        runs: the finished runs.
        failed: {name of a run without a result: reason}.
        further, ranks: see `columns` and `ranks` of `hf_ssl.sweep_file.Study`.
        pictures: {further file: caption}.
    """
    columns = _columns(runs)
    lines = [f"# {title}", "", *([question, ""] if question else [])]
    headings = [COLUMNS[key][0] if key in COLUMNS else _heading(key) for key in further]
    heading = ["", *columns.values(), "RankMe", *headings, "training", "runs"]
    lines += [markdown_row(heading), "|---|" + "---:|" * (len(heading) - 1)]
    for name, group in _groups(runs).items():
        cells = [_mean(_measured(group, key), len(group)) for key in columns]
        cells.append(_rank(group, "trained"))
        for key in further:
            found = [value for run in group if (value := run.further(key)) is not None]
            cells.append(f"{statistics.mean(found):.4g}" if found else "-")
        seconds = [run.seconds for run in group if run.seconds is not None]
        cells.append(duration(statistics.mean(seconds)) if seconds else "-")
        lines.append(markdown_row([name, *cells, str(len(group))]))
    for encoder in BASELINES:
        having = _groups([run for run in runs if run.numbers(encoder)])
        for name, group in having.items():
            cells = [_mean(_measured(group, key, encoder), len(group)) for key in columns]
            cells += [_rank(group, encoder), *["-"] * (len(further) + 1)]
            words = ENCODERS[encoder] + (f" ({name})" if len(having) > 1 else "")
            lines.append(markdown_row([words, *cells, str(len(group))]))
    lines += _ranks_table(runs, columns) if ranks else []
    lines += _seconds_table(runs) if "evaluation_seconds" in further else []
    images = ", ".join(dict.fromkeys(run.images for run in runs))
    metrics = {metric_of(number) for run in runs for number in run.numbers().values()}
    words = "Accuracy" if metrics <= {ACCURACY} else "Results"
    about = (
        f"{words} in percent on {images}; mean ± standard deviation over seeds. For a single run, ± is the "
        "standard error over the test images. RankMe is the effective rank of the features."
    )
    if not columns:
        about = "The data have no labels, so there is no accuracy."
    lines += ["", f"{about} `sweep.csv` has all runs, and the protocols are described below.", ""]
    shown = {"sweep.png": "Accuracy of each combination"} if columns else {}
    shown |= pictures
    lines += [line for file, words in shown.items() for line in (f"![{words}]({file})", "")]
    texts: dict[str, list[str]] = {}
    for number in (number for run in runs for number in run.numbers().values()):
        texts.setdefault(number["column"], []).append(number["text"])
    lines += [f"- {column}: {joined(found)}." for column, found in texts.items()]
    alarms = {run.name: run.alarm for run in runs if run.alarm is not None}
    lines += [f"- Alarm of the monitor in {name}: {text.rstrip('.')}." for name, text in alarms.items()]
    lines += [f"- Missing: {name}: {reason.rstrip('.')}." for name, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _measured(runs: Sequence[Measured], key: str, encoder: str = "trained") -> list[ProtocolResult]:
    """Return the numbers of some runs that are finite."""
    numbers = [run.numbers(encoder).get(key) for run in runs]
    return [each for each in numbers if each is not None and is_measured(each["value"])]


def _rank(runs: Sequence[Measured], encoder: str) -> str:
    results = [run.results[encoder] for run in runs if encoder in run.results]
    ranks = [each["statistics"]["rank_me"] for each in results]
    return f"{statistics.mean(ranks):.1f}" if ranks else "-"


def _heading(measurement: str) -> str:
    """Return the words for a measurement of the monitor."""
    return MEASUREMENTS[measurement].text if measurement in MEASUREMENTS else measurement.replace("_", " ")


def _ranks_table(runs: Sequence[Measured], columns: Mapping[str, str]) -> list[str]:
    """Return the rank of each combination in each column in Markdown. Equal means have the same rank."""
    groups = _groups(runs)
    means: dict[str, dict[str, float]] = {}
    for key in columns:
        values = {name: [each["value"] for each in _measured(group, key)] for name, group in groups.items()}
        means[key] = {name: statistics.mean(found) for name, found in values.items() if found}
    lines = ["", "Ranks (1: highest mean)", "", markdown_row(["", *columns.values()])]
    lines.append("|---|" + "---:|" * len(columns))
    for name in groups:
        cells = []
        for each in means.values():
            better = sum(value > each[name] for value in each.values()) if name in each else None
            cells.append("-" if better is None else str(better + 1))
        lines.append(markdown_row([name, *cells]))
    return lines


def _seconds_table(runs: Sequence[Measured]) -> list[str]:
    """Return the mean seconds of each protocol and of the extraction of features in Markdown."""
    timed = {
        name: [run.results["trained"]["seconds"] for run in group if "trained" in run.results]
        for name, group in _groups(runs).items()
    }
    names = list(dict.fromkeys(key for group in timed.values() for each in group for key in each))
    titles = [PROTOCOLS[key].title if key in PROTOCOLS else key for key in names]
    titles = ["extraction of features" if key == "features" else key for key in titles]
    heading = COLUMNS["evaluation_seconds"][0]
    about = f'Seconds of each part of the evaluation; their sum is the column "{heading}".'
    lines = ["", about, "", markdown_row(["", *titles])]
    lines.append("|---|" + "---:|" * len(names))
    for name, group in timed.items():
        found = [[each[key] for each in group if key in each] for key in names]
        cells = [f"{statistics.mean(each):.1f}" if each else "-" for each in found]
        lines.append(markdown_row([name, *cells]))
    return lines


def csv_text(runs: Sequence[Measured], axes: Sequence[str]) -> str:
    """Return one line for each number of each run."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["name", "arm", *axes, "seed", "encoder", "column", "id", "value", "standard_error", "seconds"]
    )
    for run in runs:
        about = [run.name, run.arm, *(run.values.get(key, "") for key in axes), run.seed]
        seconds = "" if run.seconds is None else f"{run.seconds:.1f}"
        for encoder in ("trained", *BASELINES):
            for number in run.numbers(encoder).values():
                values = number["value"], number["standard_error"]
                texts = ["" if each is None else f"{each:.6f}" for each in values]
                writer.writerow([*about, encoder, number["column"], number["id"], *texts, seconds])
        if not run.numbers():
            writer.writerow([*about, "trained", "", "", "", "", seconds])
    return stream.getvalue()


def draw(runs: Sequence[Measured], axes: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Draw the numbers of each protocol over the first axis.

    There is one line for each arm and each value of the other axes.

    Without an axis of numbers, the combinations are bars. Error bars are standard deviations over seeds, or
    the standard error over the images of a single run.
    Without any accuracy, nothing is written.
    """
    if not _columns(runs):
        return
    from matplotlib.figure import Figure

    columns = _drawn(runs)
    axis = next(
        (key for key, values in axes.items() if len(values) > 1 and all(map(_is_number, values))), None
    )
    groups = _groups(runs)
    width = min(len(columns), _IN_A_ROW)
    rows = -(-len(columns) // width)
    height = 3.0 if axis is not None else 0.8 + 0.3 * len(groups)
    size = (1.5 + 4.2 * width, 0.4 + height * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    panels = list(figure.subplots(rows, width, squeeze=False).flat)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    for number, (panel, (key, heading)) in enumerate(zip(panels, columns.items(), strict=False)):
        points = {name: found for name, group in groups.items() if (found := _measured(group, key))}
        if axis is None:
            _bars(panel, list(groups), points, named=number % width == 0)
        else:
            _lines(panel, groups, points, axis)
            panel.set_ylabel("percent", fontsize=8)
        _baselines(panel, runs, key, vertical=axis is None)
        panel.set_title(heading, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        options: Any = {"loc": "outside lower center", "ncols": 4, "fontsize": 7, "frameon": False}
        figure.legend(handles, labels, **options)
    figure.savefig(path, format="png")


def _drawn(runs: Sequence[Measured]) -> dict[str, str]:
    """Return {id and key: heading} of the numbers that are drawn: of k-NN only the first, of others all."""
    numbers = {key: number for run in runs for key, number in run.numbers().items()}
    first = next((key for key in numbers if numbers[key].get("protocol") == "knn"), None)
    kept = [key for key in numbers if key == first or numbers[key].get("protocol") != "knn"]
    columns = _columns(runs)
    return {key: columns[key] for key in kept[: 3 * _IN_A_ROW]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bars(
    panel: Any, names: Sequence[str], points: Mapping[str, Sequence[ProtocolResult]], *, named: bool
) -> None:
    for place, name in enumerate(names):
        if name in points:
            mean, error = _in_percent(points[name])
            panel.barh(place, mean, xerr=error, color=f"C{place % 10}", height=0.6)
    labels = [shorten(name, 60) for name in names] if named else [""] * len(names)
    panel.set_yticks(range(len(names)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("percent", fontsize=8)


def _in_percent(numbers: Sequence[ProtocolResult]) -> tuple[float, float]:
    """Return a mean and its error (0 if there is none) in percent."""
    return 100 * statistics.mean(each["value"] for each in numbers), 100 * (_error(numbers) or 0.0)


def _lines(
    panel: Any,
    groups: Mapping[str, Sequence[Measured]],
    points: Mapping[str, Sequence[ProtocolResult]],
    axis: str,
) -> None:
    series: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    for name, group in groups.items():
        run = group[0]
        others = [f"{key.rpartition('.')[2]} {value}" for key, value in run.values.items() if key != axis]
        if name in points:
            point = run.values[axis], _in_percent(points[name])
            series.setdefault(", ".join(filter(None, [run.arm, *others])), []).append(point)
    for label, found in series.items():
        found.sort(key=lambda each: each[0])
        means, errors = zip(*(each for _, each in found), strict=True)
        style = {"marker": "o", "markersize": 4, "capsize": 3}
        panel.errorbar([place for place, _ in found], means, yerr=errors, label=label or None, **style)
    places = sorted({place for found in series.values() for place, _ in found})
    if not places:  # no finite number
        return
    if places[0] > 0 and places[-1] / places[0] >= 4:
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.set_xlabel(axis, fontsize=8)


def _baselines(panel: Any, runs: Sequence[Measured], key: str, *, vertical: bool) -> None:
    """Draw a dashed line for each baseline that is the same for all runs."""
    line = panel.axvline if vertical else panel.axhline
    for encoder, color in zip(BASELINES, ("gray", "gray", "black"), strict=True):
        values = {run.numbers(encoder)[key]["value"] for run in runs if key in run.numbers(encoder)}
        if len(values) == 1 and is_measured(value := values.pop()):
            line(100 * value, color=color, linestyle="--", linewidth=0.8, label=ENCODERS[encoder])


def draw_curves(runs: Sequence[Measured], names: Sequence[str], path: Path) -> None:
    """Draw measurements of the monitor over the steps: one line for each combination, the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.6 * len(names), 3.6), layout="constrained", dpi=130)
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, (label, group) in enumerate(_groups(runs).items()):
            points: dict[int, list[float]] = {}
            for record in (record for run in group for record in run.history):
                if is_measured(record.get(name)):
                    points.setdefault(record["step"], []).append(record[name])
            steps = sorted(points)
            means = [statistics.mean(points[step]) for step in steps]
            style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
            panel.plot(steps, means, label=shorten(label, 60), marker=".", linewidth=1.2, **style)
        panel.set_title("\n".join(wrap(_heading(name), 36)), fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    options: Any = {"loc": "outside lower center", "ncols": 4, "fontsize": 7, "frameon": False}
    figure.legend(handles, labels, **options)
    figure.savefig(path, format="png")
