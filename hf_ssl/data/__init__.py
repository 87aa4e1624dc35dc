# SPDX-License-Identifier: Apache-2.0
"""Opens, shuffles and decodes images from any source, divided between processes, with an exact resume.

Layer 1: this package imports neither methods nor the trainer. The names below are loaded at first use,
because a recipe needs only `DataConfig` and must not import torch and datasets.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.data.adapters import as_source
    from hf_ssl.data.batch import BrokenCounter, LoadedBatch
    from hf_ssl.data.config import DataConfig
    from hf_ssl.data.images import all_images, without_broken_images
    from hf_ssl.data.labeled import LabeledImages
    from hf_ssl.data.labeled_splits import divided_images, label_data, label_source, labeled_images
    from hf_ssl.data.loader import holds_small_images, train_loader
    from hf_ssl.data.sources import Source, open_source

_RENAMED = {"LabelledImages": "hf_ssl.data.LabeledImages", "labelled_images": "hf_ssl.data.labeled_images"}

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__, renamed=_RENAMED)
