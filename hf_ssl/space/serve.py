# SPDX-License-Identifier: Apache-2.0
"""Serves the folder of a Space on this machine, in a process of its own, as the Hub does."""

import os
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from hf_ssl.errors import UserError

PORT = 7860
FACTS = "space.json"
_PORTS_TRIED = 100
_SECONDS_TO_END = 10


def check_packages() -> None:
    """Raises UserError that names what a Space needs and this installation lacks."""
    missing = [name for name in ("gradio", "faiss") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(
            f'a Space needs {" and ".join(missing)}, which {verb} not installed: pip install "hf_ssl[demo]"'
        )


def run_space(folder: Path, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Serve until Ctrl-C or SIGTERM; the server's process ends with this call.

    Runs the folder's own `app.py`: do not serve a folder that you would not run.

    Args:
        folder: from `build_space`.
        host: "0.0.0.0" lets other machines in.
        port: or the next free one.

    Raises:
        UserError: no Space there, a package is missing, no free port, or the server failed.
    """
    folder = folder.resolve()
    if not (folder / "app.py").is_file() or not (folder / FACTS).is_file():
        raise UserError(f"expected a Space with app.py and {FACTS} in {folder}: hf-ssl space build makes one")
    check_packages()
    free = free_port(host, port)
    environment = {**os.environ, "GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(free)}
    print(f"starting {folder.name}; Ctrl-C ends it", flush=True)
    process = subprocess.Popen([sys.executable, str(folder / "app.py")], cwd=folder, env=environment)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate()) if in_main_thread else None
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the usual end; the server has got it too
        return
    finally:
        _end(process)
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    if status not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise UserError(f"the server of {folder} ended with status {status}; what it said stands above")


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nobody listens on. Raises UserError after a hundred, or for a host
    that is not this machine."""
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except (socket.gaierror, PermissionError) as error:
                raise UserError(f"cannot serve on {host}:{port}: {error.strerror}") from error
            except OSError:
                continue
            return port
    raise UserError(f"no free port on {host} from {first} on; expected an address of this machine")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
