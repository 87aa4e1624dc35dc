# SPDX-License-Identifier: Apache-2.0
"""The part of the trainer that measures the model: `evaluate` with the monitor, `predict` for features."""

import logging
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.trainer_utils import PredictionOutput

from hf_ssl.data import DataConfig, LoadedBatch, Source, all_images, as_source
from hf_ssl.data.training_labels import training_labels
from hf_ssl.errors import UserError, suggestion
from hf_ssl.evaluation import extract_features
from hf_ssl.evaluation.split_report import report_comparison
from hf_ssl.precision import autocast_dtype
from hf_ssl.progress import hidden_progress
from hf_ssl.trainer.alarms import Alarm, CollapseAlarm
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.callbacks import Interrupted, StopOnSignal
from hf_ssl.trainer.epochs import check_epochs
from hf_ssl.trainer.gradient_cache import check_chunking, warn_about_accumulation
from hf_ssl.trainer.knn import KNNClassifier, classify, knn_classifiers
from hf_ssl.trainer.logs import Stopwatch
from hf_ssl.trainer.machine_settings import check_batch_size
from hf_ssl.trainer.monitor import Monitor, load_monitor_images
from hf_ssl.trainer.online_probe import OnlineProbe
from hf_ssl.trainer.optimizers import check_optimization
from hf_ssl.trainer.pushing import PushingTrainer
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)


_FEATURES = "use predict(images) for features and evaluate(images) for measurements"
_GIVEN = ("args", "data", "train_dataset", "eval_dataset", "compute_metrics")
"""Arguments of the constructor, from which it makes other objects."""
_UNUSED_METHODS = {
    "prediction_step": _FEATURES,
    "evaluation_loop": _FEATURES,
    "get_eval_dataloader": _FEATURES,
    "get_test_dataloader": _FEATURES,
    "hyperparameter_search": "start one run per setting, as hf-ssl does",
}
"""Method of transformers' Trainer that this trainer does not have -> what to do instead."""
_CALLERS = {
    "get_decay_parameter_names": "create_optimizer",
    "get_optimizer_cls_and_kwargs": "create_optimizer",
    "_get_train_sampler": "get_train_dataloader",
    "_save": "save_model",
}
"""Method of transformers' Trainer that this trainer never calls -> the method to override instead."""


