# SPDX-License-Identifier: Apache-2.0
"""MoCo and MoCo v2: momentum contrast (arXiv:1911.05722, arXiv:2003.04297)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import info_nce
from hf_ssl.methods.moco.configuration_moco import MoCoConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.batch_norm import split_batch_norm, statistics_span_everything
from hf_ssl.modeling.gather import in_another_order
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.memory import Queue
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import SSLOutput


class MoCoForPreTraining(MomentumModel):
    """A query encoder, a key encoder that follows it slowly, and a queue of keys as negatives.

    Within a step, as in the authors' code: the key encoder moves, queries and keys are made, scores are taken
    against the queue as earlier batches left it, and only then the new keys take the place of the oldest.
    Each view goes through the network by itself. The key encoder runs in training mode and keeps running
    statistics of its own.
    """

    config_class = MoCoConfig
    maximum_views = 2
    memory_inputs = ("keys",)
    ema_update = "before_step"
    joint_batch_norm = False

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__(config)
        sizes = projector_sizes(
            feature_size(self.backbone),
            config.projection_hidden_size,
            config.projection_size,
            config.projection_layers,
        )
        self.projector = MLPHead(sizes, norm=False, last_bias=True)
        self.teacher_projector = MLPHead(sizes, norm=False, last_bias=True)
        self.queue = Queue(config.queue_size, config.projection_size)
        self.post_init()
        if config.batch_norm_splits > 1:
            split_batch_norm(self, config.batch_norm_splits)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Queries and keys (B, A, P), A = 2 if symmetric, else 1; the query's partner stands in its place."""
        pixel_values = inputs["pixel_values"]
        symmetric = self.config.symmetric
        asked = pixel_values if symmetric else pixel_values[:, :1]
        shown = pixel_values.flip(1) if symmetric else pixel_values[:, 1:]
        queries = self.apply_to_views(self.projector, self.encode_views(asked))
        return {"queries": queries, "keys": normalize(self._keys(shown), dim=-1)}

    def _keys(self, images_BACHW: Tensor) -> Tensor:
        mixed = self.training and self.config.shuffle_batch_norm
        if not mixed or statistics_span_everything(self.teacher_backbone):
            return self.teacher_projections(images_BACHW)
        # the number of rows so far: another order for each batch, the same on all processes
        images_BACHW, restore = in_another_order(images_BACHW, seed=self.queue.total)
        return restore(self.teacher_projections(images_BACHW))

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """InfoNCE of queries (B, A, P) against keys (B, A, P) and the queue; the mean over A."""
        queries, keys = embeddings["queries"], embeddings["keys"]
        losses = [
            info_nce(query, key, self.queue.rows, temperature=self.config.temperature)
            for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True)
        ]
        loss = torch.stack(losses).mean()
        compared = torch.stack([queries[:, 0], keys[:, 0].to(queries.dtype)], dim=1)
        return SSLOutput(loss=loss, terms={"info_nce": loss.detach()}, embeddings=compared)

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Put this batch's keys (B, A, P) into the queue, one view after the other."""
        self.queue.enqueue(embeddings["keys"].transpose(0, 1).flatten(0, 1))

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """`queue_age`: steps until a key is overwritten; `queue_filled`: share of rows that are keys."""
        latest = self.queue.latest
        return {
            "queue_age": self.queue.size / latest if latest else 0.0,
            "queue_filled": min(1.0, self.queue.total / self.queue.size),
        }


AutoModelForPreTraining.register(MoCoConfig, MoCoForPreTraining)
