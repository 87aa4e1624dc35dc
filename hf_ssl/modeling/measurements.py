# SPDX-License-Identifier: Apache-2.0
"""Measurements that several methods report to the monitor."""

import torch
from torch import Tensor


def prototype_usage(nearest_N: Tensor, count: int) -> dict[str, float]:
    """Return how evenly N images use `count` prototypes.

    Args:
        nearest_N: number of the nearest prototype of each image.
        count: how many prototypes there are.

    Returns:
        `prototype_entropy`, the entropy of the shares divided by its maximum, 1 for equal shares; and
        `prototypes_used`, the share of prototypes that have an image, of the min(N, count) that could. Both
        are between 0 and 1; they are 0 and 1 / min(N, count) if one prototype has all images.
    """
    shares = torch.bincount(nearest_N.flatten(), minlength=count).double() / nearest_N.numel()
    most = min(count, nearest_N.numel())
    used = shares[shares > 0]
    entropy = -(used * used.log()).sum() / torch.tensor(most).log().clamp_min(1e-12)
    return {"prototype_entropy": max(0.0, entropy.item()), "prototypes_used": len(used) / most}


@torch.no_grad()
def off_diagonal_correlation(z_BD: Tensor) -> float:
    """Return the root mean square correlation between different dimensions over B images, 0 to 1.

    The smaller of the two products is computed: the squares of all correlations sum to those of the B x B
    Gram matrix, and those on the diagonal are known.
    """
    z_BD = z_BD.double()
    z_BD = z_BD - z_BD.mean(0)
    z_BD = z_BD / z_BD.square().sum(0).sqrt().clamp_min(1e-12)
    batch, dims = z_BD.shape
    product = z_BD @ z_BD.T if batch < dims else z_BD.T @ z_BD
    diagonal = z_BD.square().sum(0).square().sum()
    return ((product.square().sum() - diagonal).clamp_min(0) / (dims * (dims - 1))).sqrt().item()
