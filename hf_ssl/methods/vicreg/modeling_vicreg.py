# SPDX-License-Identifier: Apache-2.0
"""VICReg: variance, invariance, covariance (arXiv:2105.04906)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import vicreg_terms
from hf_ssl.losses.upcasting import upcast
from hf_ssl.methods.vicreg.configuration_vicreg import VICRegConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead
from hf_ssl.modeling.outputs import COLLAPSED_RANK, SSLOutput, off_diagonal_correlation


class VICRegForPreTraining(SSLPreTrainedModel):
    """Views of an image become similar, each dimension keeps its variance, and covariances approach zero.

    The method needs exactly two views and encodes each separately. Variances and covariances are computed
    over the images of all processes, as in the authors' code. The authors' code also synchronizes BatchNorm.
    The variance term is the mean over both views, and the covariance term is the sum, as in the authors'
    code. Solo-learn sums both terms.
    """

    config_class = VICRegConfig
    couples_samples = True
    collapsed_below = {"dimension_std": 0.03, **COLLAPSED_RANK}  # noqa: RUF012
    maximum_views = 2
    joint_batch_norm = False

    def __init__(self, config: VICRegConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), *[config.projection_size] * config.projection_layers]
        self.projector = MLPHead(sizes, bias=True)
        self.post_init()

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the projections (B, 2, P)."""
        return {"projections": self.project_views(inputs["pixel_values"])}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the weighted sum of the invariance, variance and covariance terms."""
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
        """Return `off_diagonal_correlation` and `dimension_std` of the first view's projections.

        `off_diagonal_correlation` is a root mean square. `dimension_std` is the mean standard deviation of
        the dimensions. The variance term's target for it is 1. It detects projections that shrink to one
        point, which measurements of directions do not detect.
        """
        first = upcast(embeddings["projections"][:, 0])
        return {
            "off_diagonal_correlation": off_diagonal_correlation(first),
            "dimension_std": first.std(dim=0).mean().item(),
        }


AutoModelForPreTraining.register(VICRegConfig, VICRegForPreTraining)
