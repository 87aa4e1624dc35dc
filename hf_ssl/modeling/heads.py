# SPDX-License-Identifier: Apache-2.0
"""Heads that methods put on an encoder."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.modeling.batch_norm import BatchNorm1dWithoutOffset

LAST_NORMS = ("none", "batch", "batch_without_affine", "batch_without_offset")


class MLPHead(nn.Sequential):
    """Linear layers with BatchNorm (unless switched off) and an activation between them: maps (N, sizes[0])
    to (N, sizes[-1]).

    BatchNorm's decay 0.9, as TensorFlow and JAX name it, is torch's momentum 0.1, the default.

    Args:
        sizes: widths from input to output; two of them make one Linear layer.
        norm: whether BatchNorm stands between layers.
        affine: whether these BatchNorms have a gain and an offset.
        bias: of the layers but the last; None: only where no BatchNorm follows.
        last_bias: of the last layer.
        activation: what follows each layer but the last.
        last_norm: what follows the last layer: "none", "batch", "batch_without_affine" (neither gain nor
            offset), or "batch_without_offset" (a gain alone, `center=False` in TensorFlow).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        norm: bool = True,
        affine: bool = True,
        bias: bool | None = None,
        last_bias: bool = False,
        last_norm: str = "none",
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = []
        for width, next_width in pairwise(sizes[:-1]):
            layers.append(nn.Linear(width, next_width, bias=not norm if bias is None else bias))
            if norm:
                layers.append(nn.BatchNorm1d(next_width, affine=affine))
            layers.append(nn.ReLU(inplace=True) if activation is nn.ReLU else activation())
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias))
        if last_norm != "none":
            layers.append(_norm(last_norm, sizes[-1]))
        super().__init__(*layers)


class WeightNormLinear(nn.Linear):
    """A linear layer without bias whose rows have a length of their own: maps (..., D) to (..., K).

    Args:
        dims, outputs: D and K.
        fixed_norm: whether lengths stay 1, so that the outputs of unit vectors are cosines.
    """

    def __init__(self, dims: int, outputs: int, *, fixed_norm: bool) -> None:
        super().__init__(dims, outputs, bias=False)
        self.gain = None if fixed_norm else nn.Parameter(torch.ones(outputs, 1))

    def initialize(self) -> None:
        """Length 1; the direction is drawn as that of any weight."""
        if self.gain is not None:
            init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        # Outputs are divided by a small temperature afterwards: bfloat16 has two digits of them.
        with torch.autocast(x.device.type, enabled=False):
            weight = F.normalize(self.weight, dim=1)
            weight = weight if self.gain is None else weight * self.gain
            return F.linear(x.to(weight.dtype), weight)


def projector_sizes(features: int, hidden: int | None, projection: int, layers: int) -> list[int]:
    """Widths of a projector of `layers` Linear layers; hidden width None takes that of the features."""
    return [features, *[hidden or features] * (layers - 1), projection]


def _norm(name: str, size: int) -> nn.Module:
    if name == "batch_without_offset":
        return BatchNorm1dWithoutOffset(size)
    if name not in LAST_NORMS:
        raise ValueError(f"expected a last norm of {', '.join(LAST_NORMS)}, got {name!r}")
    return nn.BatchNorm1d(size, affine=name == "batch")
