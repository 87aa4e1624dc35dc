# SPDX-License-Identifier: Apache-2.0
"""Writes a comparison as Markdown, CSV and LaTeX, and draws it. All functions but `draw` are pure."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from hf_ssl.cards.comparison import Cell, Column, Comparison, Row
from hf_ssl.cards.text import markdown_row
from hf_ssl.errors import counted
from hf_ssl.evaluation.results import in_percent

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: f"\\{character}" for character in "&%$#_{}"
}
# The standard fonts have other glyphs for these, and LaTeX reads [ after the end of a row as an option.
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}"}
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)


def cell_text(cell: Cell | None, plus_minus: str = " ± ") -> str:
    """Return a mean in percent, with the standard deviation over runs if there are several."""
    if cell is None:
        return "-"
    deviation = cell.deviation
    return in_percent(cell.mean) + ("" if deviation is None else plus_minus + in_percent(deviation))


def markdown(comparison: Comparison) -> str:
    """Return the table, how its columns were measured, and the differences from the best rows."""
    columns = comparison.columns
    lines = [
        markdown_row(["", *(column.heading for column in columns), "runs"]),
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for row in comparison.rows:
        cells = [
            f"**{cell_text(cell)}**" if _is_best(comparison, row, column) else cell_text(cell)
            for column, cell in ((column, row.cells.get(column)) for column in columns)
        ]
        lines.append(markdown_row([row.label, *cells, str(len(row.seeds))]))
    quantity = comparison.quantity.capitalize()
    words = f"{quantity} in percent; mean ± standard deviation over runs with different seeds."
    lines += ["", words + " Bold: the highest mean of a column." * (len(comparison.rows) > 1), ""]
    for column in columns:
        lines.append(f"- {column.heading}: {column.text} (`{column.id}`).")
        lines += _selected(comparison, column)
    lines += _precisions(comparison)
    lines += [f"- {sentence}." for sentence in _missing_runs(comparison)]
    lines += [f"- not compared: {sentence}." for sentence in comparison.skipped]
    lines += [f"- {sentence}." for sentence in comparison.repeated]
    for column in columns:
        compared = [(row, row.cells[column]) for row in comparison.rows if column in row.cells]
        differences = [(row, cell.difference) for row, cell in compared if cell.difference is not None]
        if not differences:
            continue
        best = comparison.best(column)
        lines += [
            "",
            f"Difference from {best.label} in {column.heading}, in points (95 % interval of a paired "
            "bootstrap over test images and runs):",
            "",
            markdown_row(["", "difference", "interval", "p"]),
            "|---|---:|---:|---:|",
        ]
        lines += [
            markdown_row(
                [
                    row.label,
                    f"{100 * found.value:+.1f}",
                    f"{100 * found.low:+.1f} to {100 * found.high:+.1f}",
                    f"{found.p:.4f}" if found.p >= 0.001 else "< 0.001",
                ]
            )
            for row, found in differences
        ]
        if min(len(cell.values) for _, cell in compared) < 2:
            lines += ["", "The interval of a single run does not contain the variation over seeds."]
    return "\n".join(lines) + "\n"


def _selected(comparison: Comparison, column: Column) -> list[str]:
    """Return one line per row with the selected settings of its runs, if the runs of the column differ."""
    rows = [(row.label, row.cells[column].selections) for row in comparison.rows if column in row.cells]
    keys = dict.fromkeys(key for _, selections in rows for each in selections for key in each)
    different = [key for key in keys if len({str(run.get(key)) for _, runs in rows for run in runs}) > 1]
    lines = []
    for label, selections in rows:
        selected = [
            f"{key.replace('_', ' ')} {', '.join(_setting(run.get(key)) for run in selections)}"
            for key in different
            if any(key in run for run in selections)
        ]
        order = ", in the order of its runs" if len(selections) > 1 else ""
        lines += [f"  - {label}{order}: {'; '.join(selected)}."] if selected else []
    return lines


def _missing_runs(comparison: Comparison) -> list[str]:
    """Return one sentence for each cell without the numbers of all runs of its row."""
    return [
        f"{row.label}, {column.heading}: {len(cell.values)} of {counted(len(row.seeds), 'run')}; the other "
        "runs do not have this number"
        for row in comparison.rows
        for column, cell in row.cells.items()
        if len(cell.values) < len(row.seeds)
    ]


def _precisions(comparison: Comparison) -> list[str]:
    """Return a line with the rows of each precision of the features, if there are several."""
    rows: dict[str, list[str]] = {}
    for row in comparison.rows:
        for precision in sorted(set().union(*(cell.precisions for cell in row.cells.values()))):
            rows.setdefault(precision, []).append(row.label)
    if len(rows) < 2:
        return []
    words = "; ".join(f"{name} ({', '.join(labels)})" for name, labels in rows.items())
    return [
        f"- The precision of the features differs: {words}. To have one precision, use hf-ssl evaluate with "
        "evaluation.precision=float32 for all of them."
    ]


def _setting(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _is_best(comparison: Comparison, row: Row, column: Column) -> bool:
    """Return whether a row has the highest mean of several rows in a column."""
    means = [each.cells[column].mean for each in comparison.rows if column in each.cells]
    return len(means) > 1 and column in row.cells and row.cells[column].mean == max(means)


def csv_text(comparison: Comparison) -> str:
    """Return one line for each number: row, column, values of the runs, mean, deviation and difference.

    `std` and `standard_error_over_runs` (of the mean) describe the variation over seeds. They are empty for a
    single run. `standard_error_over_images` is the largest standard error of the single runs of the row. The
    error of their mean is not much smaller, because all runs have the same test images.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        "row column protocol_id key data revision split images classes train_split train_images runs seeds "
        "values mean std "
        "standard_error_over_runs standard_error_over_images difference_to_best low high p".split()
    )
    for row in comparison.rows:
        for column, cell in row.cells.items():
            found = cell.difference
            over_runs = cell.deviation, cell.error_over_runs
            writer.writerow(
                [
                    row.label, column.heading, column.id, column.key, *column.data, len(cell.values),
                    " ".join("-" if seed is None else str(seed) for seed in cell.seeds),
                    " ".join(f"{value:.6f}" for value in cell.values), f"{cell.mean:.6f}",
                    *("" if each is None else f"{each:.6f}" for each in over_runs),
                    f"{max(cell.standard_errors):.6f}",
                    *(("",) * 4 if found is None else (f"{number:.6f}" for number in found)),
                ]
            )  # fmt: skip
    return stream.getvalue()


