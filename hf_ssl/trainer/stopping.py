# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C during training: finish the step, save a checkpoint, stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl

from hf_ssl.modeling.gather import any_process, process_count

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal arrived inside `StopOnSignal.interruptible`. Not an `Exception`, so that nothing on the way
    mistakes it for a fault.
    """


class StopOnSignal(TrainerCallback):
    """Stops training on SIGTERM or SIGINT (Ctrl-C).

    A training step is finished and a checkpoint is saved. A measurement of the monitor is aborted. A second
    signal stops the process at once. With several processes, all of them agree at the next logging step,
    because no process may leave the others waiting.

    Attributes:
        received: the signal that arrived; None as long as none did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interruptible = False
        self._previous: dict[signal.Signals, Any] = {}

    def stop_now(self) -> BaseException:
        """Return the exception that ends the process as the signal would: SystemExit(143) or
        KeyboardInterrupt.
        """
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside this block as soon as a signal arrives (one process only)."""
        if self.received is not None and process_count() == 1:
            raise Interrupted
        self._interruptible = process_count() == 1
        try:
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.received = signal.Signals(number)
            raise self.stop_now()
        self.received = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.received = None
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:
                return  # a notebook may train outside the main thread, where no handler can be set

    def on_step_end(self, args, state, control: TrainerControl, **kwargs) -> None:
        stop = self.received is not None
        if args.world_size > 1:
            if state.global_step % state.logging_steps:
                return
            stop = any_process(stop, args.device)
            if stop and self.received is None:
                self.received = signal.SIGTERM
        if stop:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args, state, control: TrainerControl, **kwargs) -> None:
        if self.received is not None and args.world_size == 1:  # it arrived while the checkpoint was written
            control.should_training_stop = True

    def restore(self) -> None:
        """Set the handlers that were there before training."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
