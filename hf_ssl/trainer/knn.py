# SPDX-License-Identifier: Apache-2.0
"""The k-NN classifiers of the monitor: their labeled images and their accuracy during training (layer 4)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, EvalPrediction

from hf_ssl.data import DataConfig, LabeledImages, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import extract_features, knn_accuracy
from hf_ssl.evaluation.config import MAIN_KNN, MEASUREMENTS, usable_neighbors
from hf_ssl.evaluation.knn import leave_one_out_knn
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.projected_encoder import ProjectedEncoder, projector_of
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.online_probe import OnlineProbe

ComputeMetrics: TypeAlias = Callable[[EvalPrediction], dict[str, float]]

_OPTION = "training.monitor_projector=true", "training.monitor_projector=false"


@dataclass
class KNNClassifier:
    """A k-NN classifier on frozen features of labeled images.

    Attributes:
        bank: labeled training images of the classifier. Their labels predict the class of a query.
        queries: images that are classified. Their classes are renumbered as in the bank. None classifies each
            image of the bank by all other images.
        processor: image processor of the exported encoder.
        neighbors: k; with fewer images, k is that of the evaluation (`usable_neighbors`). The neighbors are
            weighted with temperature 0.07.
        batch_size: number of images that are encoded at once.
        projector: whether the projector's output is also measured, as `knn_projector`.
    """

    bank: LabeledImages
    queries: LabeledImages | None
    processor: BaseImageProcessor
    neighbors: int = MAIN_KNN[0]
    batch_size: int = 256
    projector: bool = False

    def __post_init__(self) -> None:
        self.bank.require_one_label("k-NN during training")
        self.tested.classified_by(self.bank)

    @property
    def tested(self) -> LabeledImages:
        """The images that are classified."""
        return self.bank if self.queries is None else self.queries

    def measure(
        self,
        model: SSLPreTrainedModel,
        dtype: torch.dtype | None,
        compute_metrics: ComputeMetrics | None = None,
        online_probe: OnlineProbe | None = None,
    ) -> dict[str, float]:
        """Return the accuracies from 0 to 1 as `knn` and `online_probe`, and results of `compute_metrics`.

        Args:
            model: the model whose exported encoder is measured.
            dtype: autocast precision; None disables autocast.
            compute_metrics: receives the features (N, D) and labels (N,) of the classified images.
            online_probe: also classifies the images; None without it.

        Raises:
            UserError: the bank has fewer than two classes, or `compute_metrics` fails (see `_own_metrics`).
        """
        bank = tested = self._features(model, self.bank, "bank", dtype)
        if self.queries is not None:
            tested = self._features(model, self.queries, "queries", dtype)
        measured = {"knn": self._accuracy(bank, tested)}
        if self.projector:
            both = (_projected(model, features, self.batch_size) for features in (bank, tested))
            measured["knn_projector"] = self._accuracy(*both)
        if online_probe is not None:
            measured["online_probe"] = online_probe.accuracy(tested, self.tested)
        if compute_metrics is None:
            return measured
        prediction = EvalPrediction(predictions=tested.numpy(), label_ids=self.tested.labels.numpy())
        return measured | _own_metrics(compute_metrics, prediction)

    def _accuracy(self, bank: Tensor, tested: Tensor) -> float:
        if self.queries is None:
            [k] = usable_neighbors([self.neighbors], len(bank) - 1)
            return leave_one_out_knn(bank, self.bank.labels, neighbors=k, temperature=MAIN_KNN[1])
        [k] = usable_neighbors([self.neighbors], len(bank))
        data = bank, self.bank.labels, tested, self.queries.labels
        return knn_accuracy(*data, neighbors=(k,), temperatures=MAIN_KNN[1:])[k, MAIN_KNN[1]]

    def _features(
        self, model: SSLPreTrainedModel, images: LabeledImages, name: str, dtype: torch.dtype | None
    ) -> Tensor:
        return extract_features(
            model.exported_encoder,
            self.processor,
            images.iter_batches(self.batch_size),
            dtype=dtype,
            total=len(images),
            description=f"monitor: features of the {name}",
        )


@torch.inference_mode()
def _projected(model: SSLPreTrainedModel, features: Tensor, batch_size: int) -> Tensor:
    """Return the projector's output (N, P), on the CPU, for features (N, D) of the exported encoder."""
    encoder = ProjectedEncoder(model, *_OPTION)
    parts = [encoder.project(part.to(model.device)).float().cpu() for part in features.split(batch_size)]
    return torch.cat(parts)


def _own_metrics(compute_metrics: ComputeMetrics, prediction: EvalPrediction) -> dict[str, Any]:
    """Return the results of `compute_metrics` as plain data, which checkpoints store as JSON.

    A nested dict becomes several results, whose names are joined by `_`.

    Raises:
        UserError: the function fails, or returns no dict, the name of a measurement of the monitor, or a
            value that JSON cannot store.
    """
    try:
        metrics = json.loads(json.dumps(_plain(compute_metrics(prediction))))
    except Exception as error:
        raise _metrics_error(f"{type(error).__name__}: {error}") from error
    if not isinstance(metrics, dict):
        raise _metrics_error(repr(metrics))
    for name in metrics:
        short = name.removeprefix("eval_")
        if short in MEASUREMENTS:
            raise UserError(
                f"compute_metrics: expected no name of another measurement, got {name}; use my_{short}"
            )
    return metrics


