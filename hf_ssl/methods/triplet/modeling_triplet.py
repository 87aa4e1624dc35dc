# SPDX-License-Identifier: Apache-2.0
"""Triplet loss on two views of an image and a view of another image (arXiv:1503.03832)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import triplet
from hf_ssl.losses.upcasting import upcast, without_autocast
from hf_ssl.methods.triplet.configuration_triplet import TripletConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.memory import Counter
from hf_ssl.modeling.outputs import SSLOutput


class TripletForPreTraining(SSLPreTrainedModel):
    """Two views of an image become closer to each other than to a view of another image, by a margin.

    Both views are anchors. The negatives come from the batches of all processes. All views are encoded
    together. Distances are squared distances between unit vectors, as in the paper.
    """

    config_class = TripletConfig
    couples_samples = True
    maximum_views = 2
    memory_inputs = ("projections",)

    def __init__(self, config: TripletConfig) -> None:
        super().__init__(config)
        sizes = projector_sizes(feature_size(self.backbone), config)
        self.projector = MLPHead(sizes, last_norm="batch_without_offset")
        self.batches = Counter()
        self.post_init()

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the unit projections (B, 2, P)."""
        projections = self.project_views(inputs["pixel_values"])
        return {"projections": normalize(upcast(projections), dim=-1)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean triplet loss over both views as anchors."""
        first, second = embeddings["projections"].unbind(1)
        losses = [
            triplet(anchor, positive, positive[self._negatives(anchor, positive)], margin=self.config.margin)
            for anchor, positive in ((first, second), (second, first))
        ]
        loss = torch.stack(losses).mean()
        return SSLOutput(loss=loss, terms={"triplet": loss.detach()}, embeddings=embeddings["projections"])

    @torch.no_grad()
    @without_autocast  # bfloat16 rounds close distances
    def _negatives(self, anchor_BD: Tensor, positive_BD: Tensor) -> Tensor:
        """Return the row numbers (B,) of the anchors' negatives in the batch of positives."""
        batch = len(anchor_BD)
        if self.config.negatives == "random":
            # The seed depends only on the number of batches, so repeated calls and all processes agree.
            generator = torch.Generator().manual_seed(self.batches.total)
            step = torch.randint(1, batch, (batch,), generator=generator)
            return ((torch.arange(batch) + step) % batch).to(anchor_BD.device)
        distance_BB = 2 - 2 * anchor_BD @ positive_BD.T
        own = distance_BB.diagonal()[:, None]
        others = ~torch.eye(batch, dtype=torch.bool, device=distance_BB.device)
        farther = others & (distance_BB > own)
        nearest = distance_BB.masked_fill(~farther, torch.inf).argmin(1)
        farthest = distance_BB.masked_fill(~others, -torch.inf).argmax(1)
        return torch.where(farther.any(1), nearest, farthest)

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Count the batch, so that the next batch samples other negatives."""
        self.batches.increase()


AutoModelForPreTraining.register(TripletConfig, TripletForPreTraining)
