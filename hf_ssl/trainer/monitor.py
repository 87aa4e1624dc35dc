# SPDX-License-Identifier: Apache-2.0
"""Measures a model on fixed images during training, and detects collapsed or worse features."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BaseImageProcessor, TrainerCallback

from hf_ssl.data import LabeledImages, LoadedBatch
from hf_ssl.evaluation import alignment, embedding_std, extract_features, knn_accuracy, rank_me, uniformity
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.progress import progress

logger = logging.getLogger(__name__)

_KNN = "eval_knn"
_CHUNK = 64  # number of training images that are augmented and embedded at once
_BATCH = 256  # number of labeled images that are encoded at once


@dataclass
class KNNClassifier:
    """A k-NN classifier on frozen features of labeled images.

    Attributes:
        bank: labeled training images of the classifier. Their labels predict the class of a query.
        queries: images that are classified.
        processor: image processor of the exported encoder.
        neighbors: k. The neighbors are weighted with temperature 0.07.
    """

    bank: LabeledImages
    queries: LabeledImages
    processor: BaseImageProcessor
    neighbors: int = 20

    def accuracy(self, model: SSLPreTrainedModel, dtype: torch.dtype | None) -> float:
        """Return the accuracy on the queries, from 0 to 1."""
        encoder = model.exported_encoder
        bank, queries = (
            extract_features(
                encoder, self.processor, images.iter_batches(_BATCH), dtype=dtype, total=len(images),
                description=f"monitor: features of the {name}",
            )
            for name, images in (("bank", self.bank), ("queries", self.queries))
        )  # fmt: skip
        k = min(self.neighbors, len(bank))
        return knn_accuracy(
            bank, self.bank.labels, queries, self.queries.labels, neighbors=(k,), temperatures=(0.07,)
        )[k, 0.07]  # fmt: skip


class Monitor:
    """Measures a model in evaluation mode.

    A measurement does not change the weights, the buffers or the global random state.

    Args:
        images: training images with fixed augmentation parameters.
        knn: the k-NN classifier; None without labeled images.
        dtype: autocast precision of the measurement; None disables autocast.
    """

    def __init__(
        self, images: LoadedBatch, knn: KNNClassifier | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.images = images
        self.knn = knn
        self.dtype = dtype

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
            if self.knn is not None:
                metrics["knn"] = self.knn.accuracy(model, self.dtype)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _measure_images(self, model: SSLPreTrainedModel) -> dict[str, float]:
        features: list[Tensor] = []
        embedded: list[dict[str, Tensor]] = []
        with progress("monitor: training images", len(self.images)) as bar:
            for part in self.images.split(_CHUNK):
                inputs = part.inputs(model.device, model.sample_masks)
                with torch.autocast(model.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                    embedded.append(model.embed(inputs))
                    features.append(encode(model.exported_encoder, inputs["pixel_values"][:, 0]).float())
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


class CollapseAlarm:
    """Detects collapsed embeddings by a low standard deviation, rank or measurement of the method.

    The embeddings of a new network may be nearly collapsed and recover during training. The alarm is raised
    when two consecutive measurements after the start are low and the second is at most 1.2 times the first.
    A NaN raises the alarm immediately.

    Args:
        minimum: the value below which a measurement is low, by name (`SSLPreTrainedModel.collapsed_below`).
    """

    def __init__(self, minimum: Mapping[str, float]) -> None:
        self.minimum = minimum
        self.previous: dict[str, float] = {}

    def check(self, metrics: dict[str, float], step: int, prefix: str = "eval") -> str | None:
        """Return a message if the embeddings have collapsed, else None."""
        message = None
        for name, minimum in self.minimum.items():
            value, before = metrics[f"{prefix}_{name}"], self.previous.get(name)
            low = math.isnan(value) or value < minimum
            stays_low = before is not None and before < minimum and value <= 1.2 * before
            if low and (stays_low or math.isnan(value)):
                message = (
                    f"embeddings have collapsed at step {step}: {name} is {value:.3g}, "
                    f"expected at least {minimum:g}"
                )
            if step > 0:
                self.previous[name] = value
        return message


class FeatureGuard(TrainerCallback):
    """Compares the k-NN accuracy of a continued run with the accuracy before the first step.

    New heads make the features worse at first, so one low measurement is no evidence. The guard fires when
    two consecutive measurements are more than two standard errors below the initial one. The second must also
    not be better than the first.

    Args:
        queries: number of images on which the accuracy is measured.

    Attributes:
        message: the message about the last measurement; None if the features are not worse.
    """

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.message: str | None = None

    def on_evaluate(self, args, state, control, metrics: dict[str, Any] | None = None, **kwargs) -> None:
        measured = [(record["step"], record[_KNN]) for record in state.log_history if _KNN in record]
        self.message = self._judge(measured)
        if self.message is None:
            return
        logger.warning("%s", self.message)
        if args.on_worse == "stop":
            control.should_save = control.should_training_stop = True

    def _judge(self, measured: list[tuple[int, float]]) -> str | None:
        if len(measured) < 3:
            return None
        (_, start), (_, before), (step, now) = measured[0], *measured[-2:]
        error = math.sqrt((start * (1 - start) + now * (1 - now)) / self.queries)
        if max(before, now) >= start - 2 * error or now > before:
            return None
        return (
            f"the features are worse than before the first step: k-NN accuracy is {now:.3f} at step {step}, "
            f"and was {start:.3f}; lower training.learning_rate, or set training.head_warmup_epochs or "
            "training.layer_decay"
        )
