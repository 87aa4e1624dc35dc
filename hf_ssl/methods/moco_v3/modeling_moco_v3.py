# SPDX-License-Identifier: Apache-2.0
"""MoCo v3: momentum contrast without a queue, also for vision transformers (arXiv:2104.02057)."""

from functools import partial

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import info_nce
from hf_ssl.methods.moco_v3.configuration_moco_v3 import MoCoV3Config
from hf_ssl.modeling.backbones import feature_size, freeze_patch_embedding
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import SSLOutput, loss_of_both_views
from hf_ssl.modeling.vit import PATCH_SELECTION_TYPES, FixedPositions


class MoCoV3ForPreTraining(FixedPositions, MomentumModel):
    """A student with a predictor computes queries, and a teacher without a predictor computes keys.

    Both views are queries and both are keys. The negatives are the other keys of the batch, from all
    processes. Each view is encoded separately. The EMA update of the teacher comes at the beginning of a
    step, with the momentum of that step, as in the authors' code. By default, a vision transformer has the
    learned position table of transformers. The authors use a fixed sine-cosine table (`fixed_positions`).
    """

    config_class = MoCoV3Config
    couples_samples = True
    maximum_views = 2
    ema_update = "before_step"
    joint_batch_norm = False
    row_first = True

    def __init__(self, config: MoCoV3Config) -> None:
        super().__init__(config)
        kind, self.has_fixed_positions = self.backbone.config.model_type, bool(config.fixed_positions)
        if config.fixed_positions and kind not in PATCH_SELECTION_TYPES:
            raise UserError(
                f"method.fixed_positions: expected no value for {kind}, got true; it is for "
                f"{', '.join(PATCH_SELECTION_TYPES)}"
            )
        hidden, size = config.projection_hidden_size, config.projection_size
        sizes = projector_sizes(feature_size(self.backbone), config)
        self.projector = MLPHead(sizes, last_norm="batch_without_affine")
        self.teacher_projector = MLPHead(sizes, last_norm="batch_without_affine")
        last_norm = "batch_without_affine" if config.predictor_last_norm else "none"
        self.predictor = MLPHead([size, hidden, size], last_norm=last_norm)
        self.post_init()

    def freeze(self) -> None:
        """Also freeze a vision transformer's patch embedding, if the config selects it."""
        super().freeze()
        if self.config.freeze_patch_embedding:
            freeze_patch_embedding(self.backbone)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return queries (B, 2, P) of the student and keys (B, 2, P) of the teacher."""
        pixel_values = inputs["pixel_values"]
        projections = self.project_views(pixel_values)
        queries = self.apply_to_views(self.predictor, projections)
        return {"queries": queries, "keys": self.teacher_projections(pixel_values)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the sum over both views of InfoNCE with the other view's keys, times twice the
        temperature.
        """
        queries, keys = embeddings["queries"], embeddings["keys"]
        temperature = self.config.temperature
        loss, terms = loss_of_both_views(partial(info_nce, temperature=temperature), queries, keys)
        return SSLOutput(loss=2 * temperature * loss, terms=terms, embeddings=queries)


AutoModelForPreTraining.register(MoCoV3Config, MoCoV3ForPreTraining)
