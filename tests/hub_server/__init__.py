# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback for tests: speaks the protocol that huggingface_hub, transformers and datasets speak.

`with HubServer() as hub:` serves `hub.endpoint` from memory; `hub.environment(home, token)` is what the
process of a client needs. Users, repos and commits lie in `hub.store`; `hub.requests` remembers what came in;
`hub.fail` and `hub.cut` make it stumble.
"""

from hub_server.server import HubServer, Request
from hub_server.store import Refused, Repo, Store, User

__all__ = ["HubServer", "Refused", "Repo", "Request", "Store", "User"]
