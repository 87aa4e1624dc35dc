# SPDX-License-Identifier: Apache-2.0
"""Records of a run (layer 3): facts, the model card, and the results file of a recipe.

The names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.cards.card import write_card
    from hf_ssl.cards.facts import Facts, read_facts, write_facts
    from hf_ssl.cards.machine import environment
    from hf_ssl.cards.privacy import last_part, public
    from hf_ssl.cards.results import append_result

_HOMES = {
    "Facts": "facts",
    "append_result": "results",
    "environment": "machine",
    "last_part": "privacy",
    "public": "privacy",
    "read_facts": "facts",
    "write_card": "card",
    "write_facts": "facts",
}

__all__ = [
    "Facts",
    "append_result",
    "environment",
    "last_part",
    "public",
    "read_facts",
    "write_card",
    "write_facts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