class EvaluatingTrainer(PushingTrainer):
    """The part of `SSLTrainer` that measures the model.

    Attributes:
        monitor: measures the model; None until the first measurement.
        classifiers: the k-NN classifiers of `eval_dataset`, by name.
        alarms: check the measurements of the monitor, and warn or stop the run.
        online_probe: a linear classifier that is trained beside the encoder; None without it.
    """

    source: Source
    data: DataConfig
    preset: ViewPreset
    processor: BaseImageProcessor
    monitor: Monitor | None
    classifiers: Mapping[str, KNNClassifier]
    collapse_alarm: CollapseAlarm
    alarms: list[Alarm]
    stopwatch: Stopwatch
    stop_signal: StopOnSignal

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unused = {name: f"override {own}" for name, own in _CALLERS.items() if own not in vars(cls)}
        for name, advice in (_UNUSED_METHODS | unused).items():
            if name in vars(cls):
                raise UserError(f"{cls.__name__}.{name}: expected no such method, got one; {advice}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _GIVEN and vars(self).get("_is_made") and value is not getattr(self, name):
            raise UserError(f"SSLTrainer.{name}: expected no change, got one; make a new SSLTrainer")
        super().__setattr__(name, value)

    def check_changes(self) -> None:
        """Raise `UserError` for a change of arguments or model that training would ignore."""
        self.args.check_changes()
        if self.accelerator.unwrap_model(self.model, keep_torch_compile=False) is not self.method:
            raise UserError("SSLTrainer.model: expected no change, got one; make a new SSLTrainer")

    def check_arguments(self, *, own_loss: bool) -> None:
        """Raise `UserError` or log a warning if arguments, method and data do not fit together.

        Args:
            own_loss: whether the user computes the loss.
        """
        warn_about_accumulation(self.method, self.args)
        self.method.check_batch_size(self.args.batch_size, self.method.config)
        check_batch_size(self.args, self.source)
        check_epochs(self.args, self.method, self.source, self.data)
        own = self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs
        check_optimization(self.method, self.args, *own)
        self.method.check_source(self.source.streaming, self.source.num_rows)
        if self.args.contrastive_chunk_size is not None:
            check_chunking(self.method, own_loss=own_loss)

    # Work of transformers' Trainer that only language models need.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # losses are means over images, so there is nothing to count

    @property
    def stop_reason(self) -> str | None:
        """Why an alarm stopped the run, as a sentence; None if none did."""
        return next(filter(None, (alarm.stop_reason(self.args) for alarm in self.alarms)), None)

    @property
    def collapse_message(self) -> str | None:
        """Deprecated; use `collapse_alarm.message`."""
        text = "collapse_message is deprecated; use collapse_alarm.message"
        warnings.warn(text, FutureWarning, stacklevel=2)
        return self.collapse_alarm.message

    @property
    def guard(self) -> Alarm | None:
        """Deprecated; use `alarms`."""
        warnings.warn("guard is deprecated; use alarms", FutureWarning, stacklevel=2)
        return next((alarm for alarm in self.alarms if alarm is not self.collapse_alarm), None)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model with the monitor. Then the alarms check the measurements.

        Args:
            eval_dataset: other labeled images, in the forms of the constructor, or the name of an entry of
                its dict. Then only their k-NN accuracy is measured.
            ignore_keys: has no effect.
            metric_key_prefix: prefix of the names.

        Returns:
            The measurements by name, with the prefix.

        Raises:
            UserError: `eval_dataset` is of another type or has no labels, or a weight is not finite.
        """
        self.check_finite()
        with self.stopwatch.paused(), hidden_progress(self.args.hides_progress):
            try:
                with self.stop_signal.interruptible():
                    if eval_dataset is not None:
                        metrics = classify(
                            self._classifiers_of(eval_dataset), self.method, self._dtype,
                            self.compute_metrics, metric_key_prefix, self.online_probe,
                        )  # fmt: skip
                    else:
                        metrics = self._built_monitor().measure(self.method, metric_key_prefix)
                        self._check_best_metric(metrics, metric_key_prefix)
            except Interrupted:
                self._stop()
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        """Also treat the first measurement of a resumed run as the one that a signal prevented.

        transformers (5.20 to 5.24) does not use a measurement before the first step for the best model and
        for a schedule that depends on measurements.
        """
        is_late = skip_scheduler and self._resumed_step is not None
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not is_late)
        if is_late:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _check_best_metric(self, metrics: Mapping[str, float], prefix: str) -> None:
        """Raise `UserError` if `metric_for_best_model` is not a number among the measurements."""
        name = self.args.metric_for_best_model
        if name is None or prefix != "eval":
            return
        value = metrics.get(key := f"eval_{name.removeprefix('eval_')}")
        if key in metrics and not isinstance(value, int | float):
            raise UserError(f"training.metric_for_best_model: expected a number as {name}, got {value!r}")
        if key not in metrics:
            raise UserError(
                f"training.metric_for_best_model: expected one of {', '.join(metrics)}, got {name}"
                + ("; eval_knn needs labeled images as eval_dataset" if not self.classifiers else "")
            )

    @property
    def _dtype(self) -> torch.dtype | None:
        return autocast_dtype(self.args.precision)

    def _classifiers_of(self, data: Any) -> dict[str, KNNClassifier]:
        named = [name for name in self.classifiers if name]
        if isinstance(data, str | int) and str(data) in named:
            return {str(data): self.classifiers[str(data)]}
        if isinstance(data, str) and named and "/" not in data and not Path(data).exists():
            raise UserError(f"eval_dataset: expected a known name, got {data}; {suggestion(data, named)}")
        return knn_classifiers(data, self.data, self.processor, self.args)

    def _make_online_probe(self, args: SSLTrainingArguments) -> OnlineProbe | None:
        if not args.online_probe:
            return None
        labels = training_labels(self.source, self.data)
        return OnlineProbe(labels, args.online_probe_learning_rate, lambda: self._dtype)

    def _train_online_probe(self, batch: Any, inputs: Mapping[str, Tensor] | None = None) -> None:
        """Train the online probe, if there is one, with a micro-batch.

        Args:
            batch: the batch of the loader.
            inputs: the model inputs of the batch; None: the views are computed again, in chunks.
        """
        if self.online_probe is None:
            return
        if not isinstance(batch, LoadedBatch):
            raise UserError(
                "training.online_probe: expected batches of SSLTrainer's own loader, got "
                f"{type(batch).__name__}; use training.online_probe=false"
            )
        for part in batch.split(self.args.contrastive_chunk_size or len(batch)):
            views = part.views(self.args.device).pixel_values if inputs is None else inputs["pixel_values"]
            labels = self.online_probe.labels.of(part)
            self.online_probe.add(self.method.exported_encoder, views[:, 0], labels)
        if self.method.ends_batch:
            self.online_probe.step(self.state.global_step / max(1, self.state.max_steps))

    def _built_monitor(self) -> Monitor:
        """Return the monitor; build it at the first measurement."""
        if self.monitor is None:
            if self.compute_metrics is not None and not self.classifiers:
                logger.warning("compute_metrics has no effect without labeled images as eval_dataset")
            images = load_monitor_images(self.source, self.preset, self.data, self.args)
            self.monitor = Monitor(images, self.classifiers, self._dtype, self.compute_metrics)
            for classifier in self.classifiers.values() if self.args.should_log else ():
                if classifier.queries is not None:  # else each image is classified by the others
                    report_comparison("monitor", classifier.bank, classifier.queries)
        self.monitor.online_probe = self.online_probe
        return self.monitor

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return the features (N, D) of images, in the order of the data set, as `predictions`.

        Args:
            test_dataset: map-style images, as for the constructor. Labels are not needed.
            ignore_keys, metric_key_prefix: have no effect.

        Raises:
            UserError: the data are a stream, or an image cannot be read.
        """
        self.use_averaged_weights(True)
        source = as_source(test_dataset, self.data, "test_dataset", only_image=True)
        images = all_images(source, self.data.channels, self.args.per_device_eval_batch_size)
        features = extract_features(
            self.method.exported_encoder, self.processor, images, dtype=self._dtype, description="features"
        )
        return PredictionOutput(predictions=features.numpy(), label_ids=None, metrics={})

    def _stop(self, save: bool = True) -> NoReturn:
        """End the process after a signal; save a checkpoint if at least one step is complete."""
        step, name = self.state.global_step, cast(signal.Signals, self.stop_signal.received).name
        if save and step > 0:
            self._save_checkpoint(self.model, None)
        kept = f"after step {step}; the same command resumes the run" if step > 0 else "before the first step"
        logger.warning("stopped by %s %s", name, kept)
        raise self.stop_signal.exit_exception()


def _not_called(name: str, advice: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(f"{name}: expected no call, got one; {advice}")

    return method


for _name, _advice in _UNUSED_METHODS.items():
    setattr(EvaluatingTrainer, _name, _not_called(_name, _advice))
