# SPDX-License-Identifier: Apache-2.0
"""Stops training on SIGTERM or Ctrl-C after the current step, and saves a checkpoint."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl

from hf_ssl.modeling.gather import any_process, process_count

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal arrived inside `StopOnSignal.interruptible`.

    This class is not an `Exception`, so that no handler of errors catches it.
    """


class StopOnSignal(TrainerCallback):
    """Stops training on SIGTERM or SIGINT (Ctrl-C).

    It finishes the training step and saves a checkpoint. It aborts a measurement of the monitor. A second
    signal stops the process immediately. Several processes stop together at the next logging step, because
    they wait for each other in every step.

    Attributes:
        received: the signal that arrived; None before the first signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interruptible = False
        self._previous: dict[signal.Signals, Any] = {}

    def exit_exception(self) -> BaseException:
        """Return the exception of the signal: SystemExit(143) or KeyboardInterrupt."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside this block as soon as a signal arrives, if there is only one process."""
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
            raise self.exit_exception()
        self.received = signal.Signals(number)
        if self._interruptible:
            self._interruptible = False
            raise Interrupted
        with suppress(OSError):  # os.write instead of print, because the signal may interrupt a print
            os.write(2, b"\nstopping after this step and a checkpoint; a second signal stops immediately\n")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.received = None
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:
                return  # outside the main thread (in some notebooks), Python cannot set handlers

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
        if self.received is not None and args.world_size == 1:  # the signal arrived during saving
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the signal handlers from before training."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
