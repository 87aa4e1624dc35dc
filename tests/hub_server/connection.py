# SPDX-License-Identifier: Apache-2.0
"""Handles one HTTP request: reads it, answers it by a route or cuts the connection, and records it."""

import json
import re
import socket
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_server.store import Refused, User

if TYPE_CHECKING:
    from hub_server.server import Fault, HubServer


@dataclass
class Reply:
    """An answer that is not JSON with status 200."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Cut(Exception):
    """Raised to cut the connection without an answer."""


class Connection(BaseHTTPRequestHandler):
    """Answers one request at a time by the method that `routes` names: (verb, pattern of the path, name)."""

    hub: "HubServer"
    routes: list[tuple[str, str, str]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_request("GET" if self.command == "HEAD" else self.command)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def handle_request(self, method: str) -> None:
        self.body, self.status, self.user = b"", 0, None
        path = unquote(urlsplit(self.path).path)
        self.fault = self.hub.fault(self.command, unquote(self.path))
        try:
            self.body = self.read_body()
            self.answer(method, path)
        except (Cut, ConnectionError):
            self.close()
        finally:
            self.note()

    def answer(self, method: str, path: str) -> None:
        try:
            if self.fault is not None and self.fault.status is not None:
                raise Refused(self.fault.status, "", "simulated failure")
            with self.hub.lock:
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                open_to_all = path.startswith(("/lfs/", "/api/validate-yaml"))
                self.user = None if open_to_all else self.hub.store.user(token)
                result = self.route(method, path)
            reply = result if isinstance(result, Reply) else Reply(json.dumps(result).encode())
        except Refused as refused:
            named = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers = {name: value for name, value in named.items() if value}
            reply = Reply(json.dumps({"error": refused.message}).encode(), refused.status, headers)
        self.send(reply)

    def route(self, method: str, path: str) -> Any:
        for wanted, pattern, name in self.routes:
            match = re.fullmatch(pattern, path) if wanted == method else None
            if match is not None:
                return getattr(self, f"on_{name}")(*match.groups())
        raise Refused(404, "", f"no such address: {method} {path}")

    def read_body(self) -> bytes:
        """Return the body, of known length or in chunks; raise Cut where a fault requires it."""
        fault = self.fault
        limit = fault.after if fault and self.command in ("POST", "PUT") and not fault.unanswered else None
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                self.stop_at(limit, body)
            self.rfile.readline()
            self.stop_at(limit, body, at_end=True)
            return body
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if limit is None else min(limit, length))
        self.stop_at(limit, body, at_end=True)
        return body

    def stop_at(self, limit: int | None, body: bytes, at_end: bool = False) -> None:
        if limit is not None and (at_end or len(body) >= limit):
            self.body = body[:limit]
            raise Cut

    def close(self) -> None:
        """Cut the connection; the client receives a reset instead of a regular end."""
        self.status, self.close_connection = 0, True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def note(self) -> None:
        from hub_server.server import Request

        name = self.user.name if isinstance(self.user, User) else None
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, unquote(self.path), name, self.body, self.status))

    def send(self, reply: Reply) -> None:
        fault: Fault | None = self.fault
        if fault is not None and fault.unanswered:
            raise Cut
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.status = reply.status
        if self.command == "HEAD":
            return
        if fault is not None and fault.after is not None and fault.status is None:
            self.wfile.write(reply.body[: fault.after])
            self.wfile.flush()
            raise Cut
        self.wfile.write(reply.body)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
