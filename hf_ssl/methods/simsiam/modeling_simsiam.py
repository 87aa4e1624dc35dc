# SPDX-License-Identifier: Apache-2.0
"""SimSiam: simple siamese representation learning (arXiv:2011.10566)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import cosine_regression
from hf_ssl.methods.simsiam.configuration_simsiam import SimSiamConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, predictor_of
from hf_ssl.modeling.outputs import SSLOutput, loss_of_both_views
from hf_ssl.modeling.parameter_groups import ParameterRule


class SimSiamForPreTraining(SSLPreTrainedModel):
    """A predictor predicts each view's projection from the other view. The target receives no gradient.

    There are neither negatives nor a teacher. The stop-gradient prevents collapse. Each view is encoded
    separately. The loss is the mean of -cos over both views, and its minimum is -1.
    """

    config_class = SimSiamConfig
    maximum_views = 2
    joint_batch_norm = False

    def __init__(self, config: SimSiamConfig) -> None:
        super().__init__(config)
        size = config.projection_size
        sizes = [feature_size(self.backbone), *[size] * config.projection_layers]
        self.projector = MLPHead(sizes, last_norm="batch_without_affine")
        hidden, layers = config.predictor_hidden_size, config.predictor_layers
        self.predictor = predictor_of(size, hidden, layers, last_bias=True)
        self.post_init()

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Return the rule that keeps the predictor's learning rate constant if the config requests it."""
        if self.config.predictor_layers == 0:
            return ()
        fixed = self.config.fixed_predictor_learning_rate
        return (ParameterRule(r"^predictor\.", fixed_learning_rate=fixed),)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return projections (B, 2, P) and predictions (B, 2, P) of both views."""
        projections = self.project_views(inputs["pixel_values"])
        return {"projections": projections, "predictions": self.apply_to_views(self.predictor, projections)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean over both views of -cos(prediction, the other view's projection)."""
        predictions, targets = embeddings["predictions"], embeddings["projections"]
        targets = targets.detach() if self.config.stop_gradient else targets
        loss, terms = loss_of_both_views(_negative_cosine, predictions, targets)
        return SSLOutput(loss=loss / 2, terms=terms, embeddings=embeddings["projections"])


def _negative_cosine(prediction_BP: Tensor, target_BP: Tensor) -> Tensor:
    return cosine_regression(prediction_BP, target_BP) / 2 - 1  # half of 2 - 2 cos is 1 - cos


AutoModelForPreTraining.register(SimSiamConfig, SimSiamForPreTraining)
