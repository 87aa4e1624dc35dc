# SPDX-License-Identifier: Apache-2.0
"""From a trained model to a repo that anybody can use: export, facts, results file, card.

Layer 3: needs files and a model, never the trainer. The names below are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.hub.card import write_card
    from hf_ssl.hub.export import export_encoder
    from hf_ssl.hub.facts import Facts, read_facts, write_facts
    from hf_ssl.hub.machine import environment
    from hf_ssl.hub.privacy import last_part, public
    from hf_ssl.hub.processor import image_processor
    from hf_ssl.hub.results import append_result

_HOMES = {
    "Facts": "facts",
    "append_result": "results",
    "environment": "machine",
    "export_encoder": "export",
    "image_processor": "processor",
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
    "export_encoder",
    "image_processor",
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
