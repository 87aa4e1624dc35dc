# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins: redundancy reduction (arXiv:2103.03230)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import barlow_twins_terms
from hf_ssl.methods.barlow_twins.configuration_barlow_twins import BarlowTwinsConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead
from hf_ssl.modeling.outputs import SSLOutput, off_diagonal_correlation
from hf_ssl.modeling.parameter_groups import ParameterRule


class BarlowTwinsForPreTraining(SSLPreTrainedModel):
    """The correlation matrix between the embeddings of two views approaches the identity.

    The method needs exactly two views and encodes each separately. Correlations are computed over the images
    of all processes, as in the authors' code. The authors' code also synchronizes BatchNorm.
    """

    config_class = BarlowTwinsConfig
    couples_samples = True
    maximum_views = 2
    joint_batch_norm = False

    def __init__(self, config: BarlowTwinsConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), *[config.projection_size] * config.projection_layers]
        self.projector = MLPHead(sizes)
        self.post_init()

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Return the rule for the learning rate of biases and normalization layers."""
        scale = self.config.vector_learning_rate_scale
        return (ParameterRule(r".", learning_rate_scale=scale, vectors_only=True),)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the projections (B, 2, P)."""
        return {"projections": self.project_views(inputs["pixel_values"])}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the scaled loss: the sum of (1 - C_ii)^2 plus the weighted sum of C_ij^2 with i != j.

        C is the correlation matrix between the projections of the two views.
        """
        projections = embeddings["projections"]
        on, off = barlow_twins_terms(projections[:, 0], projections[:, 1])
        loss = self.config.loss_scale * (on + self.config.off_diagonal_weight * off)
        terms = {"on_diagonal": on.detach(), "off_diagonal": off.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=projections)

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return the root mean square correlation between dimensions of the first view's projections."""
        return {"off_diagonal_correlation": off_diagonal_correlation(embeddings["projections"][:, 0])}


AutoModelForPreTraining.register(BarlowTwinsConfig, BarlowTwinsForPreTraining)
