# SPDX-License-Identifier: Apache-2.0
"""Values for the log records of a run (terms of the loss, training time, peak memory), and their curves."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.files import newest_checkpoint, read_json, replaced_file
from hf_ssl.modeling.gather import mean_over_processes
from hf_ssl.modeling.outputs import SSLOutput


class TermMeans:
    """Sums the terms of the loss on the device, without a synchronization, until the next log record."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, output: SSLOutput) -> None:
        """Add the terms of a micro-batch."""
        for name, value in (output.terms or {}).items():
            known = self._sums.get(name)
            self._sums[name] = value.detach().clone() if known is None else known + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """Return the means over micro-batches and processes since the last call, and reset the sums.

        This method waits for the device.
        """
        names, count = list(self._sums), self._count
        means = mean_over_processes([self._sums[name] / count for name in names])
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))


class Stopwatch:
    """Measures the time of training, without the time inside `paused` (evaluation, saving)."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None
        self._read = (0, 0.0)

    def start(self, step: int) -> None:
        """Start the measurement at a training step."""
        self._started = time.perf_counter()
        self._read = (step, self.seconds)

    def stop(self) -> None:
        """Stop the measurement. `start` continues it."""
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including earlier parts of a resumed run."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def restore(self, seconds: float) -> None:
        """Set the seconds of the earlier parts of a resumed run."""
        self._before = seconds

    def steps_per_second(self, step: int) -> float:
        """Return the steps per second since the last call, or since the start."""
        (last_step, last_seconds), self._read = self._read, (step, self.seconds)
        return (step - last_step) / max(self._read[1] - last_seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the block."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self._started = time.perf_counter()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: GPU memory on CUDA, main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


Panel = tuple[str, tuple[str, ...]]


def select_panels(log_history: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the panels of the curves: a title, and the logged keys that share the axis.

    There is one panel per title in `hf_ssl.evaluation.config.MEASUREMENTS`, and one for each further
    measurement (`eval_<name>`). If the loss has several terms, they share one panel.

    Args:
        log_history: see `draw_curves`.
    """
    logged = {key for record in log_history for key in record if _is_number(record[key])}
    panels = {"training loss": ["loss"]}
    for name, described in MEASUREMENTS.items():
        title = described.text if described.panel is None else described.panel
        panels.setdefault(title, []).extend((f"eval_{name}", f"{name}_train"))
    panels |= {_label(key): [key] for key in ("learning_rate", "weight_decay", "images_per_second")}
    known = {key for keys in panels.values() for key in keys}
    panels |= {_label(key): [key] for key in sorted(logged - known) if key.startswith("eval_")}
    terms = sorted(key for key in logged if key.startswith("term_"))
    panels["terms of the loss"] = terms if len(terms) > 1 else []
    drawn = ((title, tuple(key for key in keys if key in logged)) for title, keys in panels.items() if title)
    return [(title, keys) for title, keys in drawn if keys]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _label(key: str) -> str:
    name = key.removeprefix("eval_").removeprefix("term_")
    return "feature rank" if name == "rank_me" else name.replace("_", " ")  # beside "embedding rank"


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
        axes.locator_params(axis="x", integer=True)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if len(keys) > 1:
            axes.legend(fontsize=7, frameon=False)
    with replaced_file(path) as staging:
        figure.savefig(staging, format="png")


class RunLog(NamedTuple):
    """The log of a run: the type of its model, and `trainer.state.log_history`."""

    method: str
    history: list[dict[str, Any]]


def read_log(folder: Path) -> RunLog:
    """Return the log in the newest checkpoint of a run.

    Raises:
        UserError: the folder contains no checkpoint, or a file of it cannot be read.
    """
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"curves: expected the output folder of a run with a checkpoint, got {folder}; use another one"
        )
    state, config = read_json(checkpoint / "trainer_state.json"), read_json(checkpoint / "config.json")
    return RunLog(config["model_type"].removeprefix("ssl_"), state["log_history"])


def loss_terms(runs: Mapping[str, RunLog]) -> Any:
    """Return a figure with the curves of the loss and of each of its terms.

    Runs of one method share the panels of a row. The losses of different methods are not comparable, so each
    method has its own row.

    Args:
        runs: {name of the run: its log}.

    Raises:
        UserError: no run logged a loss.
    """
    from matplotlib.figure import Figure  # pyplot would need global state

    rows: dict[str, list[str]] = {}
    for run in runs.values():
        logged = {key for record in run.history for key in record if _is_number(record[key])}
        terms = sorted(key for key in logged if key == "loss" or key.startswith("term_"))  # the loss is first
        row = rows.setdefault(run.method, [])
        row += [key for key in terms if key not in row]
    columns = max(map(len, rows.values()), default=0)
    if columns == 0:
        raise UserError("curves: expected a run with a logged loss, got none; train for more steps")
    figure = Figure(figsize=(4.2 * columns, 3.2 * len(rows)), layout="constrained", dpi=110)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (method, keys), line in zip(rows.items(), panels, strict=True):
        for axes, key in zip(line, keys, strict=False):
            for number, (name, run) in enumerate(runs.items()):
                points = [(each["step"], each[key]) for each in run.history if _is_number(each.get(key))]
                if run.method == method and points:
                    steps, values = zip(*points, strict=True)
                    axes.plot(steps, values, color=f"C{number}", label=name, linewidth=1.2)
            title = "training loss" if key == "loss" else f"term {_label(key)}"
            axes.set_title(f"{method}: {title}", fontsize=9)
            axes.set_xlabel("step", fontsize=7)
            axes.locator_params(axis="x", integer=True)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7, frameon=False)
        for axes in line[len(keys) :]:
            axes.axis("off")
    return figure
