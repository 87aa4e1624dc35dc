# SPDX-License-Identifier: Apache-2.0
"""Serves a Space on this machine, in a separate process that runs the same `app.py` as the Hub."""

import os
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from hf_ssl.errors import UserError
from hf_ssl.hub.publish import SPACE_FACTS
from hf_ssl.resources import PORT, install_advice

_PORTS_TRIED = 100
_SECONDS_TO_END = 10


def check_packages() -> None:
    """Raise UserError with the names of missing packages if this installation cannot serve a Space."""
    # `require` would import gradio, which takes seconds. Only the server process needs it.
    missing = [name for name in ("gradio", "faiss") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        names = " and ".join(missing)
        raise UserError(f"space: expected {names}, which {verb} missing; {install_advice('demo')}")


def run_space(folder: Path, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Serve a Space until Ctrl-C or SIGTERM. The server process ends before this function returns.

    The function runs the file `app.py` of the folder. Serve only folders whose code you trust.

    Args:
        folder: a folder from `build_space`.
        host: address of the server; "0.0.0.0" accepts connections from other machines.
        port: the server uses this port, or the next free one.

    Raises:
        UserError: the folder is not a Space, a package is missing, no port is free, or the server failed.
    """
    folder = folder.resolve()
    if not (folder / "app.py").is_file() or not (folder / SPACE_FACTS).is_file():
        raise UserError(f"{folder}: expected app.py and {SPACE_FACTS}, got no Space; run hf-ssl space build")
    check_packages()
    free = free_port(host, port)
    environment = {**os.environ, "GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(free)}
    print(f"starting the Space {folder.name}; press Ctrl-C to stop it", flush=True)
    process = subprocess.Popen([sys.executable, str(folder / "app.py")], cwd=folder, env=environment)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate()) if in_main_thread else None
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the server receives the same signal
        return
    finally:
        _end(process)
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if status not in (0, -signal.SIGTERM, -signal.SIGINT):
        raise UserError(f"{folder}: expected status 0 of the server, got {status}; see its output above")


def free_port(host: str, first: int) -> int:
    """Return the first free port, starting at `first`.

    Raises:
        UserError: none of 100 ports is free, or this machine cannot use the address.
    """
    for port in range(first, min(first + _PORTS_TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except (socket.gaierror, PermissionError) as error:
                raise UserError(
                    f"space: expected a valid address, got {host}:{port}; {error.strerror}"
                ) from error
            except OSError:
                continue
            return port
    raise UserError(f"space: expected a local address with a free port, got {host} from port {first}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
