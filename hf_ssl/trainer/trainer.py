# SPDX-License-Identifier: Apache-2.0
"""The Trainer of all methods: transformers' training loop with augmentation on the device and a monitor.

A run resumes exactly from its checkpoints, on the same machine with the same versions.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import hf_ssl.auto  # noqa: F401  registers the methods with transformers
from hf_ssl.allocation import kept_memory
from hf_ssl.data import (
    BrokenCounter,
    DataConfig,
    LoadedBatch,
    as_source,
    holds_small_images,
    train_loader,
)
from hf_ssl.errors import UserError
from hf_ssl.hub import image_processor
from hf_ssl.methods import METHODS
from hf_ssl.modeling.backbones import check_image_sizes
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.gather import average_gradients
from hf_ssl.progress import hidden_progress
from hf_ssl.trainer.alarms import CollapseAlarm, FeatureGuard
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.callbacks import (
    SEED_OFFSET,
    CurvesCallback,
    MemoryWarmup,
    MethodHooks,
    MethodPicturesCallback,
    ProgressBar,
    StopOnSignal,
    WeightDecaySchedule,
)
from hf_ssl.trainer.checkpoints import check_no_checkpoints, checkpoint_to_resume, keep_loader_position
from hf_ssl.trainer.evaluating import EvaluatingTrainer
from hf_ssl.trainer.gradient_cache import cached_backward
from hf_ssl.trainer.knn import ComputeMetrics, knn_classifiers, knn_names
from hf_ssl.trainer.logs import Stopwatch, TermMeans, peak_memory_gib
from hf_ssl.trainer.machine_settings import (
    Choices,
    checked_model,
    choose_precision,
    choose_workers,
    prepare_model,
)
from hf_ssl.trainer.monitor import Monitor
from hf_ssl.trainer.optimizers import check_objects
from hf_ssl.trainer.resuming import lacks_measurement
from hf_ssl.trainer.schedules import largest_weight_decay
from hf_ssl.trainer.transformers_arguments import check_early_stopping, check_metric, reject_argument
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)


class SSLTrainer(EvaluatingTrainer):
    """Trains any method of hf_ssl. It is transformers' Trainer with images as data.

    `evaluate()` measures the model with the monitor. `save_model()` writes the files to publish: the native
    encoder, its image processor, and the whole method model in `pretraining/`.

    Args:
        model: the model of a method; `model.config.views` contains its augmentation settings.
        args: training arguments; a plain `TrainingArguments` gets the defaults of `SSLTrainingArguments`.
        train_dataset: the images (`hf_ssl.data.as_source`): a `Dataset` or `IterableDataset` of `datasets`, a
            torch data set, a list of files, or a folder. Only `args.online_probe` reads labels.
        eval_dataset: labeled images for the k-NN accuracy of the monitor, or a dict of them
            (`hf_ssl.trainer.knn.knn_classifiers`).
        model_init: returns the model; it is called once, with the seed of `args`.
        compute_loss_func: receives the `SSLOutput` and None instead of labels, and returns the loss.
        compute_metrics: receives features and labels of the k-NN images, and returns further measurements.
        callbacks: further transformers callbacks.
        optimizers: an optimizer and a schedule that replace those of `args`; each may be None.
        optimizer_cls_and_kwargs: a class and its arguments. It gets the parameter groups of the method.
        data: how the images are read (`cache`, `channels`, `image_column`, `max_broken_fraction`, ...).
        monitor: measures the model every `args.monitor_steps` steps. None builds one from the data sets.
        continued: whether the weights come from a trained encoder, also without `from_backbone`. Then a guard
            compares the k-NN accuracy of the monitor with the initial one.
        choices: the settings that were chosen for this machine. None chooses precision and workers.

    `data_collator`, `processing_class` and `preprocess_logits_for_metrics` must be None.

    Attributes:
        collapse_alarm: warns about collapsed embeddings or stops the run.
        alarms: `collapse_alarm`. A continued run with k-NN images also has guards against worse features.
        steps_per_epoch: optimizer steps of an epoch, and of the whole run if the length of an epoch is not
            known; 0 before training.
        images_seen: processed images of all processes and parts of the run. The last step of an epoch may
            have fewer micro-batches than the others.
    """

    args: SSLTrainingArguments

    def __init__(
        self,
        model: SSLPreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], SSLPreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Any = None,
        *,
        data: DataConfig | None = None,
        monitor: Monitor | None = None,
        continued: bool = False,
        choices: Choices | None = None,
    ) -> None:
        logits = preprocess_logits_for_metrics
        reject_argument("data_collator", data_collator, "set the augmentation in model.config.views")
        reject_argument("processing_class", processing_class, "it follows from model.config.views")
        reject_argument("preprocess_logits_for_metrics", logits, "compute_metrics receives features")
        check_objects(optimizers, optimizer_cls_and_kwargs, callbacks)
        args = SSLTrainingArguments.from_arguments(args)
        self.method = model = checked_model(model, model_init, args.seed)
        if compute_metrics is None and model.method_name() in METHODS:  # others make further measurements
            check_metric(args.metric_for_best_model, knn_names(eval_dataset, model, args))
        if train_dataset is None:
            raise UserError("train_dataset: expected images, got None; use a datasets.Dataset or a folder")
        self.preset, data = ViewPreset.from_dict(model.config.views or {}), DataConfig.of(data)
        self.preset.check(data.channels)
        model.check_image_columns(data.further_image_columns, model.config)
        model.config.views = self.preset.to_dict()  # complete, also if the user set only some of the fields
        self.source = as_source(train_dataset, data)
        # The monitor, `predict` and the evaluation use the range that "auto" found in the training images.
        self.data = data = self.source.with_found_range(data)
        self.processor = image_processor(self.preset, data.channels)
        self.online_probe = self._make_online_probe(args)
        self.monitor = monitor
        self.classifiers = {} if monitor is None else monitor.classifiers
        if monitor is None and eval_dataset is not None:
            self.classifiers = knn_classifiers(eval_dataset, data, self.processor, args)
        self.broken = BrokenCounter(data.max_broken_fraction, self.source.num_rows)
        self.resumed = self.steps_per_epoch = self.images_seen = 0
        self.stop_signal, self.bar = StopOnSignal(), ProgressBar()
        self._terms, self.stopwatch = TermMeans(), Stopwatch()
        self._position: dict[str, Any] | None = None
        self._resumed_step: int | None = None
        self._loader: Any = None
        if choices is None:
            small = holds_small_images(self.source, data)
            choices = choose_precision(args) | choose_workers(args, small=small)
        self.choices: Choices = choices
        check_image_sizes(model.backbone, self.preset.final_sizes, data.channels, self.preset.final_size)
        prepare_model(model, args)
        self.collapse_alarm = CollapseAlarm(model.collapsed_below)
        guarded = self.classifiers.items() if continued or model.continues else ()
        self.alarms = [self.collapse_alarm, *(FeatureGuard(len(knn.tested), name) for name, knn in guarded)]
        super().__init__(
            model=model,
            args=args,
            eval_dataset=eval_dataset if eval_dataset is not None else self.source,  # must not be None
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self._mixed_precision = self.accelerator.mixed_precision
        self.train_dataset = train_dataset
        own_loss = compute_loss_func is not None or type(self).compute_loss is not SSLTrainer.compute_loss
        self.check_arguments(own_loss=own_loss)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self._hooks = MethodHooks(self)
        for callback in (
            *([] if args.disable_tqdm else [self.bar]),
            MemoryWarmup(
                model, partial(self._make_loader, self._data_seed + SEED_OFFSET), self.accelerator.autocast
            ),
            self._hooks,
            WeightDecaySchedule(),
            self.stop_signal,
            CurvesCallback(self.stopwatch),
            *self.alarms,
        ):
            self.add_callback(callback)
        self._is_made = True

    def draw_method_pictures(self, images: LoadedBatch) -> None:
        """Draw the method's own pictures of these images during training, e.g. reconstructions."""
        callbacks = self.callback_handler.callbacks
        # At the end of training, trackers close their run, so they must receive the last pictures before.
        callbacks.insert(
            0, MethodPicturesCallback(self.stopwatch, self.method, images, self.preset, callbacks)
        )

    # Data: the batch of the loader becomes the batch of the model, on the device.

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this process's share of each batch.

        accelerate does not prepare it, because the loader divides the data and sets seeds itself.
        """
        self._loader = self._make_loader(self._data_seed, resumes=self._resumed_step is not None)
        return self._loader

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _make_loader(self, seed: int, resumes: bool = False, has_all_rows: bool = False) -> Any:
        return train_loader(
            self.source,
            self.preset,
            config=self.data,
            seed=seed,
            batch_size=self.args.per_device_train_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            start_batch=self._batches_before(self._resumed_step or 0) if resumes else 0,
            position=self._position if resumes else None,
            num_workers=cast(int, self.args.dataloader_num_workers),
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            prefetch_factor=self.args.dataloader_prefetch_factor,
            start_method=self.args.dataloader_multiprocessing_context,
            device=self.args.device,
            has_all_rows=has_all_rows,
            label_column=None if self.online_probe is None else self.online_probe.labels.stream_column,
        )

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        if not isinstance(inputs, LoadedBatch):  # of a loader that the user defined
            return super()._prepare_inputs(inputs)
        self._note(inputs)
        return inputs.inputs(self.args.device, self.method.sample_masks)

    def _note(self, batch: LoadedBatch) -> None:
        """Count images and broken images, and store the position of a stream."""
        self.images_seen += len(batch) * self.args.world_size
        self.broken.add(batch)
        self._position = batch.position or self._position

    # Optimization.

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of the model. Its terms are summed until the next log record."""
        output = model(**inputs, return_dict=True)
        self._terms.add(output)
        loss = output.loss
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(output, None, num_items_in_batch=None)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise UserError(f"compute_loss_func: expected a scalar tensor with a gradient, got {loss!r}")
        return (loss, output) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Compute loss and gradient of a micro-batch, in chunks if `args.contrastive_chunk_size` is set."""
        if not self.method.training:  # `train()` visits all modules, which takes 1 ms
            self.method.train()
        share, size = self.current_gradient_accumulation_steps, self.args.contrastive_chunk_size
        clear_every = self.args.torch_empty_cache_steps
        if clear_every and self.state.global_step % clear_every == 0:
            clear_device_cache()
        self.method.ends_batch = self.accelerator.sync_gradients
        batch: Any = self._prepare_inputs(inputs) if size is None else None
        if size is None:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch) / share
            self.accelerator.backward(loss)
        else:
            self._note(inputs)
            device, sample_masks = self.args.device, self.method.sample_masks
            output = cached_backward(
                self.method,
                [partial(part.inputs, device, sample_masks) for part in inputs.split(size)],
                backward=lambda loss: self.accelerator.backward(loss / share),
                precision=self.accelerator.autocast,  # accelerate applies it only to `model.forward`
            )
            if self.accelerator.sync_gradients:
                average_gradients(self.method.parameters())
            self._terms.add(output)
            loss = output.loss / share
        if self.accelerator.sync_gradients:
            self._hooks.drop_frozen_gradients(self.state.global_step)
        self._train_online_probe(inputs, batch)
        return loss.detach()

    # Logging and the monitor.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss, images per second and memory to a log record.

        Raises:
            UserError: the loss is not finite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"loss: expected a finite number near step {self.state.global_step}, got {logs['loss']}; "
                    f"{self.advice_after_divergence()}"
                )
            logs |= {f"term_{name}": value for name, value in self._terms.take().items()}
            logs |= {} if self.online_probe is None else self.online_probe.take()
            logs["images_per_second"] = (
                self.stopwatch.steps_per_second(self.state.global_step) * self.args.batch_size
            )
            logs["memory_gib"] = peak_memory_gib(self.args.device)
            if self.args.weight_decay_end is not None:
                logs["weight_decay"] = largest_weight_decay(self.create_optimizer())
        super().log(logs, start_time)

    # Training.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers does. Measure the initial model first, unless the run resumes.

        A resumed run first measures the model of the checkpoint if a signal prevented this measurement.

        Raises:
            UserError: the run is new, and the output folder contains checkpoints of an earlier run; or the
                loss or a weight is not finite.
            SystemExit, KeyboardInterrupt: the process received SIGTERM or Ctrl-C. Training finished the step
                and saved a checkpoint before.
        """
        self._resumed_step, measures_first = None, self.args.eval_on_start
        # All accelerators of a process share this value (accelerate 1.15), and each new Trainer replaces it.
        # Autocast would then use the default type of torch, float16 on a GPU.
        self.accelerator.state._mixed_precision = self._mixed_precision
        self.check_changes()
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        check_early_stopping(self.args, self.callback_handler.callbacks)
        if not resume_from_checkpoint:
            check_no_checkpoints(self.args)
        elif (finished := self.finished_output(resume_from_checkpoint)) is not None:
            return finished
        try:
            if not isinstance(resume_from_checkpoint, bool):
                self.args.eval_on_start = lacks_measurement(resume_from_checkpoint, self.args)
            with (
                keep_loader_position(),
                kept_memory(self.args.device.type),
                hidden_progress(self.args.hides_progress),
            ):
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except RuntimeError as error:  # OutOfMemoryError is a RuntimeError; on a CPU there is no other class
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = max(1, self.args.batch_size // 2)
            raise UserError(
                f"training.batch_size: expected a batch that fits into the memory of {self.args.device}, got "
                f"{self.args.batch_size} images; use training.batch_size={smaller}"
                + (f" or training.contrastive_chunk_size={smaller}" if self.method.couples_samples else "")
            ) from error
        else:
            self.check_finite()
            if self.stop_signal.received is not None:
                self._stop(save=False)  # the training loop has saved a checkpoint
            if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
                logger.warning(
                    "training.load_best_model_at_end: the last model stays; no metric was a number"
                )
            return result
        finally:
            self.args.eval_on_start = measures_first
            self.method.discard_batch()
            self.bar.close()
            self.stop_signal.restore()
            self.stopwatch.stop()
            if self._loader is not None:
                self._loader.close()
