# SPDX-License-Identifier: Apache-2.0
"""Fixed two-dimensional sine-cosine positions of patches, for encoders and for what follows them.

Legend: P patches of an image (row by row), S tokens before them, D dims.
"""

from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.modeling.memory import Memory


def sine_cosine_2d(height: int, width: int, dims: int) -> Tensor:
    """Positions of a grid of patches: one half of the dims tells the column, the other half the row.

    Args:
        height, width: of the grid, in patches.
        dims: D, a multiple of 4.

    Returns:
        (P, D) float64: sines of the column at D / 4 frequencies from 1 to about 1 / 10,000, their cosines,
        then both of the row.

    Raises:
        UserError: dims is no multiple of 4.

    Source: the authors' code of MAE (facebookresearch/mae, util/pos_embed.py), which I-JEPA and MoCo v3
    share. Its names say row first, its values are column first, and so are published weights.
    """
    if dims % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, got {dims}")
    frequencies = 10_000.0 ** -(torch.arange(dims // 4, dtype=torch.float64) / (dims // 4))
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [place.flatten().outer(frequencies) for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def patch_grid(backbone: Any) -> tuple[int, int]:
    """Rows and columns of patches in an image of a vision transformer's own size."""
    patches = backbone.embeddings.patch_embeddings
    (height, width), (patch_height, patch_width) = patches.image_size, patches.patch_size
    return height // patch_height, width // patch_width


def fix_positions(backbone: Any) -> None:
    """Write the sine-cosine table, zero for tokens before the patches, into a vision transformer's own
    position table, unless a checkpoint has filled that.

    Called by a method's `_init_weights(self)`, which comes after the encoder's. Freezing is another thing.
    """
    table = backbone.embeddings.position_embeddings
    height, width = patch_grid(backbone)
    patches = sine_cosine_2d(height, width, table.shape[-1])
    before = patches.new_zeros(table.shape[1] - len(patches), table.shape[-1])
    init.copy_(table, torch.cat([before, patches])[None].to(table))


class PositionTable(Memory):
    """Fixed sine-cosine positions as a buffer: a checkpoint holds them, and no optimiser sees them.

    Attributes:
        table: (1, S + P, D); the first S rows are zero.
    """

    table: Tensor

    def __init__(self, before: int, height: int, width: int, dims: int) -> None:
        super().__init__()
        self.before, self.grid = before, (height, width)
        self.register_buffer("table", torch.empty(1, before + height * width, dims))
        self.initialize()

    def initialize(self) -> None:
        """Write the table."""
        patches = sine_cosine_2d(*self.grid, self.table.shape[-1])
        before = patches.new_zeros(self.before, self.table.shape[-1])
        init.copy_(self.table, torch.cat([before, patches])[None].to(self.table))
