# SPDX-License-Identifier: Apache-2.0
"""Opens, shuffles and decodes images from any source, divided between processes, with an exact resume.

Layer 1: this package knows neither methods nor the trainer. The names below are loaded at first use, because
a recipe needs only `DataConfig` and must not import torch and datasets.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.data.batch import BrokenCounter, LoadedBatch
    from hf_ssl.data.config import DataConfig
    from hf_ssl.data.labeled import LabeledImages, labeled_images
    from hf_ssl.data.loader import holds_small_images, train_loader
    from hf_ssl.data.sources import Source, open_source

_HOMES = {
    "BrokenCounter": "batch",
    "DataConfig": "config",
    "LabeledImages": "labeled",
    "LoadedBatch": "batch",
    "Source": "sources",
    "holds_small_images": "loader",
    "labeled_images": "labeled",
    "open_source": "sources",
    "train_loader": "loader",
}
_DEPRECATED = {"LabelledImages": "LabeledImages", "labelled_images": "labeled_images"}  # old name -> new name

__all__ = [
    "BrokenCounter",
    "DataConfig",
    "LabeledImages",
    "LoadedBatch",
    "Source",
    "holds_small_images",
    "labeled_images",
    "open_source",
    "train_loader",
]


def __getattr__(name: str) -> Any:
    if name in _DEPRECATED:
        new = _DEPRECATED[name]
        warnings.warn(f"{__name__}.{name} is deprecated; use {new}", DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
