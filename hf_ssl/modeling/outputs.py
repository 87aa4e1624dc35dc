# SPDX-License-Identifier: Apache-2.0
"""The output of a method's forward pass, losses of two views, the argument of hooks, and measurements."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class SSLOutput(ModelOutput):
    """Output of a method's forward pass.

    Attributes:
        loss: scalar.
        terms: the named parts of the loss, detached scalars. The trainer logs and plots them separately.
        embeddings: (B, V, D) the vectors that the loss compares, for the monitor; of all processes if the
            method gathers.
        hidden_states: with `output_hidden_states`, the input of the backbone's first layer and the output of
            each layer. They belong to the first images that the backbone encodes (usually all global views).
        attentions: with `output_attentions`, the attention weights of each layer for the same images. Only
            the attention implementation "eager" computes them.
    """

    loss: Tensor | None = None
    terms: dict[str, Tensor] | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run when a hook is called. Hooks receive no other measure of time.

    Attributes:
        step: completed optimizer steps (in `after_step` including the last one).
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch. For a stream of unknown length, it is `total_steps`, and
            no setting counts epochs (`hf_ssl.trainer.epochs`).
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Return the completed share of the run, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Return the completed epochs."""
        return self.step / self.steps_per_epoch


COLLAPSED_RANK = {"embedding_rank": 2.0}
COLLAPSED_PROTOTYPES = {"prototype_entropy": 0.05, **COLLAPSED_RANK}
"""`collapsed_below` of methods with prototypes. Embeddings of these methods may share a direction without
collapse, because the loss compares them with prototypes."""


def loss_of_both_views(
    loss: Callable[[Tensor, Tensor], Tensor], predictions_B2P: Tensor, targets_B2P: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the losses of two views, and these losses as terms of an `SSLOutput`.

    Args:
        loss: a function of predictions (B, P) and targets (B, P).
        predictions_B2P: predictions of both views.
        targets_B2P: targets of both views. Each view predicts the target of the other one.
    """
    first = loss(predictions_B2P[:, 0], targets_B2P[:, 1])
    second = loss(predictions_B2P[:, 1], targets_B2P[:, 0])
    return first + second, {"first_view": first.detach(), "second_view": second.detach()}


def prototype_usage(nearest_N: Tensor, count: int) -> dict[str, float]:
    """Return how evenly N images use `count` prototypes.

    Args:
        nearest_N: index of the nearest prototype of each image.
        count: how many prototypes there are.

    Returns:
        `prototype_entropy` is the entropy of the prototypes' shares divided by its maximum. It is 1 for equal
        shares and 0 if one prototype has all images. `prototypes_used` is the number of prototypes with an
        image divided by its maximum, min(N, count).
    """
    shares = torch.bincount(nearest_N.flatten(), minlength=count).double() / nearest_N.numel()
    most = min(count, nearest_N.numel())
    used = shares[shares > 0]
    entropy = -(used * used.log()).sum() / torch.tensor(most).log().clamp_min(1e-12)
    return {"prototype_entropy": max(0.0, entropy.item()), "prototypes_used": len(used) / most}


@torch.no_grad()
def off_diagonal_correlation(z_BD: Tensor) -> float:
    """Return the root mean square correlation between different dimensions over B images, 0 to 1.

    The function computes the smaller one of the D x D correlation matrix and the B x B Gram matrix. Both have
    the same sum of squared elements. The diagonal of the correlation matrix is known and subtracted.
    """
    z_BD = z_BD.double()
    z_BD = z_BD - z_BD.mean(0)
    z_BD = z_BD / z_BD.square().sum(0).sqrt().clamp_min(1e-12)
    batch, dims = z_BD.shape
    product = z_BD @ z_BD.T if batch < dims else z_BD.T @ z_BD
    diagonal = z_BD.square().sum(0).square().sum()
    return ((product.square().sum() - diagonal).clamp_min(0) / (dims * (dims - 1))).sqrt().item()


@torch.no_grad()
def eigenspace_alignment(weight_PP: Tensor, projections: Tensor) -> float:
    """Return how well the eigenvectors of a linear predictor and of a correlation matrix agree.

    Args:
        weight_PP: the matrix W of the predictor, which maps f to W f.
        projections: (..., P), inputs f of the predictor.

    Returns:
        The mean of |cos(u, W u)| over the eigenvectors u with nonzero eigenvalues of the correlation matrix.
        This matrix is the mean of f f^T. It is 1 if both matrices have the same eigenvectors, and also if W
        is a multiple of the identity. Theorem 3 of DirectPred (Tian et al., arXiv:2102.06810) states that a
        learned symmetric predictor approaches 1.
    """
    weight_PP, rows_NP = weight_PP.cpu().double(), projections.flatten(0, -2).cpu().double()
    values, vectors = torch.linalg.eigh(rows_NP.T @ rows_NP / len(rows_NP))
    vectors = vectors[:, values > values[-1] * len(values) * torch.finfo(torch.float32).eps]
    return torch.cosine_similarity(vectors, weight_PP @ vectors, dim=0).abs().mean().item()
