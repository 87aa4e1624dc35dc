# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: a thread that serves a `Store`, remembers every request, and stumbles when told to."""

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
    """What came in. body: as far as it was read; status: 0 where the connection was cut."""

    method: str
    path: str
    user: str | None
    body: bytes
    status: int


@dataclass
class Fault:
    """Something to go wrong `times` times, for requests whose "METHOD path" matches.

    status: answer this and do nothing. after: cut the connection once so many bytes of the body came in, or,
    where the request has none, went out. unanswered: do what is asked, then cut instead of answering.
    """

    pattern: str
    times: int
    status: int | None = None
    after: int | None = None
    unanswered: bool = False


class HubServer:
    """A Hub on a port of its own.

    It begins with a user "someone", member of "lab", with a token to write and one to read. A client with Xet
    switched on finds no token endpoint, as on other small hubs.

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
        """The environment of a process whose clients talk to this server and to nothing else."""
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

    # Faults. A pattern is searched in "METHOD path", e.g. r"POST .*/commit/" or "PUT /lfs/".

    def fail(self, pattern: str, status: int = 503, times: int = 1) -> None:
        """Answer the next requests with an error."""
        self.faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, after: int = 0, times: int = 1, unanswered: bool = False) -> None:
        """Cut the connection of the next requests in the middle."""
        self.faults.append(Fault(pattern, times, after=after, unanswered=unanswered))

    def heal(self) -> None:
        """Forget the faults that have not happened."""
        self.faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    # What happened.

    def count(self, pattern: str) -> int:
        """Requests whose "METHOD path" matches."""
        return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in self.requests)

    def received(self) -> bytes:
        """All that a stranger could read here: addresses and bodies of requests, and decoded files."""
        with self.lock:
            parts = [request.path.encode() + b"\n" + request.body for request in self.requests]
            for repo in self.store.repos.values():
                for commit in repo.commits:
                    parts += [path.encode() + b"\n" + blob.data for path, blob in commit.files.items()]
        return b"\n".join(parts)