def latex(comparison: Comparison) -> str:
    """Return a `tabular`, which needs the package booktabs."""
    columns = comparison.columns
    lines = [
        f"% needs \\usepackage{{booktabs}}; {comparison.quantity} in percent, mean and standard deviation "
        "over runs",
        *(f"% {' '.join(sentence.split())}" for sentence in _missing_runs(comparison)),
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        "\\toprule",
        " & ".join(["", *(latex_escaped(column.heading) for column in columns)]) + r" \\",
        "\\midrule",
    ]
    for row in comparison.rows:
        cells = [cell_text(row.cells.get(column), r" $\pm$ ") for column in columns]
        cells = [
            f"\\textbf{{{text}}}" if _is_best(comparison, row, column) else text
            for text, column in zip(cells, columns, strict=True)
        ]
        lines.append(" & ".join([latex_escaped(row.label), *cells]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def latex_escaped(text: str) -> str:
    """Return a text for LaTeX."""
    return re.sub(r"[\\~^&%$#_{}<>|[]", lambda found: _LATEX[found[0]], text)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw a panel for each column: the mean of each row with an interval, and a dot for each run.

    The interval is twice the standard error of the mean over runs, or over test images for a single run.
    """
    from matplotlib.figure import Figure

    columns, rows = comparison.columns, comparison.rows
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    height = 0.9 + 0.32 * len(rows)
    label_width = 0.075 * max(len(row.label) for row in rows)
    size = (label_width + 3.4 * across, max(1.8, height) * down)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, column in zip(panels, columns, strict=False):
        for place, row in enumerate(rows):
            cell = row.cells.get(column)
            if cell is None:
                continue
            color = _COLORS[place % len(_COLORS)]
            count = len(cell.values)
            error = cell.standard_errors[0] if cell.error_over_runs is None else cell.error_over_runs
            axes.errorbar(
                100 * cell.mean,
                place,
                xerr=200 * error,
                fmt="o",
                color=color,
                capsize=3,
                markersize=6,
                linewidth=1.4,
            )
            if count > 1:
                dots = [100 * value for value in cell.values]
                axes.plot(dots, [place + 0.25] * count, ".", color=color, alpha=0.6, markersize=4)
        axes.set_title(column.heading, fontsize=9, wrap=True)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    quantity = f"{comparison.quantity} in percent"
    figure.supxlabel(f"{quantity}, with twice the standard error (small dots: runs)", fontsize=8)
    figure.savefig(path)
