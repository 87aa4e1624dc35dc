# SPDX-License-Identifier: Apache-2.0
"""An HTTP server in a thread that serves a `Store`, records every request, and simulates failures."""

import os
import re
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Self

from hub_server.routes import Handler
from hub_server.store import Store, User

WRITE, READ = "hf_" + "w" * 34, "hf_" + "r" * 34


@dataclass(frozen=True)
class Request:
    """A received request; `body` is the part that was read, `status` is 0 if the connection was cut."""

    method: str
    path: str
    user: str | None
    body: bytes
    status: int


@dataclass
class Fault:
    """A failure of the next `times` requests whose "METHOD path" matches the pattern.

    Attributes:
        status: answer with this status and do nothing else.
        after: cut the connection after so many bytes of the request body, or of the answer if there is no
            body.
        unanswered: do what the request asks, then cut the connection instead of answering.
    """

    pattern: str
    times: int
    status: int | None = None
    after: int | None = None
    unanswered: bool = False


class HubServer:
    """A Hub on a free port.

    It contains a user "someone", a member of "lab", with a write token and a read token. It has no token
    endpoint for Xet, like other small hubs.

    Args:
        part_size: files larger than this are uploaded in parts of so many bytes.
    """

    def __init__(self, part_size: int = 1_000_000) -> None:
        self.store = Store()
        self.part_size = part_size
        self.write_token, self.read_token = WRITE, READ
        self.store.users |= {
            WRITE: User("someone", "write", ("lab",)),
            READ: User("someone", "read", ("lab",)),
        }
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a process whose clients use only this server."""
        hidden = (
            "HF_",
            "HUGGING",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        )
        kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        given = {} if token is None else {"HF_TOKEN": token}
        return kept | given | {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip

    # Failures. A pattern is searched in "METHOD path", e.g. r"POST .*/commit/" or "PUT /lfs/".

    def fail(self, pattern: str, status: int = 503, times: int = 1) -> None:
        """Answer the next requests with an error."""
        self.faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, after: int = 0, times: int = 1, unanswered: bool = False) -> None:
        """Cut the connection of the next requests, see `Fault`."""
        self.faults.append(Fault(pattern, times, after=after, unanswered=unanswered))

    def heal(self) -> None:
        """Remove the remaining failures."""
        self.faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    # Records.

    def count(self, pattern: str) -> int:
        """Return the number of requests whose "METHOD path" matches."""
        return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in self.requests)

    def received(self) -> bytes:
        """Return everything that the Hub received: paths and bodies of requests, and decoded files."""
        with self.lock:
            parts = [request.path.encode() + b"\n" + request.body for request in self.requests]
            for repo in self.store.repos.values():
                for commit in repo.commits:
                    parts += [path.encode() + b"\n" + blob.data for path, blob in commit.files.items()]
        return b"\n".join(parts)
