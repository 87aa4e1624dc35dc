# SPDX-License-Identifier: Apache-2.0
"""Heads on an encoder: projectors and predictors, the last layer of DINO, prototypes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.losses.upcasting import without_autocast
from hf_ssl.modeling.batch_norm import BatchNorm1dWithoutOffset

LAST_NORMS = ("none", "batch", "batch_without_affine", "batch_without_offset")


class MLPHead(nn.Sequential):
    """A multi-layer perceptron: maps (N, sizes[0]) to (N, sizes[-1]).

    BatchNorm, unless it is switched off, and an activation follow each Linear layer except the last.
    BatchNorm's decay 0.9 in TensorFlow and JAX is torch's momentum 0.1, the default.

    transformers initializes the weights with N(0, 0.02), as DINO's authors do, and the biases with zero. Most
    authors have torch's default: a uniform distribution with the standard deviation 1 / sqrt(3 * inputs).

    Args:
        sizes: widths from input to output; two widths make one Linear layer.
        norm: whether BatchNorm follows each layer except the last.
        affine: whether these BatchNorms have a gain and an offset.
        bias: whether layers except the last have a bias; None: only if no BatchNorm follows.
        last_bias: whether the last layer has a bias.
        activation: class of the activation.
        last_norm: normalization after the last layer: "none", "batch", "batch_without_affine" (no gain and no
            offset), or "batch_without_offset" (a gain only, `center=False` in TensorFlow).
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
        if last_norm not in LAST_NORMS:
            raise ValueError(f"last_norm: expected one of {', '.join(LAST_NORMS)}, got {last_norm!r}")
        layers: list[nn.Module] = []
        for width, next_width in pairwise(sizes[:-1]):
            layers.append(nn.Linear(width, next_width, bias=not norm if bias is None else bias))
            if norm:
                layers.append(nn.BatchNorm1d(next_width, affine=affine))
            layers.append(nn.ReLU(inplace=True) if activation is nn.ReLU else activation())
        layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias))
        if last_norm == "batch_without_offset":
            layers.append(BatchNorm1dWithoutOffset(sizes[-1]))
        elif last_norm != "none":
            layers.append(nn.BatchNorm1d(sizes[-1], affine=last_norm == "batch"))
        super().__init__(*layers)


def predictor_of(size: int, hidden_size: int, layers: int, **options: Any) -> nn.Module:
    """Return a predictor of projections (N, P) with a number of Linear layers; 0: the identity.

    Args:
        size: P.
        hidden_size: width of the hidden layers.
        layers: number of Linear layers.
        options: further arguments of `MLPHead`.
    """
    return MLPHead([size, *[hidden_size] * (layers - 1), size], **options) if layers else nn.Identity()


class WeightNormLinear(nn.Linear):
    """A weight-normalized linear layer without bias: maps (..., D) to (..., K).

    The weights before the normalization start with N(0, 0.02). In DINO's code, they start with torch's
    default, which is larger for D = 256. Smaller weights change their directions faster.

    Args:
        dims, outputs: D and K.
        fixed_norm: whether the rows keep length 1, so that the outputs of unit vectors are cosines. If False,
            the lengths are learned.
    """

    def __init__(self, dims: int, outputs: int, *, fixed_norm: bool) -> None:
        super().__init__(dims, outputs, bias=False)
        self.gain = None if fixed_norm else nn.Parameter(torch.ones(outputs, 1))

    def initialize(self) -> None:
        """Set the lengths to 1. The directions are initialized like any weight."""
        if self.gain is not None:
            init.ones_(self.gain)

    @without_autocast  # a small temperature divides the outputs, and bfloat16 has only two digits
    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1)
        weight = weight if self.gain is None else weight * self.gain
        return F.linear(x.to(weight.dtype), weight)


class Prototypes(nn.Linear):
    """K prototypes, unit vectors: maps unit embeddings (..., D) to cosines (..., K).

    Only `normalize` makes them unit vectors. An optimizer step changes their length, as in the authors' code
    of SwAV.
    """

    def __init__(self, count: int, dims: int) -> None:
        super().__init__(dims, count, bias=False)

    @torch.no_grad()
    def normalize(self) -> None:
        """Normalize the prototypes to length 1."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    @without_autocast  # a small temperature divides the cosines, and bfloat16 has only two digits
    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings.to(self.weight.dtype), self.weight)


def projector_sizes(features: int, config: Any) -> list[int]:
    """Return the widths of a projector from its input to its output.

    Args:
        features: width of the input.
        config: configuration with `projection_layers`, the number of Linear layers; `projection_hidden_size`,
            where None means the width of the input; and `projection_size`, the width of the output.
    """
    hidden = config.projection_hidden_size or features
    return [features, *[hidden] * (config.projection_layers - 1), config.projection_size]
