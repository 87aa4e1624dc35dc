# SPDX-License-Identifier: Apache-2.0
"""Fixed two-dimensional sine-cosine positions of patches, for encoders and predictors.

Legend: P patches of an image (row by row), S special tokens before them, D dims.
"""

from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.modeling.memory import Memory


def sine_cosine_2d(height: int, width: int, dims: int) -> Tensor:
    """Return the positions (P, D) of a grid of patches, float64.

    The first half of the dims encodes the column, the second half the row. Each half has sines at D / 4
    frequencies from 1 to about 1 / 10,000, then cosines.

    Args:
        height, width: of the grid, in patches.
        dims: D, a multiple of 4.

    Raises:
        UserError: dims is not a multiple of 4.

    Source: the authors' code of MAE (facebookresearch/mae, util/pos_embed.py), which I-JEPA and MoCo v3
    share. Its names have the row first, but its values and published weights have the column first.
    """
    if dims % 4:
        raise UserError(f"hidden_size: expected a multiple of 4 for sine-cosine positions, got {dims}")
    frequencies = 10_000.0 ** -(torch.arange(dims // 4, dtype=torch.float64) / (dims // 4))
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [place.flatten().outer(frequencies) for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def patch_grid(backbone: Any) -> tuple[int, int]:
    """Return the rows and columns of patches in an image of a vision transformer's own size."""
    patches = backbone.embeddings.patch_embeddings
    (height, width), (patch_height, patch_width) = patches.image_size, patches.patch_size
    return height // patch_height, width // patch_width


def fill_positions(table: Tensor, grid: tuple[int, int]) -> None:
    """Write sine-cosine positions to a table (1, S + P, D), unless a checkpoint has filled it.

    The first S rows become zero.
    """
    patches = sine_cosine_2d(*grid, table.shape[-1])
    special = patches.new_zeros(table.shape[1] - len(patches), table.shape[-1])
    init.copy_(table, torch.cat([special, patches])[None].to(table))


def fix_positions(backbone: Any) -> None:
    """Write sine-cosine positions to a vision transformer's own table, unless a checkpoint has filled it.

    A method's `_init_weights(self)` calls it, because that comes after the encoder's initialization. It does
    not freeze the table.
    """
    fill_positions(backbone.embeddings.position_embeddings, patch_grid(backbone))


class PositionTable(Memory):
    """Fixed sine-cosine positions as a buffer: checkpoints contain it, optimizers do not see it.

    Args:
        special: S.
        height, width: of the grid, in patches.
        dims: D.

    Attributes:
        table: (1, S + P, D); the first S rows are zero.
    """

    table: Tensor

    def __init__(self, special: int, height: int, width: int, dims: int) -> None:
        super().__init__()
        self.grid = (height, width)
        self.register_buffer("table", torch.empty(1, special + height * width, dims))
        self.initialize()

    def initialize(self) -> None:
        """Write the positions."""
        fill_positions(self.table, self.grid)
