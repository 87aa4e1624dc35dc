# SPDX-License-Identifier: Apache-2.0
"""The page, the table and the plot of a sweep. All functions but `draw` are pure (layer 3)."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from hf_ssl.cards.facts import Facts
from hf_ssl.cards.short_texts import joined
from hf_ssl.cards.text import ENCODERS, duration, markdown_row
from hf_ssl.evaluation.results import EncoderResult, ProtocolResult, in_percent, is_measured

BASELINES = ("untrained", "start", "raw_pixels")
_PANELS = 2  # of the plot


@dataclass(frozen=True)
class Measured:
    """A finished run.

    Attributes:
        name: name of the combination, which all seeds share.
        arm, values: see `hf_ssl.sweep_file.Run`.
        seed, seconds: seed and duration of the training.
        results: the results by encoder.
        alarm: message of the collapse alarm, if any.
        images: name of the test images.
    """

    name: str
    arm: str
    values: dict[str, Any]
    seed: int
    seconds: float
    results: dict[str, EncoderResult]
    alarm: str | None
    images: str

    @classmethod
    def of(cls, name: str, arm: str, values: dict[str, Any], facts: Facts) -> "Measured":
        """Return the run with these facts."""
        training, evaluation = facts["training"], facts["evaluation"]
        images = facts["data"]["name"] if evaluation is None else evaluation["name"]
        return cls(
            name, arm, values, training["seed"], training["seconds"], facts["results"],
            facts["monitor"]["alarm"], images,
        )  # fmt: skip

    def numbers(self, encoder: str = "trained") -> dict[str, ProtocolResult]:
        """Return {id and key: number} of an encoder."""
        result = self.results.get(encoder)
        return {} if result is None else {f"{each['id']} {each['key']}": each for each in result["protocols"]}


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


def _mean(values: Sequence[float], runs: int) -> str:
    """Return a mean in percent, with the standard deviation (n - 1) of several values.

    The text names the number of values if some of the runs have none.
    """
    if not values:
        return "-"
    deviation = f" ± {in_percent(statistics.stdev(values))}" if len(values) > 1 else ""
    share = f" ({len(values)} of {runs})" if len(values) < runs else ""
    return in_percent(statistics.mean(values)) + deviation + share


def page(title: str, question: str, runs: Sequence[Measured], failed: Mapping[str, str]) -> str:
    """Return the page of a sweep in Markdown: question, plot, table and missing runs.

    Args:
        title, question: of the study.
        runs: the finished runs.
        failed: {name of a run without a result: reason}.
    """
    columns = _columns(runs)
    lines = [f"# {title}", "", *([question, ""] if question else [])]
    heading = ["", *columns.values(), "RankMe", "training", "runs"]
    lines += [markdown_row(heading), "|---|" + "---:|" * (len(heading) - 1)]
    for name, group in _groups(runs).items():
        cells = [_mean(_values(group, key), len(group)) for key in columns]
        ranks = [run.results["trained"]["statistics"]["rank_me"] for run in group if "trained" in run.results]
        rank = f"{statistics.mean(ranks):.1f}" if ranks else "-"
        seconds = duration(statistics.mean(run.seconds for run in group))
        lines.append(markdown_row([name, *cells, rank, seconds, str(len(group))]))
    for encoder in BASELINES:
        having = [run for run in runs if run.numbers(encoder)]
        for run in having:
            numbers = run.numbers(encoder)
            values = [numbers[key]["value"] if key in numbers else None for key in columns]
            cells = [in_percent(value) if is_measured(value) else "-" for value in values]
            words = ENCODERS[encoder] + (f" ({run.name})" if len(having) > 1 else "")
            rank = f"{run.results[encoder]['statistics']['rank_me']:.1f}"
            lines.append(markdown_row([words, *cells, rank, "-", "1"]))
    images = ", ".join(dict.fromkeys(run.images for run in runs))
    about = f"Accuracy in percent on {images}; mean ± standard deviation over seeds."
    if not columns:
        about = "The data have no labels, so there is no accuracy."
    lines += ["", f"{about} `sweep.csv` has all runs.", ""]
    lines += ["![Accuracy of each combination](sweep.png)", ""] if columns else []
    texts: dict[str, list[str]] = {}
    for number in (number for run in runs for number in run.numbers().values()):
        texts.setdefault(number["column"], []).append(number["text"])
    lines += [f"- {column}: {joined(found)}." for column, found in texts.items()]
    alarms = {run.name: run.alarm for run in runs if run.alarm is not None}
    lines += [f"- Alarm of the monitor in {name}: {text.rstrip('.')}." for name, text in alarms.items()]
    lines += [f"- Missing: {name}: {reason.rstrip('.')}." for name, reason in failed.items()]
    return "\n".join(lines) + "\n"


def _values(runs: Sequence[Measured], key: str) -> list[float]:
    numbers = [run.numbers().get(key) for run in runs]
    return [each["value"] for each in numbers if each is not None and is_measured(each["value"])]


def csv_text(runs: Sequence[Measured], axes: Sequence[str]) -> str:
    """Return one line for each number of each run."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["name", "arm", *axes, "seed", "encoder", "column", "id", "value", "standard_error", "seconds"]
    )
    for run in runs:
        about = [run.name, run.arm, *(run.values.get(key, "") for key in axes), run.seed]
        seconds = f"{run.seconds:.1f}"
        for encoder in ("trained", *BASELINES):
            for number in run.numbers(encoder).values():
                values = number["value"], number["standard_error"]
                texts = ["" if each is None else f"{each:.6f}" for each in values]
                writer.writerow([*about, encoder, number["column"], number["id"], *texts, seconds])
        if not run.numbers():
            writer.writerow([*about, "trained", "", "", "", "", seconds])
    return stream.getvalue()


