# SPDX-License-Identifier: Apache-2.0
"""Prototypes: directions that images are assigned to."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prototypes(nn.Linear):
    """K unit vectors; maps unit embeddings (..., D) to cosines (..., K).

    They are unit vectors after `normalize`, not by construction: a step of the optimiser leads away from the
    sphere, as in the authors' code of SwAV.
    """

    def __init__(self, count: int, dims: int) -> None:
        super().__init__(dims, count, bias=False)

    @torch.no_grad()
    def normalize(self) -> None:
        """Bring the prototypes back to length 1."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        # Cosines are divided by a small temperature afterwards: bfloat16 has two digits of them.
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(embeddings.to(self.weight.dtype), self.weight)


def usage(nearest_N: Tensor, count: int) -> tuple[float, float]:
    """How evenly N images share `count` prototypes: entropy of the shares over its maximum, and the share of
    prototypes that have an image, of those that could.

    Returns:
        Both between 0 and 1; (0, 1 / min(N, count)) where one prototype has all.
    """
    shares = torch.bincount(nearest_N.flatten(), minlength=count).double() / nearest_N.numel()
    most = min(count, nearest_N.numel())
    used = shares[shares > 0]
    entropy = -(used * used.log()).sum() / torch.tensor(most).log().clamp_min(1e-12)
    return max(0.0, entropy.item()), len(used) / most
