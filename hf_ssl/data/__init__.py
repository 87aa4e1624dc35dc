# SPDX-License-Identifier: Apache-2.0
"""Images from anywhere, shuffled, split over processes, decoded and cropped, with a position that can be
resumed.

Layer 1: nothing here knows about methods or the trainer. The names below are loaded when first used, because
    a recipe
needs `DataConfig` alone and must not pay for torch and datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.data.batch import LoadedBatch
    from hf_ssl.data.broken import BrokenCounter
    from hf_ssl.data.config import DataConfig
    from hf_ssl.data.labelled import LabelledImages, labelled_images
    from hf_ssl.data.loader import holds_small_images, train_loader
    from hf_ssl.data.sources import Source, open_source

_HOMES = {
    "BrokenCounter": "broken",
    "DataConfig": "config",
    "LabelledImages": "labelled",
    "LoadedBatch": "batch",
    "Source": "sources",
    "holds_small_images": "loader",
    "labelled_images": "labelled",
    "open_source": "sources",
    "train_loader": "loader",
}

__all__ = [
    "BrokenCounter",
    "DataConfig",
    "LabelledImages",
    "LoadedBatch",
    "Source",
    "holds_small_images",
    "labelled_images",
    "open_source",
    "train_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