def _plain(value: Any, name: str = "") -> Any:
    """Return tensors and arrays in nested dicts as numbers or lists, in a flat dict."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, part in value.items():
            inner = _plain(part, f"{name}{key}_")
            flat |= inner if isinstance(part, Mapping) else {f"{name}{key}": inner}
        return flat
    if isinstance(value, Tensor | np.ndarray | np.generic):
        listed = value.tolist()
        return listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    return value


def _metrics_error(got: str) -> UserError:
    return UserError(
        f"compute_metrics: expected a dict of numbers, got {got}; return e.g. {{'accuracy': 0.9}}"
    )


def knn_classifiers(
    data: Any, config: DataConfig, processor: BaseImageProcessor, args: SSLTrainingArguments
) -> dict[str, KNNClassifier]:
    """Return the k-NN classifiers of an `eval_dataset`, by name. The name of a single one is "".

    Args:
        data: labeled images, or a dict of them. The keys `bank` and `query`, `train` and `test`, or `train`
            and `validation` form one classifier. In any other dict, each entry forms one classifier. An entry
            consists of labeled images or of such a pair. Without queries, each image is classified by all
            others.
            `hf_ssl.data.as_source` lists the types of images.
        config: `channels`, `cache`, `image_column`, `label_column` and `max_broken_fraction` are used.
        processor: image processor of the exported encoder.
        args: `monitor_bank_images`, `monitor_query_images`, `monitor_neighbors` and `monitor_projector` are
            used.

    Raises:
        UserError: the data are of another type, have no labels or are an empty dict, or `bank` or `query` is
            missing.
    """
    bank_images, query_images = args.monitor_bank_images, args.monitor_query_images

    def classifier(part: Any, where: str) -> KNNClassifier:
        bank, query = _pair(part, where) or (None, None)
        if bank is None:
            first, second = label_data(part, config, where, bank_images), None
        else:
            first = label_data(part[bank], config, f"{where}[{bank!r}]", bank_images)
            second = label_data(part[query], config, f"{where}[{query!r}]", query_images)
        return KNNClassifier(
            first, second, processor, args.monitor_neighbors, args.per_device_eval_batch_size,
            args.monitor_projector,
        )  # fmt: skip

    if not isinstance(data, Mapping) or _pair(data, "eval_dataset"):
        return {"": classifier(data, "eval_dataset")}
    if not data:
        raise UserError("eval_dataset: expected labeled images, got an empty dict; use None without images")
    return {str(name): classifier(part, f"eval_dataset[{name!r}]") for name, part in data.items()}


def knn_names(eval_dataset: Any, model: SSLPreTrainedModel, args: SSLTrainingArguments) -> list[str]:
    """Return the names of the k-NN measurements of an `eval_dataset`, without `eval_`.

    Raises:
        UserError: `monitor_projector` is true, and the method has no projector.
    """
    if args.monitor_projector:
        projector_of(model, *_OPTION)
    if not isinstance(eval_dataset, Mapping) or _pair(eval_dataset, "eval_dataset"):
        return []
    ends = ["knn", "knn_projector"] if args.monitor_projector else ["knn"]
    return [f"{name}_{end}" for name in eval_dataset for end in ends]


def _pair(data: Any, where: str) -> tuple[str, str] | None:
    """Return the keys of bank and queries if the dict has exactly two such keys, else None.

    Raises:
        UserError: the dict contains only one of `bank` and `query`, or other keys in addition.
    """
    keys = set(data) if isinstance(data, Mapping) else set()
    for pair in (("bank", "query"), ("train", "test"), ("train", "validation")):
        if keys == set(pair):
            return pair
    if keys & {"bank", "query"}:
        given = ", ".join(map(str, data))
        raise UserError(
            f"{where}: expected the two keys bank and query, got {given}; use other names, or both"
        )
    return None


def classify(
    classifiers: Mapping[str, KNNClassifier],
    model: SSLPreTrainedModel,
    dtype: torch.dtype | None,
    compute_metrics: ComputeMetrics | None = None,
    prefix: str = "eval",
    online_probe: OnlineProbe | None = None,
) -> dict[str, float]:
    """Return the measurements of k-NN classifiers: `eval_knn`, or `eval_NAME_knn` for several.

    Args:
        classifiers: the classifiers by name. The name of a single one is "".
        model, dtype, compute_metrics: see `KNNClassifier.measure`.
        prefix: prefix of the names.
        online_probe: see `KNNClassifier.measure`.
    """
    with evaluation_mode(model):
        metrics = {}
        for name, classifier in classifiers.items():
            start = "_".join(str(part) for part in (prefix, name) if part not in (None, ""))
            for key, value in classifier.measure(model, dtype, compute_metrics, online_probe).items():
                # A name that begins with the prefix keeps it, as in transformers.
                short = key.removeprefix(f"{start}_").removeprefix(f"{prefix}_")
                metrics["_".join(filter(None, (start, short)))] = value
        return metrics
