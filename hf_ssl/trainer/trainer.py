# SPDX-License-Identifier: Apache-2.0
"""The one Trainer: transformers' loop, with views made on the device, a monitor, and checkpoints that
resume exactly on the same machine with the same versions.
"""

import logging
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

import hf_ssl.auto  # noqa: F401  registers the methods with transformers
from hf_ssl.data import (
    BrokenCounter,
    DataConfig,
    LoadedBatch,
    Source,
    holds_small_images,
    train_loader,
)
from hf_ssl.errors import UserError
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.gather import any_process, average_gradients
from hf_ssl.progress import hidden_progress, progress
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.callbacks import (
    Curves,
    MethodHooks,
    ProgressBar,
    WeightDecaySchedule,
    steps_per_epoch,
)
from hf_ssl.trainer.checkpoints import load_data_state, readable, save_checkpoint
from hf_ssl.trainer.first_pass import SEED_OFFSET, FirstPass
from hf_ssl.trainer.fitting import Choices, check_batch_size, choose_precision, choose_workers
from hf_ssl.trainer.gradient_cache import cached_backward, check_chunks_help
from hf_ssl.trainer.monitor import CollapseAlarm, Monitor
from hf_ssl.trainer.optimizers import build_optimizer, build_scheduler, largest_weight_decay
from hf_ssl.trainer.preparation import prepare
from hf_ssl.trainer.pushing import PushingTrainer
from hf_ssl.trainer.resuming import loader_that_skips_by_itself
from hf_ssl.trainer.stopping import Interrupted, StopOnSignal
from hf_ssl.trainer.terms import TermMeans
from hf_ssl.trainer.throughput import Stopwatch, peak_memory_gib
from hf_ssl.views import ViewPreset

logger = logging.getLogger(__name__)


