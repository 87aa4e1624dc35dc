# SPDX-License-Identifier: Apache-2.0
"""Long operations show their progress, and quick operations do not."""

import io
import threading
import time

import pytest
from tqdm import tqdm

from hf_ssl import progress as module
from hf_ssl.progress import hidden_progress, notice, progress, redrawn


@pytest.fixture
def soon(monkeypatch):
    """Makes bars appear after a twentieth of a second."""
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "_REFRESH_FILE", 0.05)


def wait_for(text, capsys):
    """Return standard error when it contains `text`. The time limit of the test ends an endless wait."""
    seen = ""
    while text not in seen:
        time.sleep(0.01)
        seen += capsys.readouterr().err
    return seen


def test_one_long_operation_without_updates_is_shown(soon, capsys):
    with progress("opening photos"):
        wait_for("opening photos", capsys)


def test_a_known_length_has_a_bar(soon, capsys):
    with progress("decoding", 40, unit="image") as bar:
        bar.update(10)
        assert "10/40" in wait_for("10/40", capsys)


def test_a_quick_operation_shows_nothing(capsys):
    with progress("quick", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("description", ["hidden", None])
def test_hidden_progress_shows_nothing_and_starts_no_thread(soon, capsys, description):
    before = threading.active_count()
    with hidden_progress(description is not None), progress(description, 3) as bar:
        assert threading.active_count() == before
        time.sleep(0.2)
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_progress_stays_hidden_inside_a_function_that_does_not_hide_it(soon, capsys):
    with hidden_progress(), hidden_progress(False), progress("hidden") as bar:
        assert bar.disable
    with progress("shown"):
        wait_for("shown", capsys)


def test_the_elapsed_time_of_another_bar_moves_between_its_updates(soon, capsys):
    bar = tqdm(total=10, desc="pretraining")
    with redrawn(bar):
        bar.update(1)
        bar.bar_format = "redrawn {n}"
        wait_for("redrawn 1", capsys)
    bar.close()


def test_in_a_terminal_the_next_output_starts_at_the_beginning_of_the_line(soon, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(module, "_REFRESH_TERMINAL", 0.05)
    with progress("opening photos"):
        while "opening photos" not in terminal.getvalue():
            time.sleep(0.01)
    seen = terminal.getvalue()
    assert "\n" not in seen
    assert seen.endswith("\r") and seen.rstrip("\r").endswith(" ")


class Terminal(io.StringIO):
    """A standard error that shows moving bars."""

    def isatty(self):
        return True


def test_a_file_gets_few_whole_lines(monkeypatch, capsys):
    monkeypatch.setattr(module, "DELAY", 0.0)  # tqdm then draws each update
    monkeypatch.setattr(module, "_REFRESH_FILE", 3600.0)
    with progress("decoding", 1000) as bar:
        wait_for("decoding", capsys)
        for _ in range(1000):
            bar.mininterval = 0
            bar.update(1)
            bar.set_postfix(loss=1.0)
        notice("a line between")
    seen = capsys.readouterr().err
    assert seen.strip() == "a line between"


def test_the_last_state_of_a_training_is_the_last_line_of_a_file(soon, capsys):
    bar = tqdm(total=10, desc="pretraining", delay=3600)  # which `redrawn` shows
    with redrawn(bar):
        wait_for("pretraining", capsys)
        bar.update(10)
    bar.close()
    notice("done")
    *_, last, done = capsys.readouterr().err.splitlines()
    assert "10/10" in last and done == "done"


def test_an_error_ends_the_display(soon, capsys):
    with pytest.raises(RuntimeError, match="inside"), progress("failing"):
        wait_for("failing", capsys)
        raise RuntimeError("inside")
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_ssl progress"]
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == ""


class Unwritable:
    """A standard error that takes nothing."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error, self.tries = error, 0

    def isatty(self):
        return False

    def flush(self):
        pass

    def write(self, text):
        self.tries += 1
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "pipe"), OSError(28, "full"), ValueError("I/O operation on closed file")]
)
def test_an_output_that_cannot_be_written_ends_the_bar_and_not_the_run(soon, monkeypatch, error):
    output = Unwritable(error)
    monkeypatch.setattr("sys.stderr", output)
    with progress("opening", 3) as bar:
        while not output.tries:
            time.sleep(0.01)
        # In another thread, because with the lock taken the call would never return.
        thread = threading.Thread(target=bar.update, args=(1,), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    with progress("again", 3) as bar:
        bar.update(3)


def test_no_output_at_all(soon, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with progress("opening", 3) as bar:
        bar.update(3)
        assert bar.disable
