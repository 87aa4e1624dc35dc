# SPDX-License-Identifier: Apache-2.0
"""What makes views of images: draw the parameters on the host, crop in a worker, do the rest in batches
anywhere.

Layer 0. `draw` is a pure function of a seed for each image, so nothing has to be saved or synchronised;
`crop` (stage one) and `apply` (stage two) are pure functions of the pixels and what was drawn. Nothing here
knows about methods, files or models. The names below are loaded when first used, because recipes and configs
need `ViewPreset` alone and must not pay for torch. (For the same reason no module is named after the function
that it holds.)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.views.cropping import Crops, crop
    from hf_ssl.views.drawing import ViewParameters, draw
    from hf_ssl.views.hashing import FOR_METHODS, seeds, uniforms
    from hf_ssl.views.picture import montage
    from hf_ssl.views.pipeline import Views, apply
    from hf_ssl.views.preset import ViewOverrides, ViewPreset, ViewSettings

_HOMES = {
    "Crops": "cropping",
    "FOR_METHODS": "hashing",
    "ViewOverrides": "preset",
    "ViewParameters": "drawing",
    "ViewPreset": "preset",
    "ViewSettings": "preset",
    "Views": "pipeline",
    "apply": "pipeline",
    "crop": "cropping",
    "draw": "drawing",
    "montage": "picture",
    "seeds": "hashing",
    "uniforms": "hashing",
}

__all__ = [
    "FOR_METHODS",
    "Crops",
    "ViewOverrides",
    "ViewParameters",
    "ViewPreset",
    "ViewSettings",
    "Views",
    "apply",
    "crop",
    "draw",
    "montage",
    "seeds",
    "uniforms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
