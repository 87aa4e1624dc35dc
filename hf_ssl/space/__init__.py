# SPDX-License-Identifier: Apache-2.0
"""A Space that shows an encoder: built as a folder that runs anywhere, and served on this machine (layer 5).

The names below are loaded when first used: serving needs no torch in this process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.space.build import build_space
    from hf_ssl.space.demo import serve_digits
    from hf_ssl.space.serve import check_packages, run_space

_HOMES = {
    "build_space": "build",
    "check_packages": "serve",
    "run_space": "serve",
    "serve_digits": "demo",
}

__all__ = ["build_space", "check_packages", "run_space", "serve_digits"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
