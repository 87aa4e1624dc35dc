# SPDX-License-Identifier: Apache-2.0
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from hf_ssl.trainer import logs
from hf_ssl.trainer.callbacks import PictureCallback, ProgressBar
from hf_ssl.trainer.logs import Stopwatch, draw_curves


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


def test_a_training_writes_whole_lines_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that tqdm draws at its start would write parts of lines."""
    bar, state = ProgressBar(), SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=5)
    bar.on_train_begin(None, state, None)
    assert capsys.readouterr().err == ""
    state.global_step = 5
    bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    written = capsys.readouterr().err
    assert "\r" not in written and "5/5" in written
    assert all(line.startswith("pretraining: ") for line in written.splitlines())


def test_curves_of_a_short_run_have_whole_steps_and_named_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr(logs, "replaced_file", nullcontext)
    draw_curves(
        [{"step": step, "eval_rank_me": 4.0, "eval_embedding_rank": 2.0} for step in (0, 3)],
        tmp_path / "curves.png",
    )
    (axes,) = drawn[0].axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["embedding rank", "feature rank"]
