# SPDX-License-Identifier: Apache-2.0
"""A picture of how a run learned, from the Trainer's log."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Each panel: title, and the log keys that share its axis. Keys that a run did not log are left out, and
# empty panels too.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("training loss", ("loss",)),
    ("k-NN accuracy while training", ("eval_knn",)),
    ("dimensions in use", ("eval_rank_me", "eval_embedding_rank")),
    ("spread (1 isotropic, 0 collapsed)", ("eval_feature_std", "eval_embedding_std")),
    ("alignment (0 perfect)", ("eval_alignment",)),
    ("uniformity (lower is more even)", ("eval_uniformity",)),
    ("learning rate", ("learning_rate",)),
    ("images per second", ("images_per_second",)),
)


def _label(key: str) -> str:
    return key.removeprefix("eval_").removeprefix("term_").replace("_", " ")


def draw_curves(log_history: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the run's curves to `path` as a PNG.

    Args:
        log_history: `trainer.state.log_history`, one dict with a `step` for each record.
        path: the picture's file; it is replaced in one go, and not written while nothing was recorded.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    terms = tuple(sorted({key for record in log_history for key in record if key.startswith("term_")}))
    panels = [*PANELS, *([("terms of the loss", terms)] if len(terms) > 1 else [])]
    series = {
        key: [
            (record["step"], record[key])
            for record in log_history
            if isinstance(record.get(key), int | float)
        ]
        for _, keys in panels
        for key in keys
    }
    panels = [(title, keys) for title, keys in panels if any(series[key] for key in keys)]
    if not panels:
        return  # a run shorter than its first record
    columns = 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained", dpi=110)
    for position, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, position)
        for key in keys:
            if series[key]:
                steps, values = zip(*series[key], strict=True)
                marker = "o" if len(steps) < 30 else None
                axes.plot(
                    steps,
                    values,
                    label=_label(key),
                    linewidth=1.4,
                    marker=marker,
                    markersize=2.5,
                )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(keys) > 1:
            axes.legend(fontsize=7, frameon=False)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, format="png")
    staged.replace(path)
