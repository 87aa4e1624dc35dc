# SPDX-License-Identifier: Apache-2.0
"""VICReg: variance, invariance, covariance (arXiv:2105.04906)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import vicreg_terms
from hf_ssl.losses.precision import raised
from hf_ssl.methods.vicreg.configuration_vicreg import VICRegConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead
from hf_ssl.modeling.measurements import off_diagonal_correlation
from hf_ssl.modeling.outputs import SSLOutput


class VICRegForPreTraining(SSLPreTrainedModel):
    """Views of an image agree; each dimension keeps its spread, and no two tell the same.

    Exactly two views. Each goes through the network by itself. Variances and covariances are taken over the
    images of all processes, as in the authors' code, which also synchronises BatchNorm. The variance is
    averaged over both views and the covariance summed, as there; solo-learn sums both.
    """

    config_class = VICRegConfig
    couples_samples = True
    collapsed_below = {"dimension_std": 0.03, "embedding_rank": 2.0}  # noqa: RUF012  (a declaration)
    maximum_views = 2
    joint_batch_norm = False

    def __init__(self, config: VICRegConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), *[config.projection_size] * config.projection_layers]
        self.projector = MLPHead(sizes, bias=True)
        self.post_init()

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Projections (B, 2, P)."""
        pixel_values = inputs["pixel_values"]
        return {"projections": self.apply_to_views(self.projector, self.encode_views(pixel_values))}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """The weighted sum of invariance, variance and covariance."""
        projections, config = embeddings["projections"], self.config
        invariance, variance, covariance = vicreg_terms(projections[:, 0], projections[:, 1])
        loss = (
            config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance
        )
        terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
        terms = {name: term.detach() for name, term in terms.items()}
        return SSLOutput(loss=loss, terms=terms, embeddings=projections)

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Of the first view's projections `off_diagonal_correlation`, root mean square, and `dimension_std`,
        the mean standard deviation of a dimension, which the variance term wants to be 1. Everything may
        shrink to one point here, which measures of directions do not see."""
        first = raised(embeddings["projections"][:, 0])
        return {
            "off_diagonal_correlation": off_diagonal_correlation(first),
            "dimension_std": first.std(dim=0).mean().item(),
        }


AutoModelForPreTraining.register(VICRegConfig, VICRegForPreTraining)
