# SPDX-License-Identifier: Apache-2.0
"""BYOL: bootstrap your own latent (arXiv:2006.07733)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.evaluation.statistics import rank_me
from hf_ssl.losses import cosine_regression
from hf_ssl.methods.byol.configuration_byol import BYOLConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.heads import MLPHead, predictor_of
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import SSLOutput, eigenspace_alignment, loss_of_both_views


class BYOLForPreTraining(MomentumModel):
    """An online network predicts the projection that a target network computes from the other view.

    There are no negatives. Each view is encoded separately. The EMA update of the target network comes after
    the optimizer's step, with the momentum of that step, as in deepmind-research/byol. The loss is the sum of
    2 - 2 cos over both views. Lightly uses half the sum of -cos, which has a quarter of this gradient.
    """

    config_class = BYOLConfig
    maximum_views = 2
    joint_batch_norm = False

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config)
        hidden, size = config.projection_hidden_size, config.projection_size
        sizes = [feature_size(self.backbone), hidden, size]
        self.projector = MLPHead(sizes, bias=True)
        self.teacher_projector = MLPHead(sizes, bias=True)
        self.predictor = predictor_of(size, hidden, config.predictor_layers, bias=True)
        self.post_init()

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return projections and predictions (B, 2, P) of the online network, and targets (B, 2, P) of the
        target network.
        """
        pixel_values = inputs["pixel_values"]
        projections = self.project_views(pixel_values)
        return {
            "projections": projections,
            "predictions": self.apply_to_views(self.predictor, projections),
            "targets": self.teacher_projections(pixel_values),
        }

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the sum over both views of the mean of 2 - 2 cos(prediction, the other view's target)."""
        predictions, targets = embeddings["predictions"], embeddings["targets"]
        loss, terms = loss_of_both_views(cosine_regression, predictions, targets)
        return SSLOutput(loss=loss, terms=terms, embeddings=embeddings["projections"])

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `predictor_rank` and `eigenspace_alignment` of a linear predictor.

        The result is {} for a predictor with hidden layers, and without a predictor.
        """
        if self.config.predictor_layers != 1:
            return {}
        weight = self.predictor.get_parameter("0.weight")
        alignment = eigenspace_alignment(weight, embeddings["projections"])
        return {"predictor_rank": rank_me(weight), "eigenspace_alignment": alignment}


AutoModelForPreTraining.register(BYOLConfig, BYOLForPreTraining)
