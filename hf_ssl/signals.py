# SPDX-License-Identifier: Apache-2.0
"""What ends a command from outside: SIGTERM, the end of its sweep, and a reader of the output that has ended
(layer 0).
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SWEEP = "HF_SSL_SWEEP"
"""Environment variable of a run of a sweep: the number of the process of the sweep, its parent."""
stopping = threading.Event()
"""Set as soon as a training has received a signal. A second signal would stop it before its checkpoint."""


def output_is_closed() -> bool:
    """Return whether the reader of standard output has ended, as after `hf-ssl recipes | head -1`.

    If so, discard the rest of the output. Otherwise, Python would write it at exit and print an error.
    """
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextmanager
def ends_on_sigterm(advice: str = "") -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that cleanup code removes incomplete files.

    Training sets its own handler, which saves a checkpoint first (`hf_ssl.trainer.callbacks.StopOnSignal`).

    Args:
        advice: end of the message.
    """

    def end(number: int, frame: FrameType | None) -> None:
        print(f"hf-ssl: terminated{advice}", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # handlers need the main thread
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def end_with_sweep() -> None:
    """Send SIGTERM to this process when the sweep that started it has ended, for example after `kill -9`.

    Otherwise the run would continue, and the next command of the sweep could not make it. The function does
    nothing in a process that no sweep started.
    """
    sweep = os.getppid()
    if os.environ.get(SWEEP) != str(sweep):
        return

    def wait() -> None:
        while os.getppid() == sweep:  # the system gives another parent to the child of an ended process
            time.sleep(1)
        if not stopping.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="hf_ssl sweep", daemon=True).start()
