# SPDX-License-Identifier: Apache-2.0
"""Export of an encoder, and publication of a finished run on the Hugging Face Hub (layer 3).

This package reads files and models; it does not import the trainer. The names below are loaded when they are
first used. The names of `hf_ssl.cards` are deprecated here.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ssl import cards

if TYPE_CHECKING:
    from hf_ssl.hub.export import export_checkpoint, export_encoder, image_processor

_HOMES = {
    "export_checkpoint": "export",
    "export_encoder": "export",
    "image_processor": "export",
}

__all__ = [
    "export_checkpoint",
    "export_encoder",
    "image_processor",
]


def __getattr__(name: str) -> Any:
    if name in cards.__all__:
        warnings.warn(
            f"hf_ssl.hub.{name} moved to hf_ssl.cards.{name}; this name will be removed in 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(cards, name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
