# SPDX-License-Identifier: Apache-2.0
"""The plots of a sweep (layer 3)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from hf_ssl.cards.sweep_text import (
    BASELINES,
    Measured,
    columns_of,
    columns_to_compare,
    error_of,
    finite_numbers,
    groups_of,
    heading_of,
    words_of_error,
)
from hf_ssl.cards.text import ENCODERS, words_of
from hf_ssl.evaluation.plots import color_of, line_of
from hf_ssl.evaluation.results import ProtocolResult, is_measured

_IN_A_ROW = 3  # panels of the plot


def draw(runs: Sequence[Measured], axes: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Draw the numbers of each protocol over the first axis.

    There is one line for each arm and each value of the other axes, with the same color in all panels.

    Without an axis of numbers, the combinations are bars. The picture says what its error bars are
    (`words_of_error`). Without any accuracy, nothing is written.
    """
    if not columns_of(runs):
        return
    from matplotlib.figure import Figure

    columns = _drawn(runs)
    axis = next(
        (key for key, values in axes.items() if len(values) > 1 and all(map(_is_number, values))), None
    )
    groups = groups_of(runs)
    width = min(len(columns), _IN_A_ROW)
    rows = -(-len(columns) // width)
    height = 3.0 if axis is not None else 0.8 + 0.3 * len(groups)
    size = (1.5 + 4.2 * width, 0.4 + height * rows)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    panels = list(figure.subplots(rows, width, squeeze=False).flat)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    counts: set[int] = set()
    for number, (panel, (key, heading)) in enumerate(zip(panels, columns.items(), strict=False)):
        points = {name: found for name, group in groups.items() if (found := finite_numbers(group, key))}
        counts |= set(map(len, points.values()))
        if axis is None:
            _bars(panel, list(groups), points, named=number % width == 0)
        else:
            _lines(panel, groups, points, axis)
            panel.set_ylabel("percent", fontsize=8)
        _baselines(panel, runs, key, vertical=axis is None)
        panel.set_title(heading, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    if counts:
        figure.suptitle(f"Error bars: {words_of_error(counts)}", fontsize=8)
    _add_legend(figure)
    figure.savefig(path, format="png")


def _add_legend(figure: Any) -> None:
    """Add a legend of all panels. Some lines are only in some of them."""
    found: dict[str, Any] = {}
    panels = [panel.get_legend_handles_labels() for panel in figure.axes]
    for handles, labels in sorted(panels, key=lambda panel: -len(panel[1])):  # keeps the order of the lines
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    if found:
        options: Any = {"loc": "outside lower center", "ncols": 4, "fontsize": 7, "frameon": False}
        figure.legend(list(found.values()), list(found), **options)


def _drawn(runs: Sequence[Measured]) -> dict[str, str]:
    """Return {id and key: heading} of the numbers that are drawn: of k-NN only the first, of others all.

    A number that only one of several combinations has is not drawn.
    """
    compared = columns_to_compare(runs)
    numbers = {key: number for run in runs for key, number in run.numbers().items() if key in compared}
    first = next((key for key in numbers if numbers[key].get("protocol") == "knn"), None)
    kept = [key for key in numbers if key == first or numbers[key].get("protocol") != "knn"]
    return {key: compared[key] for key in kept[: 4 * _IN_A_ROW]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bars(
    panel: Any, names: Sequence[str], points: Mapping[str, Sequence[ProtocolResult]], *, named: bool
) -> None:
    for place, name in enumerate(names):
        if name in points:
            mean, error = _in_percent(points[name])
            panel.barh(place, mean, xerr=error, color=color_of(place), height=0.6)
    labels = [shorten(name, 60) for name in names] if named else [""] * len(names)
    panel.set_yticks(range(len(names)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("percent", fontsize=8)


def _in_percent(numbers: Sequence[ProtocolResult]) -> tuple[float, float]:
    """Return a mean and its error (0 if there is none) in percent."""
    return 100 * statistics.mean(each["value"] for each in numbers), 100 * (error_of(numbers) or 0.0)


def _lines(
    panel: Any,
    groups: Mapping[str, Sequence[Measured]],
    points: Mapping[str, Sequence[ProtocolResult]],
    axis: str,
) -> None:
    series: dict[str, list[tuple[float, tuple[float, float]]]] = {}
    constant: list[str] = []  # arms without a value on the axis, such as one that is only evaluated
    for name, group in groups.items():
        run = group[0]
        if axis not in run.values:
            constant.append(name)
            continue
        others = [words for key, words in words_of(run.values).items() if key != axis]
        found = series.setdefault(", ".join(filter(None, [run.arm, *others])), [])
        if name in points:
            found.append((run.values[axis], _in_percent(points[name])))
    for number, name in enumerate(constant):
        if name in points:
            style: Any = {"color": color_of(9 - number % 10), "linestyle": ":", "label": name}
            panel.axhline(_in_percent(points[name])[0], **style)
    for number, (label, found) in enumerate(series.items()):
        if not found:
            continue
        found.sort(key=lambda each: each[0])
        means, errors = zip(*(each for _, each in found), strict=True)
        points_style: Any = {"marker": "o", "markersize": 4, "capsize": 3}
        points_style |= {"color": color_of(number), "linestyle": line_of(number), "label": label or None}
        panel.errorbar([place for place, _ in found], means, yerr=errors, **points_style)
    places = sorted({place for found in series.values() for place, _ in found})
    if not places:  # no finite number
        return
    if _are_geometric(places):
        panel.set_xscale("log")
        panel.minorticks_off()
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.set_xlabel(axis, fontsize=8)


def _are_geometric(places: Sequence[float]) -> bool:
    """Return whether ascending numbers have more equal ratios than differences, as 64, 128 and 256 have."""
    if places[0] <= 0 or places[-1] / places[0] < 4:
        return False
    ratios = [math.log(high / low) for low, high in pairwise(places)]
    differences = [high - low for low, high in pairwise(places)]
    return max(ratios) / min(ratios) <= max(differences) / min(differences)


def _baselines(panel: Any, runs: Sequence[Measured], key: str, *, vertical: bool) -> None:
    """Draw a dashed line for each baseline that is the same for all runs."""
    line = panel.axvline if vertical else panel.axhline
    for encoder, color in zip(BASELINES, ("gray", "gray", "black"), strict=True):
        values = {run.numbers(encoder)[key]["value"] for run in runs if key in run.numbers(encoder)}
        if len(values) == 1 and is_measured(value := values.pop()):
            line(100 * value, color=color, linestyle="--", linewidth=0.8, label=ENCODERS[encoder])


def draw_curves(runs: Sequence[Measured], names: Sequence[str], path: Path) -> bool:
    """Draw measurements of the monitor over the steps: one line for each combination, the mean over seeds.

    A line is dotted after the last step that all seeds have, for example if a run stopped early.

    Returns:
        Whether a line has such a part.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 3.6 * len(names), 3.6), layout="constrained", dpi=130)
    has_rest = False
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, (label, group) in enumerate(groups_of(runs).items()):
            common, rest = _mean_curve(group, name)
            style: Any = {"color": color_of(place), "marker": ".", "linewidth": 1.2}
            panel.plot(*common, label=shorten(label, 60), linestyle=line_of(place), **style)
            if rest[0]:
                has_rest = True
                panel.plot(*rest, linestyle=":", alpha=0.6, **style)
        panel.set_title("\n".join(wrap(heading_of(name), 36)), fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.locator_params(axis="x", integer=True)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    _add_legend(figure)
    figure.savefig(path, format="png")
    return has_rest


def _mean_curve(
    runs: Sequence[Measured], name: str
) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """Return steps and means over the runs with this measurement.

    The first part has the steps of all runs, and the second one the later steps of only some of them.
    """
    curves = [
        {each["step"]: each[name] for each in run.history if is_measured(each.get(name))} for run in runs
    ]
    curves = [curve for curve in curves if curve]
    steps = sorted(set().union(*curves))
    means = {step: statistics.mean(curve[step] for curve in curves if step in curve) for step in steps}
    common = [step for step in steps if all(step in curve for curve in curves)]
    rest = [step for step in steps if not common or step > common[-1]]
    rest = [*common[-1:], *rest] if rest else []
    return (common, [means[step] for step in common]), (rest, [means[step] for step in rest])
