# SPDX-License-Identifier: Apache-2.0
"""DeepCluster v2: prediction of k-means clusters (arXiv:2006.09882, appendix)."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import cluster_cross_entropy
from hf_ssl.methods.deepcluster_v2.configuration_deepcluster_v2 import DeepClusterV2Config
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, Prototypes
from hf_ssl.modeling.memory import ClusteredRows, spherical_kmeans
from hf_ssl.modeling.outputs import COLLAPSED_PROTOTYPES, RunProgress, SSLOutput, prototype_usage


class DeepClusterV2ForPreTraining(SSLPreTrainedModel):
    """All views of an image predict its cluster. The scores are cosines with the centroids.

    The memory bank holds the last embedding of each image's global views. At the beginning of an epoch,
    spherical k-means clusters these embeddings, once for each head. Head i uses those of global view i modulo
    the number of global views. The centroids are the head's prototypes until the next epoch. They receive no
    gradient.

    Before the first step all images are embedded once. An image that was in no batch has no cluster, and the
    loss ignores it. Therefore the mean over images is computed over all processes together.
    """

    config_class = DeepClusterV2Config
    couples_samples = True  # for the mean over the images that have a cluster
    minimum_views = 1
    takes_local_views = True
    collapsed_below = COLLAPSED_PROTOTYPES
    needs_sample_index = True
    needs_memory_warmup = True
    memory_inputs = ("projections", "sample_index")

    def __init__(self, config: DeepClusterV2Config) -> None:
        super().__init__(config)
        sizes = [feature_size(self.backbone), config.projection_hidden_size, config.projection_size]
        self.projector = MLPHead(sizes, bias=True, last_bias=True)
        self.heads = nn.ModuleList(Prototypes(count, config.projection_size) for count in config.prototypes)
        views, labels = config.global_views, len(config.prototypes)
        self.bank = ClusteredRows(config.num_samples, views, config.projection_size, labels)
        self.post_init()

    @classmethod
    def compares_images(cls, config: DeepClusterV2Config) -> bool:
        """Return False: the loss compares each image only with the prototypes."""
        return False

    def freeze(self) -> None:
        """Also freeze the prototypes, because k-means sets them."""
        super().freeze()
        self.heads.requires_grad_(False)

    @torch.no_grad()
    def before_epoch(self, progress: RunProgress) -> None:
        """Cluster the embeddings in the memory bank.

        Raises:
            UserError: the memory bank holds fewer images than a head has clusters.
        """
        super().before_epoch(progress)
        seen, clusters = self.bank.seen, max(self.config.prototypes)
        if seen.sum() < clusters:
            raise UserError(
                f"method.prototypes: expected at least {clusters} images for {clusters} clusters, "
                f"got {int(seen.sum())}; use fewer prototypes or more images"
            )
        for number, head in enumerate(cast("list[Prototypes]", list(self.heads))):
            rows = self.bank.rows[number % len(self.bank.rows)][seen]
            generator = torch.Generator().manual_seed(progress.step * len(self.heads) + number)
            centroids, found = spherical_kmeans(
                rows, head.out_features, self.config.kmeans_iterations, generator
            )
            head.weight.copy_(centroids)
            self.bank.labels[number, seen] = found

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return unit projections (B, V, P) of global views and (B, L, P) of local views, and the row numbers
        (B,). The result has local projections only if there are local views.

        Raises:
            ValueError: the inputs have no `sample_index`.
        """
        if "sample_index" not in inputs:
            raise ValueError("sample_index: expected the row numbers of the images, got none; pass them")
        return {"sample_index": inputs["sample_index"], **self.unit_projections(inputs, "projections")}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean cross entropy, over heads, between all views' scores and the image's cluster."""
        views_VBP = self.join_views(embeddings, "projections")
        labels_HB = self.bank.labels[:, embeddings["sample_index"]]
        losses = [
            cluster_cross_entropy(head(views_VBP), label_B, temperature=self.config.temperature)
            for head, label_B in zip(self.heads, labels_HB, strict=True)
        ]
        loss = torch.stack(losses).mean()
        terms = {"cluster_cross_entropy": loss.detach()}
        return SSLOutput(loss=loss, terms=terms, embeddings=embeddings["projections"])

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Store the projections of global views in the memory bank."""
        self.bank.store(embeddings["sample_index"], embeddings["projections"])

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return `prototype_usage` for the nearest prototypes of the first head and the first view."""
        first = cast(Prototypes, self.heads[0])
        nearest = first(embeddings["projections"][:, 0]).argmax(dim=-1)
        return prototype_usage(nearest, first.out_features)


AutoModelForPreTraining.register(DeepClusterV2Config, DeepClusterV2ForPreTraining)
