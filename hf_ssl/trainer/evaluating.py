# SPDX-License-Identifier: Apache-2.0
"""The part of the trainer that measures the model: `evaluate` with the monitor, `predict` for features."""

import logging
import signal
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from transformers import BaseImageProcessor
from transformers.trainer_utils import PredictionOutput

from hf_ssl.data import DataConfig, Source, all_images, as_source
from hf_ssl.errors import UserError
from hf_ssl.evaluation import extract_features
from hf_ssl.modeling.gather import any_process
from hf_ssl.precision import DTYPES
from hf_ssl.progress import hidden_progress
from hf_ssl.trainer.logs import Stopwatch
from hf_ssl.trainer.monitor import (
    CollapseAlarm,
    FeatureGuard,
    KNNClassifier,
    Monitor,
    classify,
    knn_classifiers,
    load_monitor_images,
)
from hf_ssl.trainer.pushing import PushingTrainer
from hf_ssl.trainer.stopping import Interrupted, StopOnSignal
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)


class EvaluatingTrainer(PushingTrainer):
    """The part of `SSLTrainer` that measures the model.

    Attributes:
        monitor: measures the model; None until the first measurement.
        classifiers: the k-NN classifiers of `eval_dataset`, by name.
        collapse_message: the last message of the collapse alarm; None if there was none.
        guard: the guard of a continued run with a k-NN monitor, else None.
    """

    source: Source
    data: DataConfig
    preset: ViewPreset
    processor: BaseImageProcessor
    monitor: Monitor | None
    classifiers: Mapping[str, KNNClassifier]
    alarm: CollapseAlarm
    collapse_message: str | None
    stopwatch: Stopwatch
    stop_signal: StopOnSignal
    guard: FeatureGuard | None

    @property
    def stop_reason(self) -> str | None:
        """Why the collapse alarm or the guard stopped the run, as a sentence; None if they did not."""
        if self.collapse_message is not None and self.args.on_collapse == "stop":
            return f"{self.collapse_message}; the run was stopped (training.on_collapse=stop)"
        if self.guard is not None and self.guard.message is not None and self.args.on_worse == "stop":
            return f"{self.guard.message}; the run was stopped (training.on_worse=stop)"
        return None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model with the monitor, and check whether the embeddings have collapsed.

        Args:
            eval_dataset: other labeled images, in the forms of the constructor, or the name of an entry of
                its dict. Then only their k-NN accuracy is measured.
            ignore_keys: has no effect.
            metric_key_prefix: prefix of the names.

        Returns:
            The measurements by name, with the prefix.

        Raises:
            UserError: `eval_dataset` is of another type or has no labels.
        """
        other = eval_dataset is not None
        with self.stopwatch.paused(), hidden_progress(self.args.hides_progress):
            try:
                with self.stop_signal.interruptible():
                    if other:
                        metrics = classify(
                            self._classifiers_of(eval_dataset), self.method, self._dtype,
                            self.compute_metrics, metric_key_prefix,
                        )  # fmt: skip
                    else:
                        metrics = self._built_monitor().measure(self.method, metric_key_prefix)
            except Interrupted:
                self._stop()
            message = None
            if not other:
                message = self.alarm.check(metrics, self.state.global_step, metric_key_prefix)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if any_process(message is not None, self.args.device):
            self.collapse_message = message or "embeddings have collapsed on another process"
            logger.warning("%s", self.collapse_message)
            if self.args.on_collapse == "stop":
                self.control.should_save = self.control.should_training_stop = True
        return metrics

    @property
    def _dtype(self) -> torch.dtype | None:
        return DTYPES[self.args.precision]

    def _classifiers_of(self, data: Any) -> dict[str, KNNClassifier]:
        if isinstance(data, str) and data in self.classifiers:
            return {data: self.classifiers[data]}
        return knn_classifiers(data, self.data, self.processor, self.args)

    def _built_monitor(self) -> Monitor:
        """Return the monitor; build it at the first measurement."""
        if self.monitor is None:
            images = load_monitor_images(self.source, self.preset, self.data, self.args)
            self.monitor = Monitor(images, self.classifiers, self._dtype, self.compute_metrics)
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
        images = all_images(as_source(test_dataset, self.data, "test_dataset"), self.data.channels)
        features = extract_features(
            self.method.exported_encoder, self.processor, images, dtype=self._dtype, description="features"
        )
        return PredictionOutput(predictions=features.numpy(), label_ids=None, metrics={})

    def prediction_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error: `predict` returns features, and `evaluate` measures them."""
        raise UserError("prediction_step: expected no call; use trainer.predict(images) for features")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error: the hooks of a method belong to one model."""
        raise UserError("hyperparameter_search: expected no call; start one run per setting, as hf-ssl does")

    def _stop(self, save: bool = True) -> NoReturn:
        """End the process after a signal; save a checkpoint if at least one step is complete."""
        step, name = self.state.global_step, cast(signal.Signals, self.stop_signal.received).name
        if save and step > 0:
            self._save_checkpoint(self.model, None)
        kept = f"after step {step}; the same command resumes the run" if step > 0 else "before the first step"
        logger.warning("stopped by %s %s", name, kept)
        raise self.stop_signal.exit_exception()
