# SPDX-License-Identifier: Apache-2.0
"""Export of an encoder, and publication of a finished run on the Hugging Face Hub (layer 3).

This package reads files and models; it does not import the trainer. The names below are loaded when they are
first used. The names of `hf_ssl.cards` are deprecated here.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.hub.export import export_checkpoint, export_encoder, image_processor

_RENAMED = {
    "Facts": "hf_ssl.cards.Facts",
    "append_result": "hf_ssl.cards.append_result",
    "environment": "hf_ssl.cards.environment",
    "last_part": "hf_ssl.cards.last_part",
    "public": "hf_ssl.cards.remove_private",
    "read_facts": "hf_ssl.cards.read_facts",
    "write_card": "hf_ssl.cards.write_card",
    "write_facts": "hf_ssl.cards.write_facts",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__, renamed=_RENAMED)
