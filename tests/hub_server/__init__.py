# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback for tests, with the protocol of huggingface_hub, transformers and datasets.

`with HubServer() as hub:` serves `hub.endpoint` from memory. `hub.environment(home, token)` returns the
environment of a client process. `hub.store` contains users, repositories and commits, and `hub.requests` the
received requests. `hub.fail` and `hub.cut` simulate failures.
"""

from hub_server.server import HubServer, Request
from hub_server.store import Refused, Repo, Store, User

__all__ = ["HubServer", "Refused", "Repo", "Request", "Store", "User"]
