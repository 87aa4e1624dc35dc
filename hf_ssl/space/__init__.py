# SPDX-License-Identifier: Apache-2.0
"""Builds and serves a Space that demonstrates an encoder (layer 5).

A Space is a folder that can run on any machine. The names below load at their first use, because serving
needs no torch in this process.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.space.build import build_space
    from hf_ssl.space.serve import check_packages, run_space

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
