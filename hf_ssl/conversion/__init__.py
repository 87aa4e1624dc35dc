# SPDX-License-Identifier: Apache-2.0
"""Converts released checkpoints of other code to encoders of transformers (layer 4).

`releases.py` is the table of releases. `checkpoint.py` reads a file without running its code. `resnet.py` and
`vit.py` contain the names of the weights. `converting.py` selects the encoder in a file and writes it.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.conversion.converting import convert
    from hf_ssl.conversion.releases import RELEASES

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
