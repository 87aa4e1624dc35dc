# SPDX-License-Identifier: Apache-2.0
"""Augmentation (layer 0): makes views of images for self-supervised training.

There are three steps. `sample_parameters` samples the augmentation parameters on the host, as a pure function
of one seed per image, so nothing has to be saved or synchronized. `crop` (stage one, optional) crops large
images in a loader worker. `augment` (stage two) does the rest in batches on the device of the pixels. Both
stages are pure functions of the pixels and the parameters. Nothing here depends on methods, files or models.

`ViewPreset` contains the settings. A new augmentation goes into `hf_ssl/views/operations.py`.

The names below are loaded at their first use, because recipes and configs need only `ViewPreset` and must not
wait for torch. For the same reason, no module has the name of a function.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.views.cropping import Crops, crop
    from hf_ssl.views.parameters import ViewParameters, sample_parameters
    from hf_ssl.views.pipeline import Views, augment, montage
    from hf_ssl.views.preset import ViewOverrides, ViewPreset, ViewSettings

_HOMES = {
    "Crops": "cropping",
    "ViewOverrides": "preset",
    "ViewParameters": "parameters",
    "ViewPreset": "preset",
    "ViewSettings": "preset",
    "Views": "pipeline",
    "augment": "pipeline",
    "crop": "cropping",
    "montage": "pipeline",
    "sample_parameters": "parameters",
}

# Deprecated names, which work for one more release.
_RENAMED = {
    "FOR_METHODS": "hf_ssl.random.FIRST_METHOD_NUMBER",
    "apply": "hf_ssl.views.augment",
    "draw": "hf_ssl.views.sample_parameters",
    "seeds": "hf_ssl.random.image_seeds",
    "uniforms": "hf_ssl.random.uniforms",
}

__all__ = [
    "Crops",
    "ViewOverrides",
    "ViewParameters",
    "ViewPreset",
    "ViewSettings",
    "Views",
    "augment",
    "crop",
    "montage",
    "sample_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"hf_ssl.views.{name} is deprecated; use {new}", DeprecationWarning, stacklevel=2)
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
