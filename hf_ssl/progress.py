# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of operations that take longer than `DELAY` seconds, on standard error (layer 0)."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

DELAY = 1.5
"""Seconds before a bar appears; a quick operation shows none."""
_REFRESH_TERMINAL, _REFRESH_FILE = 1.0, 15.0

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def hidden_progress(hidden: bool = True) -> Iterator[None]:
    """Show no bar inside the block if `hidden`, e.g. for `training.disable_tqdm=true`."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def progress(description: str | None, total: int | None = None, *, unit: str = "image") -> Iterator[Any]:
    """Show the progress of the block, from `DELAY` seconds on until it ends.

    tqdm alone shows a delayed bar at the first update after the delay. A single long operation has no
    updates, so a thread redraws the bar (`redrawn`).

    Args:
        description: name of the operation, e.g. "opening photos"; None shows nothing.
        total: number of units; None shows only the elapsed time.
        unit: name of the unit that `update` counts.

    Yields:
        The tqdm bar. Call `update(n)` after each `n` units.
    """
    from tqdm import tqdm

    form = None if total is not None else "{desc} ({elapsed})"
    hidden = description is None or _hidden.get() or sys.stderr is None
    bar = tqdm(
        desc=description, total=total, unit=unit, delay=DELAY, leave=False, disable=hidden, bar_format=form
    )
    try:
        with redrawn(bar):
            yield bar
    finally:
        with suppress(OSError, ValueError):
            bar.close()


def notice(text: str) -> None:
    """Print a line on standard error above the bars, unless bars are hidden (`hidden_progress`)."""
    from tqdm import tqdm

    if not _hidden.get() and sys.stderr is not None:
        with suppress(OSError, ValueError):  # standard error is closed
            tqdm.write(text, file=sys.stderr)


@contextmanager
def redrawn(bar: Any) -> Iterator[None]:
    """Redraw a tqdm bar inside the block: every second in a terminal, every 15 seconds in a file.

    Writing to standard error fails if it is closed, if its pipe is closed, or if the disk is full. The bar
    then disappears and the block continues. tqdm itself (seen with 4.67) would raise the error. Its `refresh`
    would not release the lock that all bars share, so the next update would wait forever.
    """
    if bar.disable:  # also by the environment variable TQDM_DISABLE
        yield
        return
    draw = bar.display

    def draw_if_possible(*arguments: Any, **options: Any) -> bool:
        try:
            return bool(draw(*arguments, **options))
        except (OSError, ValueError):  # ValueError: the file was closed
            bar.disable = True
            return False

    # This replaces a method instead of deriving a class: bars of a subclass have another lock and position.
    bar.display = draw_if_possible
    finished = threading.Event()

    def redraw() -> None:
        pause = DELAY
        while not finished.wait(pause) and not bar.disable:
            bar.delay = 0  # tqdm clears a bar at its end only if the delay is over
            bar.refresh()
            pause = _REFRESH_TERMINAL if sys.stderr.isatty() else _REFRESH_FILE

    thread = threading.Thread(target=redraw, name="hf_ssl progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
