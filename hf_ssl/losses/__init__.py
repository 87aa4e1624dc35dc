# SPDX-License-Identifier: Apache-2.0
"""Losses as pure functions of tensors (layer 0, torch only): nothing here holds state or knows a process
group.

Legend of the suffixes: V views, B batch, D dims, N = V * B rows.
"""

from hf_ssl.losses.contrastive import nt_xent

__all__ = ["nt_xent"]