class SSLTrainer(PushingTrainer):
    """Trains any method of hf_ssl on a source of images.

    Args:
        model: a method; `model.config.views` holds the preset of the views that it is shown.
        args: training arguments.
        train_dataset: where the images come from (`hf_ssl.data.open_source`).
        data: how they are read (`cache`, `channels`, `max_broken_fraction`, ...).
        monitor: what is measured every `args.monitor_steps`; None trains without.
        callbacks: further transformers callbacks.

    `evaluate()` is the monitor. `save_model()` without a folder writes what is published: the native
    encoder and its image processor at the root of `args.output_dir`, the whole method model under
    `pretraining/`.
    """

    args: SSLTrainingArguments

    def __init__(
        self,
        model: SSLPreTrainedModel,
        args: SSLTrainingArguments,
        train_dataset: Source,
        data: DataConfig,
        monitor: Monitor | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.method = model
        self.preset = ViewPreset.from_dict(model.config.views)
        self.preset.check(data.channels)
        self.data = data
        self.monitor = monitor
        self.alarm = CollapseAlarm(model.collapsed_below)
        self.broken = BrokenCounter(data.max_broken_fraction, train_dataset.num_rows)
        self.collapse_message: str | None = None
        self.resumed = 0
        self.stop_signal, self.bar = StopOnSignal(), ProgressBar()
        self._terms = TermMeans()
        self._position: dict[str, Any] | None = None
        self._resumed_step: int | None = None
        self.stopwatch = Stopwatch()
        self._loader: Any = None
        self.choices: Choices = choose_precision(args) | choose_workers(
            args, small=holds_small_images(train_dataset, data)
        )
        prepare(model, args)
        if monitor is None:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        super().__init__(model=model, args=args, eval_dataset=monitor, callbacks=callbacks)
        self.source = train_dataset
        self._check_arguments()
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        for callback in (
            *([] if args.disable_tqdm else [self.bar]),
            FirstPass(model, partial(self._make_loader, args.seed + SEED_OFFSET), self.accelerator.autocast),
            MethodHooks(model, lambda: not self.accelerator.optimizer_step_was_skipped),
            WeightDecaySchedule(),
            self.stop_signal,
            Curves(),
        ):
            self.add_callback(callback)

    # Data: the loader's batch becomes the model's batch on the device.

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this process's share of each batch. It is not prepared by accelerate: it splits and
        seeds by itself.
        """
        self._loader = self._make_loader(self.args.seed, resumes=self._resumed_step is not None)
        return self._loader

    def _make_loader(self, seed: int, resumes: bool = False) -> DataLoader:
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
            pin_memory=self.args.device.type == "cuda",
            device=self.args.device,
        )

    def _batches_before(self, step: int) -> int:
        """Return the number of micro-batches of this process before an optimizer step.

        The last step of an epoch may have fewer than `gradient_accumulation_steps` micro-batches.
        """
        rows, accumulated = self.source.num_rows, self.args.gradient_accumulation_steps
        if rows is None:
            return step * accumulated
        in_an_epoch = rows // (self.args.per_device_train_batch_size * self.args.world_size)
        epochs, steps = divmod(step, math.ceil(in_an_epoch / accumulated))
        return epochs * in_an_epoch + steps * accumulated

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        self._note(batch := inputs)
        return batch.inputs(self.args.device, self.method.draw)

    def _note(self, batch: LoadedBatch) -> None:
        """Count broken images and remember where a stream is."""
        self.broken.add(batch)
        if batch.position is not None:
            self._position = batch.position

    def _check_arguments(self) -> None:
        check_batch_size(self.args, self.source.num_rows, self.source.description)
        self.method.check_source(self.source.streaming, self.source.num_rows)
        if self.args.contrastive_chunk_size is not None:
            check_chunks_help(self.method)
        if self.source.num_rows is None and self.args.max_steps <= 0:
            raise UserError("a stream of unknown length needs training.max_steps > 0, got -1")

    # Optimisation.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of `args.optimizer` with a group for each treatment of parameters."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.method, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up, then transformers' schedule, for each optimiser step."""
        if self.lr_scheduler is None:
            per_epoch = steps_per_epoch(self.args, self._loader, num_training_steps)
            optimizer = optimizer if optimizer is not None else self.create_optimizer()
            self.lr_scheduler = build_scheduler(optimizer, self.args, num_training_steps, per_epoch)
            self.stopwatch.start(self.state.global_step)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's loss; its terms are added up on the device until the next log record."""
        output = model(**inputs)
        self._terms.add(output)
        return (output.loss, output) if return_outputs else output.loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradient and loss of a micro-batch, in chunks with `args.contrastive_chunk_size`."""
        if not self.method.training:  # asked first: setting it walks through all modules, which costs 1 ms
            self.method.train()
        share, size = self.current_gradient_accumulation_steps, self.args.contrastive_chunk_size
        if size is None:
            batch = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch) / share
            self.accelerator.backward(loss)
            return loss.detach()
        self._note(inputs)
        output = cached_backward(
            self.method,
            [partial(part.inputs, self.args.device, self.method.draw) for part in inputs.split(size)],
            backward=lambda loss: self.accelerator.backward(loss / share),
            precision=self.accelerator.autocast,  # accelerate puts it around `model.forward` alone
        )
        if self.accelerator.sync_gradients:
            average_gradients(self.method.parameters())
        self._terms.add(output)
        return output.loss / share

    # Logging and the monitor.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add terms, images per second and memory to a record of the loss, which must be a number."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"the loss became {logs['loss']} near step {self.state.global_step}: lower "
                    "training.learning_rate or lengthen training.warmup_epochs, and start the run again"
                )
            logs |= {f"term_{name}": value for name, value in self._terms.take().items()}
            logs["images_per_second"] = (
                self.stopwatch.steps_per_second(self.state.global_step) * self.args.batch_size
            )
            logs["memory_gib"] = peak_memory_gib(self.args.device)
            if self.args.weight_decay_end is not None:
                logs["weight_decay"] = largest_weight_decay(self.create_optimizer())
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model with the monitor; raises the collapse alarm."""
        if self.monitor is None:
            raise UserError("this trainer was made without a monitor, so it has nothing to evaluate with")
        with self.stopwatch.paused(), hidden_progress(self.args.hides_progress):
            try:
                with self.stop_signal.interruptible():
                    metrics = self.monitor.measure(self.method, metric_key_prefix)
            except Interrupted:
                self._stop()
            message = self.alarm.check(metrics, self.state.global_step, metric_key_prefix)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if any_process(message is not None, self.args.device):
            self.collapse_message = message or "embeddings have collapsed on another process"
            logger.warning("%s", self.collapse_message)
            if self.args.on_collapse == "stop":
                self.control.should_save = self.control.should_training_stop = True
        return metrics

    # Checkpoints.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as in transformers; measure the untrained model first, unless the run resumes.

        Raises:
            SystemExit, KeyboardInterrupt: the process received SIGTERM or Ctrl-C. Training finished the step
                and saved a checkpoint before.
        """
        self._resumed_step = None
        if resume_from_checkpoint:
            self.args.eval_on_start = False
        try:
            with loader_that_skips_by_itself(), hidden_progress(self.args.hides_progress):
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except RuntimeError as error:  # OutOfMemoryError is one; a CPU's allocator raises no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            smaller = max(1, self.args.batch_size // 2)
            raise UserError(
                f"training.batch_size: expected a batch that fits into the memory of {self.args.device}, got "
                f"{self.args.batch_size} images; use training.batch_size={smaller}"
                + (f" or training.contrastive_chunk_size={smaller}" if self.method.couples_samples else "")
            ) from error
        else:
            if self.stop_signal.received is not None:
                self._stop(save=False)  # the training loop has saved a checkpoint
            return result
        finally:
            self.bar.close()
            self.stop_signal.restore()
            self.stopwatch.stop()
            if self._loader is not None:
                self._loader.close()

    def _stop(self, save: bool = True) -> NoReturn:
        """End the process after a signal; save a checkpoint if at least one step is complete."""
        step, name = self.state.global_step, cast(signal.Signals, self.stop_signal.received).name
        if save and step > 0:
            self._save_checkpoint(self.model, None)
        kept = f"after step {step}; the same command resumes the run" if step > 0 else "before the first step"
        logger.warning("stopped by %s %s", name, kept)
        raise self.stop_signal.stop_now()

    def load_finished(self, checkpoint: Path) -> None:
        """Take over the weights and the state of a run that is over."""
        self._load_from_checkpoint(str(checkpoint))
        self.resumed -= 1  # nothing is trained any more
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.stopwatch.paused():
            with progress(f"saving checkpoint-{self.state.global_step}"):
                folder = save_checkpoint(self)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder))

    def data_state(self) -> dict[str, Any]:
        """What this process knows beside the model, as JSON: a stream's position, broken images met so far,
        seconds of training, and how many times the run was taken up again.
        """
        return {
            "position": self._position,
            "broken": self.broken.state_dict(),
            "seconds": self.stopwatch.seconds,
            "resumed": self.resumed,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_data_state(Path(resume_from_checkpoint), self.args.process_index)
        self.broken.load_state_dict(state["broken"])
        self._position = state["position"]
        state_file = Path(resume_from_checkpoint) / TRAINER_STATE_NAME
        self._resumed_step = TrainerState.load_from_json(str(state_file)).global_step
        self.stopwatch.restore(state["seconds"])
        self.resumed = state["resumed"] + 1
        with readable(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with readable(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise UserError(
                f"the checkpoint is not one of this model: missing {load_result.missing_keys[:3]}, "
                f"unexpected {load_result.unexpected_keys[:3]}"
            )
