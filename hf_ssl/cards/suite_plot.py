# SPDX-License-Identifier: Apache-2.0
"""Draws the results of a suite (layer 3)."""

from pathlib import Path

from hf_ssl.cards.suite_text import COLUMNS, Summary, share


def draw(summary: Summary, path: Path) -> None:
    """Write a bar plot to a PNG file: one group of bars for each data set, and one for the averages.

    The lines on the bars show the standard errors that are known.
    """
    from matplotlib.figure import Figure

    names, columns = list(summary.metrics), summary.columns
    width = 0.8 / len(columns)
    figure = Figure(
        figsize=(2.5 + 0.28 * (len(names) + 1) * (len(columns) + 1), 3.8), layout="constrained", dpi=130
    )
    axes = figure.subplots()
    for place, column in enumerate(columns):
        cells = [column.cells.get(name) for name in names]
        values = [cell.value if cell is not None else None for cell in cells] + [column.average]
        offset = (place - (len(columns) - 1) / 2) * width
        shown = [(number, value) for number, value in enumerate(values) if value is not None]
        axes.bar(
            [number + offset for number, _ in shown], [100 * value for _, value in shown], width,
            label=column.heading + share(column), color=f"C{place}",
        )  # fmt: skip
        for number, cell in enumerate(cells):
            if cell is not None and cell.value is not None and cell.standard_error is not None:
                value, error = 100 * cell.value, 100 * cell.standard_error
                axes.errorbar(number + offset, value, error, color="black", linewidth=0.8)
    axes.axvline(len(names) - 0.5, color="gray", linewidth=0.8, linestyle="--")
    labels = [f"{name}\n{COLUMNS[metric]}" for name, metric in summary.metrics.items()]
    axes.set_xticks(range(len(names) + 1), [*labels, "average"], fontsize=7, rotation=30, ha="right")
    axes.set_ylabel("percent, with the standard error", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(f"{summary.title}: {summary.encoder}", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(
        fontsize=7, frameon=False, ncols=min(3, len(columns)), loc="upper center", bbox_to_anchor=(0.5, -0.3)
    )
    figure.savefig(path, format="png")
