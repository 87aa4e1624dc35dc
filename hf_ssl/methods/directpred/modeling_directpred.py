# SPDX-License-Identifier: Apache-2.0
"""DirectPred: a predictor that is computed without gradient (arXiv:2102.06810)."""

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.evaluation.statistics import rank_me
from hf_ssl.losses import cosine_regression
from hf_ssl.losses.upcasting import without_autocast
from hf_ssl.methods.directpred.configuration_directpred import DirectPredConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.heads import MLPHead
from hf_ssl.modeling.memory import PersistentBuffers
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import RunProgress, SSLOutput, eigenspace_alignment, loss_of_both_views


class DirectPredForPreTraining(MomentumModel):
    """BYOL with a linear predictor that is computed from the projections' correlation matrix.

    The correlation matrix is a moving average of the mean of f f^T over the images of all processes. Here f
    are the online projections of both views. It starts as the matrix of the first batch. The EMA update of
    the matrix comes after each batch.

    The predictor has no bias. It is computed before a step. Its eigenvectors are those of the correlation
    matrix, and eigenvalue s_j becomes (s_j / s_max)^exponent + epsilon. DirectCopy (exponent 1) has
    s_j + epsilon. Between two updates, the predictor is trained by gradient (`learn_between_updates`).

    The predictor is the identity in the first step. In the authors' code (facebookresearch/luckmatters,
    ssl/real-dataset/byol_trainer.py) it is random in the first step. From the second step on, both are
    computed in the same way. Each view is encoded separately.
    """

    config_class = DirectPredConfig
    maximum_views = 2
    memory_inputs = ("projections",)
    joint_batch_norm = False

    def __init__(self, config: DirectPredConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), config.projection_hidden_size, config.projection_size]
        self.projector = MLPHead(sizes, affine=False, bias=True, last_bias=True)
        self.teacher_projector = MLPHead(sizes, affine=False, bias=True, last_bias=True)
        self.predictor = Predictor(config.projection_size, learned=config.learns_predictor)
        self.post_init()

    def before_step(self, progress: RunProgress) -> None:
        """Also compute the predictor, once in `update_frequency` steps and never before the first batch."""
        super().before_step(progress)
        config = self.config
        if progress.step and (progress.step - 1) % config.update_frequency == 0:
            given = config.normalize_eigenvalues
            normalized = config.exponent != 1 if given is None else given
            self.predictor.update_weight(config.exponent, config.epsilon, normalized=normalized)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return projections (B, 2, P) of the online and targets (B, 2, P) of the target network."""
        pixel_values = inputs["pixel_values"]
        projections = self.project_views(pixel_values)
        return {"projections": projections, "targets": self.teacher_projections(pixel_values)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the sum over both views of the mean of 2 - 2 cos(prediction, the other view's target)."""
        projections, targets = embeddings["projections"], embeddings["targets"]
        loss, terms = loss_of_both_views(cosine_regression, self.predictor(projections), targets)
        return SSLOutput(loss=loss, terms=terms, embeddings=projections)

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Update the correlation matrix with this batch's projections."""
        self.predictor.update_correlation(
            embeddings["projections"].flatten(0, 1), self.config.correlation_momentum
        )

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `predictor_rank` and `eigenspace_alignment` of the predictor."""
        weight = self.predictor.weight
        alignment = eigenspace_alignment(weight, embeddings["projections"])
        return {"predictor_rank": rank_me(weight), "eigenspace_alignment": alignment}


class Predictor(PersistentBuffers):
    """A linear map of projections (..., P) whose matrix is computed from a correlation matrix.

    Args:
        size: P.
        learned: whether the matrix of the map is a parameter. Otherwise it is a buffer of the same name.

    Attributes:
        correlation: (P, P), the moving average of the correlation matrix; zero before the first batch.
        weight: (P, P), the matrix of the map.
    """

    correlation: Tensor
    weight: Tensor

    def __init__(self, size: int, *, learned: bool) -> None:
        super().__init__()
        self.register_buffer("correlation", torch.zeros(size, size))
        if learned:
            self.weight = nn.Parameter(torch.eye(size))
        else:
            self.register_buffer("weight", torch.eye(size))

    def initialize(self) -> None:
        """Write zeros to the correlation matrix and the identity to the weight."""
        init.zeros_(self.correlation)
        init.copy_(self.weight, torch.eye(len(self.weight), device=self.weight.device))

    def forward(self, projections: Tensor) -> Tensor:
        return linear(projections, self.weight.to(projections.dtype))

    @torch.no_grad()
    @without_autocast
    def update_correlation(self, projections_NP: Tensor, momentum: float) -> None:
        """Update the correlation matrix by EMA with that of projections (N, P). Copy the first one."""
        rows = projections_NP.to(self.correlation.dtype)
        started = self.correlation.any()  # stays on the device: reading it on the host would synchronize
        self.correlation.lerp_(rows.T @ rows / len(rows), 1 - momentum * started.to(rows.dtype))

    @torch.no_grad()
    def update_weight(self, exponent: float, epsilon: float, *, normalized: bool) -> None:
        """Compute the predictor from the correlation matrix's eigenvectors.

        Args:
            exponent, epsilon: an eigenvalue s becomes s^exponent + epsilon.
            normalized: whether the largest eigenvalue becomes 1 before that. New eigenvalues are then at
                least 1e-4, as in the authors' `compute_w_corr`.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            values, vectors = torch.linalg.eigh(self.correlation)
            values = values.clamp_min(0)  # rounding can make them negative
            if normalized:  # the largest one is a divisor and must not be zero
                values = ((values / values[-1].clamp_min(1e-12)) ** exponent + epsilon).clamp_min(1e-4)
            else:
                values = values**exponent + epsilon
            self.weight.copy_((vectors * values) @ vectors.T)


AutoModelForPreTraining.register(DirectPredConfig, DirectPredForPreTraining)
