# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of operations that take longer than `DELAY` seconds, on standard error (layer 0).

A terminal or a notebook shows moving bars. In a file, such as the log of a job scheduler, each bar is a line
every 15 seconds.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


def bars_move() -> bool:
    """Return whether standard error is a terminal or a notebook, where a bar is redrawn in its place."""
    return (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules


@contextmanager
def redrawn(bar: Any) -> Iterator[None]:
    """Redraw a tqdm bar inside the block: every second in a terminal, every 15 seconds as a line in a file.

    Writing to standard error fails if it is closed, if its pipe is closed, or if the disk is full. The bar
    then disappears and the block continues. tqdm itself (seen with 4.67) would raise the error. Its `refresh`
    would not release the lock that all bars share, so the next update would wait forever.
    """
    if bar.disable:  # also by the environment variable TQDM_DISABLE
        yield
        return
    moves = bars_move()
    draw = bar.display if moves else _as_lines(bar)

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
            pause = _REFRESH_TERMINAL if moves else _REFRESH_FILE

    thread = threading.Thread(target=redraw, name="hf_ssl progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _as_lines(bar: Any) -> Callable[..., bool]:
    """Return a replacement of `display`, which writes a bar as whole lines of a file.

    tqdm (seen with 4.67) writes each of its ten updates per second to a file, without ends of lines.
    """
    last = -math.inf

    def display(msg: str | None = None, pos: int | None = None) -> bool:
        nonlocal last
        at_end = pos is not None  # only `close` passes it, and ends the line itself
        now = time.monotonic()
        if msg == "" or (now - last < _REFRESH_FILE and not at_end):
            return False
        last = now
        bar.fp.write(str(bar) if at_end else f"{bar}\n")
        bar.fp.flush()
        return True

    bar.clear = lambda nolock=False: None  # a line stays
    return display
