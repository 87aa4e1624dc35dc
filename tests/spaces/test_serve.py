# SPDX-License-Identifier: Apache-2.0
"""Serving: what is missing is said in a sentence, a port is found, and no server outlives its command."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from messages import mentions

from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.run import serve_digits
from hf_ssl.space import build, check_packages, run_space, serve
from hf_ssl.space.serve import free_port

ROOT = Path(__file__).parents[2]


def fake_space(folder: Path, code: str) -> Path:
    folder.mkdir()
    (folder / "app.py").write_text(code)
    (folder / "space.json").write_text("{}")
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in names else name)


def test_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_packages()
    without(monkeypatch, "gradio")
    with pytest.raises(UserError, match=mentions("gradio", 'pip install -c constraints.txt ".[demo]"')):
        run_space(fake_space(tmp_path / "space", ""))
    without(monkeypatch, "gradio", "faiss")
    with pytest.raises(UserError, match=mentions("gradio", "faiss")):
        build.build_space("model", tmp_path / "new", DataConfig(path="digits"))
    assert not (tmp_path / "new").exists()


def test_something_else_is_no_space(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("app.py", "space.json", tmp_path)):
        run_space(tmp_path)


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) <= port + 100
    with pytest.raises(UserError, match=mentions("192.0.2.1")):
        free_port("192.0.2.1", 7860)  # of no machine


def test_the_server_gets_address_and_folder(tmp_path: Path) -> None:
    code = (
        "import os, pathlib\n"
        "names = ('GRADIO_SERVER_NAME', 'GRADIO_SERVER_PORT')\n"
        "pathlib.Path('seen').write_text(' '.join(os.environ[name] for name in names))\n"
    )
    folder = fake_space(tmp_path / "space", code)
    port = free_port("127.0.0.1", 17860)
    run_space(folder, port=port)
    assert (folder / "seen").read_text() == f"127.0.0.1 {port}"


def test_a_server_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(tmp_path / "space", 3)):
        run_space(fake_space(tmp_path / "space", "raise SystemExit(3)"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_its_command(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, pathlib, time\n"
        "pathlib.Path('part').write_text(str(os.getpid()))\n"
        "os.rename('part', 'pid')\n"
        "time.sleep(60)\n"
    )
    folder = fake_space(tmp_path / "space", code)
    command = [sys.executable, "-m", "hf_ssl", "space", "run", str(folder)]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while not (folder / "pid").exists() and time.monotonic() < end:
            time.sleep(0.05)
        child = int((folder / "pid").read_text())
        parent.send_signal(number)  # to the command alone
        _, errors = parent.communicate(timeout=300)
        assert parent.returncode == 0, errors.decode()
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    finally:
        parent.kill()
        parent.wait()


def test_the_demo_ends_well_without_the_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "gradio")
    serve_digits(tmp_path, DataConfig(path="digits"), "test")
    assert 'pip install -c constraints.txt ".[demo]"' in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_demo_serves_what_it_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list = []
    monkeypatch.setattr(build, "build_space", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(serve, "run_space", lambda *args: calls.append(args))
    data = DataConfig(path="digits")
    serve_digits(tmp_path, data, "test")
    (built, options), (served,) = calls
    assert built == (str(tmp_path), tmp_path / "_space", data) and served == tmp_path / "_space"
    assert options["examples_split"] == "test"
