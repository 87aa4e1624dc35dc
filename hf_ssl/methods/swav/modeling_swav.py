# SPDX-License-Identifier: Apache-2.0
"""SwAV: swapped assignments between views (arXiv:2006.09882)."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import sinkhorn, swapped_prediction
from hf_ssl.losses.precision import raised
from hf_ssl.methods.swav.configuration_swav import SwAVConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, Prototypes
from hf_ssl.modeling.measurements import prototype_usage
from hf_ssl.modeling.memory import Queue
from hf_ssl.modeling.outputs import Progress, SSLOutput
from hf_ssl.modeling.parameter_groups import ParameterRule


class SwAVForPreTraining(SSLPreTrainedModel):
    """Every view predicts to which prototypes another view of its image was assigned.

    Assignments are made of the global views of all processes' images by Sinkhorn-Knopp, so that prototypes
    share the images evenly; local views (multi-crop) only predict. Prototypes are unit vectors again before
    each step. With a queue, its embeddings are assigned along with the batch and then left out. All views
    of one size go through the network together, as in the authors' code.
    """

    config_class = SwAVConfig
    couples_samples = True
    takes_local_views = True
    # the direction that all embeddings share is no harm to who compares them with prototypes
    collapsed_below = {"prototype_entropy": 0.05, "embedding_rank": 2.0}  # noqa: RUF012
    memory_inputs = ("projections",)

    def __init__(self, config: SwAVConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), config.projection_hidden_size, config.projection_size]
        self.projector = MLPHead(sizes, bias=True, last_bias=True)
        self.prototypes = Prototypes(config.prototypes, config.projection_size)
        # as many as there are assigned views; a view's embeddings are assigned with those of the same view
        views = int((config.views or {}).get("count", 2)) if config.queue_size else 0
        self.queues = nn.ModuleList(Queue(config.queue_size, config.projection_size) for _ in range(views))
        self._queue_is_open = False
        self.post_init()

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Prototypes wait until features mean something."""
        return (ParameterRule(r"^prototypes\.", frozen_until=self.config.prototype_freeze_steps),)

    def before_step(self, progress: Progress) -> None:
        """Prototypes become unit vectors; the queue opens when its epoch has come."""
        super().before_step(progress)
        self.prototypes.normalize()
        self._queue_is_open = progress.epoch >= self.config.queue_start_epoch

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unit projections (B, V, P) of the global views and, if there are any, (B, L, P) of the local
        ones.
        """
        pixel_values = inputs["pixel_values"]
        local_pixel_values = inputs.get("local_pixel_values")
        shown = {"projections": pixel_values, "local_projections": local_pixel_values}
        return {
            name: normalize(raised(self.apply_to_views(self.projector, self.encode_views(images))), dim=-1)
            for name, images in shown.items()
            if images is not None
        }

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Mean cross entropy of each view's scores with the assignments of the other views."""
        projections = embeddings["projections"]
        local = [embeddings["local_projections"]] if "local_projections" in embeddings else []
        scores_VBK = self.prototypes(torch.cat([projections, *local], dim=1).transpose(0, 1))
        assignments_ABK = self._assign(scores_VBK[: projections.shape[1]].detach())
        loss = swapped_prediction(scores_VBK, assignments_ABK, temperature=self.config.temperature)
        terms = {"swapped_prediction": loss.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=projections)

    @torch.no_grad()
    def _assign(self, scores_ABK: Tensor) -> Tensor:
        """Soft assignments (A, B, K) of the global views, each with its queue where that is in use."""
        assigned, queues = [], cast("list[Queue]", list(self.queues))
        for view, scores in enumerate(scores_ABK):
            batch = len(scores)
            if self._queue_is_open and view < len(queues) and queues[view].is_full:
                scores = torch.cat([scores, self.prototypes(queues[view].rows)])
            soft = sinkhorn(scores, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)
            assigned.append(soft[:batch])
        return torch.stack(assigned)

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Put the global views' projections into their queues."""
        queues = cast("list[Queue]", list(self.queues))
        for queue, view in zip(queues, embeddings["projections"].unbind(1), strict=bool(queues)):
            queue.enqueue(view)

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """`prototype_entropy` of the nearest prototypes, 1 where they are used alike, and
        `prototypes_used`, the share that is nearest to any image."""
        nearest = self.prototypes(embeddings["projections"][:, 0]).argmax(dim=-1)
        return prototype_usage(nearest, self.config.prototypes)


AutoModelForPreTraining.register(SwAVConfig, SwAVForPreTraining)
