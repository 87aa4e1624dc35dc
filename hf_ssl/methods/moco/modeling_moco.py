# SPDX-License-Identifier: Apache-2.0
"""MoCo and MoCo v2: momentum contrast (arXiv:1911.05722, arXiv:2003.04297)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import info_nce
from hf_ssl.losses.upcasting import upcast
from hf_ssl.methods.moco.configuration_moco import MoCoConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.batch_norm import split_batch_norm, uses_global_batch_statistics
from hf_ssl.modeling.gather import shuffle_over_processes
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.memory import Queue
from hf_ssl.modeling.momentum import MomentumModel
from hf_ssl.modeling.outputs import SSLOutput


class MoCoForPreTraining(MomentumModel):
    """A query encoder learns by contrast with the keys of a momentum encoder. A queue holds the negatives.

    The order within a step is that of the authors' code. First comes the EMA update of the key encoder. Then
    queries and keys are computed. The loss compares queries with keys and with the queue of earlier batches.
    At the end the new keys overwrite the oldest ones.

    Each view is encoded separately. BatchNorm of the key encoder is in training mode and has its own running
    statistics.
    """

    config_class = MoCoConfig
    maximum_views = 2
    memory_inputs = ("keys",)
    ema_update = "before_step"
    joint_batch_norm = False

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__(config)
        sizes = projector_sizes(feature_size(self.backbone), config)
        self.projector = MLPHead(sizes, norm=False, last_bias=True)
        self.teacher_projector = MLPHead(sizes, norm=False, last_bias=True)
        self.queue = Queue(config.queue_size, config.projection_size)
        self.post_init()
        self.batch_multiple = config.batch_norm_splits
        if config.batch_norm_splits > 1:
            split_batch_norm(self, config.batch_norm_splits)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return queries and keys (B, A, P). A is 2 if the loss is symmetric, else 1.

        Queries and keys at the same position belong to different views of the same image.
        """
        pixel_values = inputs["pixel_values"]
        symmetric = self.config.symmetric
        query_images = pixel_values if symmetric else pixel_values[:, :1]
        key_images = pixel_values.flip(1) if symmetric else pixel_values[:, 1:]
        queries = self.project_views(query_images)
        return {"queries": queries, "keys": normalize(upcast(self._keys(key_images)), dim=-1)}

    def _keys(self, images_BACHW: Tensor) -> Tensor:
        mixed = self.training and self.config.shuffle_batch_norm
        if not mixed or uses_global_batch_statistics(self.teacher_backbone):
            return self.teacher_projections(images_BACHW)
        # The number of enqueued rows gives each batch another order, and all processes the same order.
        images_BACHW, restore = shuffle_over_processes(images_BACHW, seed=self.queue.total)
        return restore(self.teacher_projections(images_BACHW))

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean over A of InfoNCE of queries (B, A, P) with keys (B, A, P) and the queue."""
        queries, keys = embeddings["queries"], embeddings["keys"]
        losses = [
            info_nce(query, key, self.queue.rows, temperature=self.config.temperature)
            for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True)
        ]
        loss = torch.stack(losses).mean()
        compared = torch.stack([queries[:, 0], keys[:, 0].to(queries.dtype)], dim=1)
        return SSLOutput(loss=loss, terms={"info_nce": loss.detach()}, embeddings=compared)

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Enqueue this batch's keys (B, A, P), one view after the other."""
        self.queue.enqueue(embeddings["keys"].transpose(0, 1).flatten(0, 1))

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `queue_age` and `queue_filled`.

        `queue_age` is the number of steps until a key is overwritten. `queue_filled` is the share of rows
        that are keys.
        """
        latest = self.queue.latest
        return {
            "queue_age": self.queue.size / latest if latest else 0.0,
            "queue_filled": min(1.0, self.queue.total / self.queue.size),
        }


AutoModelForPreTraining.register(MoCoConfig, MoCoForPreTraining)
