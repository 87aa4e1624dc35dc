# SPDX-License-Identifier: Apache-2.0
"""Measures a model on fixed training images during training (layer 4)."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from hf_ssl.data import DataConfig, LoadedBatch, Source, train_loader
from hf_ssl.data.batch import UnreadableData
from hf_ssl.evaluation import alignment, embedding_std, rank_me, uniformity
from hf_ssl.modeling.backbones import encode_without_columns
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.precision import autocast
from hf_ssl.progress import progress
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.knn import ComputeMetrics, KNNClassifier, classify
from hf_ssl.trainer.machine_settings import MONITOR_IMAGES
from hf_ssl.trainer.online_probe import OnlineProbe
from hf_ssl.views import ViewPreset

_SEED_OFFSET = 2**32
"""Offset of the seed for the monitor. It makes the views differ from those of training."""
_CHUNK = 64  # number of training images that are augmented and embedded at once


def load_monitor_images(
    source: Source,
    preset: ViewPreset,
    config: DataConfig,
    args: SSLTrainingArguments,
    count: int = MONITOR_IMAGES,
) -> LoadedBatch:
    """Return `count` training images with fixed views, or fewer images if there are not so many.

    Raises:
        UserError: a stream has fewer images than a batch of this process, or an image cannot be read.
    """
    size, seed = min(count, source.num_rows or count), args.seed + _SEED_OFFSET
    while True:
        try:
            return next(iter(train_loader(source, preset, config=config, seed=seed, batch_size=size)))
        except UnreadableData:  # a stream may have fewer images than its card or `data.num_images` states
            if not source.streaming or size <= args.per_device_train_batch_size:
                raise
            size = max(args.per_device_train_batch_size, size // 2)


class Monitor:
    """Measures a model in evaluation mode.

    A measurement does not change the weights, the buffers or the global random state.

    Args:
        images: training images with fixed augmentation parameters.
        knn: the k-NN classifier; a dict of several ones by name; or None without labeled images.
        dtype: autocast precision of the measurement; None disables autocast.
        compute_metrics: see `KNNClassifier.measure`.

    Attributes:
        online_probe: see `KNNClassifier.measure`. The trainer sets it.
    """

    def __init__(
        self,
        images: LoadedBatch,
        knn: KNNClassifier | Mapping[str, KNNClassifier] | None = None,
        dtype: torch.dtype | None = None,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        self.images = images
        self.classifiers = {"": knn} if isinstance(knn, KNNClassifier) else dict(knn or {})
        self.dtype = dtype
        self.compute_metrics = compute_metrics
        self.online_probe: OnlineProbe | None = None

    @property
    def knn(self) -> KNNClassifier | None:
        """The k-NN classifier, if there is a single one."""
        return self.classifiers.get("")

    def measure(self, model: SSLPreTrainedModel, prefix: str = "eval") -> dict[str, float]:
        """Return the measurements by name.

        `loss` is the loss of `images`. `rank_me` and `feature_std` measure the features of the exported
        encoder. `embedding_std` (1 isotropic, 0 collapsed), `embedding_rank`, `alignment` (with two or more
        views) and `uniformity` measure the embeddings that the loss compares. `embedding_rank` is RankMe of
        the centered embeddings, because a large mean hides a lost dimension. `knn` is the accuracy with
        labeled images. A method adds further values (`measurements`).
        """
        with evaluation_mode(model):
            metrics = self._measure_images(model)
        named = {f"{prefix}_{name}": value for name, value in metrics.items()}
        further = self.compute_metrics, prefix, self.online_probe
        return named | classify(self.classifiers, model, self.dtype, *further)

    def _measure_images(self, model: SSLPreTrainedModel) -> dict[str, float]:
        features: list[Tensor] = []
        embedded: list[dict[str, Tensor]] = []
        with progress("monitor: training images", len(self.images)) as bar:
            for part in self.images.split(_CHUNK):
                inputs = part.inputs(model.device, model.sample_masks)
                with autocast(model.device, self.dtype):
                    embedded.append(model.embed(inputs))
                    images = inputs["pixel_values"][:, 0]
                    features.append(encode_without_columns(model.exported_encoder, images).float())
                bar.update(len(part))
        together = {name: torch.cat([part[name] for part in embedded]) for name in embedded[0]}
        output = model.objective(together)
        embeddings, loss = cast(Tensor, output.embeddings), cast(Tensor, output.loss)
        first, second = embeddings[:, 0].float(), embeddings[:, -1].float()
        encoded = torch.cat(features)
        return {
            "loss": loss.item(),
            "rank_me": rank_me(encoded),
            "feature_std": embedding_std(encoded),
            "embedding_std": embedding_std(first),
            "embedding_rank": rank_me(first - first.mean(0)),
            **({"alignment": alignment(first, second)} if embeddings.shape[1] > 1 else {}),
            "uniformity": uniformity(first),
            **model.measurements(together),
        }
