# SPDX-License-Identifier: Apache-2.0
"""Measures a model on fixed images during training, and detects collapsed or worse features."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, EvalPrediction, TrainerCallback

from hf_ssl.data import DataConfig, LabeledImages, LoadedBatch, Source, label_data, train_loader
from hf_ssl.data.batch import UnreadableData
from hf_ssl.errors import UserError
from hf_ssl.evaluation import alignment, embedding_std, extract_features, knn_accuracy, rank_me, uniformity
from hf_ssl.evaluation.config import MAIN_KNN, MEASUREMENTS, usable_neighbors
from hf_ssl.evaluation.knn import leave_one_out_knn
from hf_ssl.evaluation.results import standard_error
from hf_ssl.modeling.backbones import encode_without_columns
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import any_process
from hf_ssl.modeling.projected_encoder import ProjectedEncoder, projector_of
from hf_ssl.precision import autocast
from hf_ssl.progress import progress
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.machine_settings import MONITOR_IMAGES
from hf_ssl.trainer.online_probe import OnlineProbe
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)

ComputeMetrics: TypeAlias = Callable[[EvalPrediction], dict[str, float]]

_OPTION = "training.monitor_projector=true", "training.monitor_projector=false"
_KNN, _MONITORED = "eval_knn", "eval_embedding_std"
_SEED_OFFSET = 2**32
"""Offset of the seed for the monitor. It makes the views differ from those of training."""
_CHUNK = 64  # number of training images that are augmented and embedded at once


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


def monitor_records(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the log records of the monitor."""
    return [record for record in log_history if _MONITORED in record]


class Alarm(TrainerCallback):
    """Checks the measurements of the monitor. Warns, or stops the run in all processes.

    Attributes:
        argument: name of the training argument whose value is `warn` or `stop`.
        message: the last message; None if there was none.
    """

    argument: str

    def __init__(self) -> None:
        self.message: str | None = None

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        """Return a message if the last measurements are bad, else None.

        Args:
            history: the log records of the monitor, with `step` and the measurements.
        """
        raise NotImplementedError(f"{type(self).__name__} must define find_problem")

    def on_evaluate(self, args, state, control, metrics: dict[str, Any] | None = None, **kwargs) -> None:
        if _MONITORED not in (metrics or {}):
            return  # `evaluate` measured other images
        message = self.find_problem(monitor_records(state.log_history))
        if any_process(message is not None, args.device):
            self.message = message or "another process reports bad measurements"
            logger.warning("%s", self.message)
            if getattr(args, self.argument) == "stop":
                control.should_save = control.should_training_stop = True

    def last_message(self, log_history: list[dict[str, float]]) -> str | None:
        """Return the last message of the whole run, also of its parts before it resumed; None: no message."""
        history = monitor_records(log_history)
        messages = (self.find_problem(history[:count]) for count in range(len(history), 0, -1))
        return next(filter(None, messages), self.message)

    def stop_reason(self, args: SSLTrainingArguments) -> str | None:
        """Return why the alarm stopped the run, as a sentence; None if it did not."""
        if self.message is None or getattr(args, self.argument) != "stop":
            return None
        return f"{self.message}; the run was stopped (training.{self.argument}=stop)"


class CollapseAlarm(Alarm):
    """Detects collapsed embeddings by a low standard deviation, rank or measurement of the method.

    The embeddings of a new network may be nearly collapsed and recover during training. The alarm is raised
    when two consecutive measurements after the start are low and the second is at most 1.2 times the first.
    A NaN raises the alarm immediately.

    Args:
        minimum: the value below which a measurement is low, by name (`SSLPreTrainedModel.collapsed_below`).
    """

    argument = "on_collapse"

    def __init__(self, minimum: Mapping[str, float]) -> None:
        super().__init__()
        self.minimum = minimum

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        *earlier, last = history
        trained = [record for record in earlier if record["step"] > 0]
        message = None
        for name, minimum in self.minimum.items():
            value, before = last[f"eval_{name}"], trained[-1][f"eval_{name}"] if trained else math.inf
            stays_low = value < minimum and before < minimum and value <= 1.2 * before
            if stays_low or math.isnan(value):
                message = (
                    f"embeddings have collapsed at step {last['step']}: {name} is {value:.3g}, "
                    f"expected at least {minimum:g}"
                )
        return message


class FeatureGuard(Alarm):
    """Compares the k-NN accuracy of a continued run with the accuracy before the first step.

    New heads make the features worse at first, so one low measurement is not evidence. The guard fires when
    two consecutive measurements are more than two standard errors below the initial one. The second must also
    not be better than the first.

    Args:
        queries: number of images on which the accuracy is measured.
        name: name of the k-NN classifier; "" for a single one.
    """

    argument = "on_worse"

    def __init__(self, queries: int, name: str = "") -> None:
        super().__init__()
        self.queries, self.key = queries, f"eval_{name}_knn" if name else _KNN

    def find_problem(self, history: list[dict[str, float]]) -> str | None:
        measured = [(record["step"], record[self.key]) for record in history if self.key in record]
        if len(measured) < 3:
            return None
        (_, start), (_, before), (step, now) = measured[0], *measured[-2:]
        error = math.hypot(standard_error(start, self.queries), standard_error(now, self.queries))
        if max(before, now) >= start - 2 * error or now > before:
            return None
        return (
            f"the features are worse than before the first step: k-NN accuracy ({self.key}) is {now:.3f} "
            f"at step {step}, and was {start:.3f}; lower training.learning_rate, or set "
            "training.head_warmup_epochs or training.layer_decay"
        )
