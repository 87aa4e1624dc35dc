# SPDX-License-Identifier: Apache-2.0
"""How much the dimensions of embeddings tell the same."""

import torch
from torch import Tensor


@torch.no_grad()
def off_diagonal_correlation(z_BD: Tensor) -> float:
    """Root mean square of the correlations between different dimensions over B images, 0 to 1.

    Through the smaller of the two products: the squares of all correlations sum to those of the B x B Gram
    matrix, and those on the diagonal are known.
    """
    z_BD = z_BD.double()
    z_BD = z_BD - z_BD.mean(0)
    z_BD = z_BD / z_BD.square().sum(0).sqrt().clamp_min(1e-12)
    batch, dims = z_BD.shape
    product = z_BD @ z_BD.T if batch < dims else z_BD.T @ z_BD
    diagonal = z_BD.square().sum(0).square().sum()
    return ((product.square().sum() - diagonal).clamp_min(0) / (dims * (dims - 1))).sqrt().item()
