# SPDX-License-Identifier: Apache-2.0
"""Draws the training curves of a run from the log of the trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_ssl.files import replaced_file

Panel = tuple[str, tuple[str, ...]]

# Each panel has a title and the log keys that share its axis. Keys that the run did not log and empty panels
# are not drawn. Each further measurement of a method gets its own panel.
PANELS: tuple[Panel, ...] = (
    ("training loss", ("loss",)),
    ("k-NN accuracy while training", ("eval_knn",)),
    ("dimensions in use", ("eval_rank_me", "eval_embedding_rank", "eval_predictor_rank")),
    ("spread (1 isotropic, 0 collapsed)", ("eval_feature_std", "eval_embedding_std")),
    ("alignment (0 perfect)", ("eval_alignment",)),
    ("uniformity (lower is more even)", ("eval_uniformity",)),
    ("learning rate", ("learning_rate",)),
    ("weight decay", ("weight_decay",)),
    ("images per second", ("images_per_second",)),
    ("prototypes (entropy 1: used equally)", ("eval_prototype_entropy", "eval_prototypes_used")),
    ("correlation of different dimensions (0 at best)", ("eval_off_diagonal_correlation",)),
    ("steps that a key stays in the queue", ("eval_queue_age",)),
    ("share of the queue that holds keys", ("eval_queue_filled",)),
)
# The loss of the monitor is not comparable with the training loss, because the number of images differs.
_NOT_DRAWN = {"eval_loss"}


def select_panels(log_history: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the panels that have logged values.

    The panels are `PANELS`, one panel for each further measurement (`eval_<name>`), and one panel for the
    terms of the loss if there are several.

    Args:
        log_history: see `draw_curves`.
    """
    logged = {key for record in log_history for key in record if _is_number(record[key])}
    known = {key for _, keys in PANELS for key in keys}
    others = sorted(key for key in logged - known - _NOT_DRAWN if key.startswith("eval_"))
    terms = tuple(sorted(key for key in logged if key.startswith("term_")))
    panels = [
        *PANELS,
        *((_label(key), (key,)) for key in others),
        *([("terms of the loss", terms)] if len(terms) > 1 else []),
    ]
    present = [(title, tuple(key for key in keys if key in logged)) for title, keys in panels]
    return [(title, keys) for title, keys in present if keys]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _label(key: str) -> str:
    return key.removeprefix("eval_").removeprefix("term_").replace("_", " ")


def draw_curves(log_history: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the training curves to `path` as a PNG file.

    Args:
        log_history: `trainer.state.log_history`, one dict with a `step` for each record.
        path: path of the file. It is replaced atomically. Without a logged value, no file is written.
    """
    from matplotlib.figure import Figure  # pyplot would need global state

    panels = select_panels(log_history)
    if not panels:
        return  # the run ended before its first record
    columns = 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained", dpi=110)
    for position, (title, keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, position)
        for key in keys:
            points = [(record["step"], record[key]) for record in log_history if _is_number(record.get(key))]
            steps, values = zip(*points, strict=True)
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, label=_label(key), linewidth=1.4, marker=marker, markersize=2.5)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(keys) > 1:
            axes.legend(fontsize=7, frameon=False)
    with replaced_file(path) as staging:
        figure.savefig(staging, format="png")
