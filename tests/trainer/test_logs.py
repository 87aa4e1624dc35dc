# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

from hf_ssl.trainer import logs
from hf_ssl.trainer.callbacks import PictureCallback
from hf_ssl.trainer.logs import Stopwatch


def test_only_training_counts(monkeypatch):
    now = 100.0
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now)
    watch = Stopwatch()
    watch.restore(5.0)
    now = 200.0
    assert watch.seconds == 5
    watch.start(step=10)
    now = 202.0
    assert watch.steps_per_second(14) == pytest.approx(2)
    with watch.paused():
        now = 300.0
        assert watch.seconds == 7  # what a checkpoint records
    now = 304.0
    assert watch.steps_per_second(16) == pytest.approx(0.5)
    watch.stop()
    now = 999.0
    assert watch.seconds == 11


def test_drawing_does_not_count_as_training() -> None:
    watch, running = Stopwatch(), []

    class Drawing(PictureCallback):
        def draw(self, args, state) -> None:
            running.append(watch._started)

    watch.start(0)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    Drawing(watch).on_train_end(None, state, None)
    assert running == [None] and watch._started is not None