def draw(runs: Sequence[Measured], axes: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Draw the first numbers over the first axis: one line for each arm and each value of the other axes.

    Without an axis of numbers, the combinations are bars. Error bars are standard deviations over seeds.
    Without any accuracy, nothing is written.
    """
    if not _columns(runs):
        return
    from matplotlib.figure import Figure

    columns = list(_columns(runs).items())[:_PANELS]
    axis = next(
        (key for key, values in axes.items() if len(values) > 1 and all(map(_is_number, values))), None
    )
    groups = _groups(runs)
    height = 3.4 if axis is not None else 1.2 + 0.3 * len(groups)
    figure = Figure(figsize=(1.5 + 4.2 * len(columns), height), layout="constrained", dpi=130)
    panels = figure.subplots(1, max(1, len(columns)), squeeze=False)[0]
    for panel, (key, heading) in zip(panels, columns, strict=False):
        points = {name: _values(group, key) for name, group in groups.items()}
        if axis is None:
            _bars(panel, points)
        else:
            _lines(panel, groups, points, axis)
        _baselines(panel, runs, key, vertical=axis is None)
        panel.set_title(heading, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    if axis is not None:
        panels[0].set_ylabel("accuracy in percent", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        options: Any = {"loc": "outside lower center", "ncols": 4, "fontsize": 7, "frameon": False}
        figure.legend(handles, labels, **options)
    figure.savefig(path, format="png")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bars(panel: Any, points: Mapping[str, Sequence[float]]) -> None:
    for place, values in enumerate(points.values()):
        if values:
            error = 100 * statistics.stdev(values) if len(values) > 1 else None
            panel.barh(place, 100 * statistics.mean(values), xerr=error, color=f"C{place % 10}", height=0.6)
    panel.set_yticks(range(len(points)), [shorten(name, 60) for name in points], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("accuracy in percent", fontsize=8)


def _lines(
    panel: Any, groups: Mapping[str, Sequence[Measured]], points: Mapping[str, Sequence[float]], axis: str
) -> None:
    series: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for name, group in groups.items():
        run = group[0]
        others = [f"{key.rpartition('.')[2]} {value}" for key, value in run.values.items() if key != axis]
        if points[name]:
            series.setdefault(", ".join(filter(None, [run.arm, *others])), []).append(
                (run.values[axis], points[name])
            )
    for label, found in series.items():
        found.sort(key=lambda each: each[0])
        errors = [100 * statistics.stdev(each) if len(each) > 1 else 0 for _, each in found]
        means = [100 * statistics.mean(each) for _, each in found]
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
