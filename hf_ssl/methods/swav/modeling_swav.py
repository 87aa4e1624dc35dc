# SPDX-License-Identifier: Apache-2.0
"""SwAV: swapped assignments between views (arXiv:2006.09882)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import sinkhorn, swapped_prediction
from hf_ssl.methods.swav.configuration_swav import SwAVConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, Prototypes
from hf_ssl.modeling.memory import Queue
from hf_ssl.modeling.outputs import COLLAPSED_PROTOTYPES, RunProgress, SSLOutput, prototype_usage
from hf_ssl.modeling.parameter_groups import ParameterRule


class SwAVForPreTraining(SSLPreTrainedModel):
    """Each view predicts the prototype assignments of another view of its image.

    Sinkhorn-Knopp assigns the global views of all processes to prototypes. Each prototype gets the same total
    weight. Local views (multi-crop) only predict assignments of global views. Prototypes are normalized
    to length 1 before each step. The queue's embeddings are assigned together with the batch, but the loss
    ignores their assignments. All views of one size are encoded together, as in the authors' code.
    """

    config_class = SwAVConfig
    couples_samples = True
    takes_local_views = True
    collapsed_below = COLLAPSED_PROTOTYPES
    memory_inputs = ("projections",)

    def __init__(self, config: SwAVConfig) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), config.projection_hidden_size, config.projection_size]
        self.projector = MLPHead(sizes, bias=True, last_bias=True)
        self.prototypes = Prototypes(config.prototypes, config.projection_size)
        # Each global view has a queue. Its embeddings are assigned together with those of the same view.
        views = config.global_views if config.queue_size else 0
        self.queues = nn.ModuleList(Queue(config.queue_size, config.projection_size) for _ in range(views))
        self._use_queue = False
        self.post_init()

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Return the rule that freezes the prototypes in the first steps."""
        return (ParameterRule(r"^prototypes\.", frozen_until=self.config.prototype_freeze_steps),)

    @classmethod
    def settings_in_epochs(cls, config: Any) -> dict[str, float]:
        """Omit the first epoch of the queue if there is no queue."""
        found = super().settings_in_epochs(config)
        return {name: found[name] for name in found if config.queue_size or name != "queue_start_epoch"}

    def before_step(self, progress: RunProgress) -> None:
        """Also normalize the prototypes, and use the queue from `queue_start_epoch` on."""
        super().before_step(progress)
        self.prototypes.normalize()
        self._use_queue = progress.epoch >= self.config.queue_start_epoch

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return unit projections (B, V, P) of global views, and (B, L, P) of local views, if any."""
        return self.unit_projections(inputs, "projections")

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean cross entropy between each view's scores and the other views' assignments."""
        projections = embeddings["projections"]
        scores_VBK = self.prototypes(self.join_views(embeddings, "projections"))
        assignments_ABK = self._assign(scores_VBK[: projections.shape[1]].detach())
        loss = swapped_prediction(scores_VBK, assignments_ABK, temperature=self.config.temperature)
        return SSLOutput(loss=loss, terms={"swapped_prediction": loss.detach()}, embeddings=projections)

    @torch.no_grad()
    def _assign(self, scores_ABK: Tensor) -> Tensor:
        """Return the assignments (A, B, K) of global views, with their queues if these are in use."""
        assigned, queues = [], cast("list[Queue]", list(self.queues))
        for view, scores in enumerate(scores_ABK):
            batch = len(scores)
            if self._use_queue and view < len(queues) and queues[view].is_full:
                scores = torch.cat([scores, self.prototypes(queues[view].rows)])
            soft = sinkhorn(scores, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)
            assigned.append(soft[:batch])
        codes = torch.stack(assigned)
        if self.config.hard_codes:
            return torch.zeros_like(codes).scatter_(-1, codes.argmax(-1, keepdim=True), 1)
        return codes

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Enqueue the projections of global views."""
        queues = cast("list[Queue]", list(self.queues))
        for queue, view in zip(queues, embeddings["projections"].unbind(1), strict=bool(queues)):
            queue.enqueue(view)

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `prototype_usage` for the nearest prototypes of the first view."""
        nearest = self.prototypes(embeddings["projections"][:, 0]).argmax(dim=-1)
        return prototype_usage(nearest, self.config.prototypes)


AutoModelForPreTraining.register(SwAVConfig, SwAVForPreTraining)
