# SPDX-License-Identifier: Apache-2.0
"""Callbacks of the trainer: method hooks, weight decay, signals, progress bar, memory bank and pictures."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ProgressCallback

from hf_ssl.data import LoadedBatch
from hf_ssl.files import replaced_file
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import any_process, process_count
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.progress import DELAY, bars_move, progress, redrawn
from hf_ssl.signals import stopping
from hf_ssl.trainer.logs import Stopwatch, draw_curves
from hf_ssl.trainer.optimizers import OptimizingTrainer, parameter_groups_by_name
from hf_ssl.trainer.schedules import schedule_weight_decay
from hf_ssl.views import ViewPreset, Views, montage

SIGNALS = (signal.SIGTERM, signal.SIGINT)
VIEWS, CURVES = "views.png", "curves.png"
"""Pictures of every run, in the output folder."""
SEED_OFFSET = 2**33
"""Offset of the seed for `MemoryWarmup`. It makes the views differ from those of the first epoch."""


def clip_each(gradients: list[Tensor], maximum: float) -> None:
    """Scale each gradient down to the norm `maximum` if its norm is larger.

    This function does not synchronize with the device.

    Source: facebookresearch/dino, which clips the gradient of each parameter separately.
    """
    norms = torch._foreach_norm(gradients)
    factors = torch._foreach_add(norms, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, maximum)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


class MethodHooks(TrainerCallback):
    """Calls the hooks of a method with the progress of the run.

    It also clips each gradient (`args.clip_each_tensor`) and freezes parameters until the step that their
    parameter group gives.

    Args:
        trainer: the trainer, whose `method` has the hooks.
    """

    def __init__(self, trainer: OptimizingTrainer) -> None:
        self.trainer, self.model = trainer, trainer.method
        self.model.hooks_are_called = True
        self.frozen_until: list[tuple[int, Parameter]] = []

    def _progress(self, state: TrainerState) -> RunProgress:
        return RunProgress(state.global_step, state.max_steps, self.trainer.steps_per_epoch)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.model.discard_batch()
        parameters = dict(self.model.named_parameters())
        found = parameter_groups_by_name(self.model, args)
        until = {
            name: max(group.frozen_until, round(group.frozen_epochs * self.trainer.steps_per_epoch))
            for name, group in found.items()
        }
        self.frozen_until = [(step, parameters[name]) for name, step in until.items() if step]

    def drop_frozen_gradients(self, step: int) -> None:
        """Delete the gradients of parameters that are frozen in this step.

        The trainer calls this function before it clips the norm of all gradients (`args.max_grad_norm`).
        """
        for until, parameter in self.frozen_until:
            if step < until:
                parameter.grad = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # Hooks read and write weights: EMA updates (MoCo), and lengths of prototypes (SwAV).
        self.trainer.use_averaged_weights(False)
        # on_epoch_begin is unsuitable: transformers also calls it if a run resumes in the middle of an epoch.
        if state.global_step % self.trainer.steps_per_epoch == 0:
            self.model.before_epoch(self._progress(state))
        self.model.before_step(self._progress(state))

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.clip_each_tensor:
            clip_each(
                [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None],
                args.clip_each_tensor,
            )
        self.model.after_backward(self._progress(state))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # with float16, some steps are
            self.model.after_step(self._progress(state))
        if state.global_step >= state.max_steps:
            control.should_log = True  # logs the final loss, even of a run shorter than logging_steps


class WeightDecaySchedule(TrainerCallback):
    """Changes weight decay before each optimizer step, if `args.weight_decay_end` is set."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # In I-JEPA's code, the schedule advances before each step (src/train.py).
        step = state.global_step + (args.cosine_variant == "ijepa")
        schedule_weight_decay(kwargs["optimizer"], args, step / state.max_steps)


class ProgressBar(ProgressCallback):
    """Shows one line with steps, time left, loss, images per second and k-NN accuracy.

    Log records print no further lines. The elapsed time is also updated during a long step.
    """

    _SHOWN = (("loss", "loss", ".4g"), ("images_per_second", "img/s", ".0f"), ("eval_knn", "k-NN", ".3f"))

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}
        self._redrawing = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # A bar without a delay writes parts of a line before `redrawn` makes them whole lines of a file.
            bar = tqdm(
                desc="pretraining",
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                delay=0 if bars_move() else DELAY,
            )
            bar.delay = 0
            self.training_bar = bar
            self._redrawing.enter_context(redrawn(bar))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.close()

    def close(self) -> None:
        """End the line. The trainer also calls this method when training fails."""
        self._redrawing.close()
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for key, label, form in self._SHOWN:
            if key in (logs or {}):
                self.shown[label] = format(logs[key], form)
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class MemoryWarmup(TrainerCallback):
    """Embeds all images once before the first step, for a method that needs a full memory bank at the start.

    A resumed run does not repeat this. The network is in training mode, as in the code of DeepCluster v2.

    Args:
        model: the model. The callback does nothing for a method without `needs_memory_warmup`.
        loader: returns the loader of one epoch, with all rows if `has_all_rows` is True.
        precision: returns the context of a forward pass (autocast).
    """

    def __init__(
        self,
        model: SSLPreTrainedModel,
        loader: Callable[..., Any],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.loader, self.precision = model, loader, precision

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.model.needs_memory_warmup or state.global_step > 0:
            return
        self.model.train()
        loader = self.loader(has_all_rows=self.model.warmup_has_all_rows)
        with progress("embedding all images once", len(loader), unit="batch") as bar:
            for batch in loader:
                with self.precision():
                    self.model.fill_memory(batch.inputs(args.device, self.model.sample_masks))
                bar.update(1)
        loader.close()


class PictureCallback(TrainerCallback):
    """Draws pictures after measurements of the monitor and at the end of training.

    After a measurement, it draws only if drawing takes at most 1/20 of the training time.

    Args:
        stopwatch: the measured time of training, which does not include drawing.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch, self._next = stopwatch, 0.0

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        if time.monotonic() >= self._next:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if state.is_world_process_zero and state.global_step > 0:
            start = time.monotonic()
            with self.stopwatch.paused(), progress("drawing curves and pictures"):
                self.draw(args, state)
            end = time.monotonic()
            self._next = end + 20 * (end - start)

    def draw(self, args, state) -> None:
        """Write the pictures to the output folder."""
        raise NotImplementedError(f"{type(self).__name__} must define draw")


class CurvesCallback(PictureCallback):
    """Draws the training curves, `curves.png`."""

    def draw(self, args, state) -> None:
        draw_curves(state.log_history, Path(args.output_dir) / CURVES)


class MethodPicturesCallback(PictureCallback):
    """Draws the pictures of a method (`SSLPreTrainedModel.pictures`) as `NAME.png`.

    Trackers receive these pictures. The first time, they also receive `views.png`.

    Args:
        stopwatch: see `PictureCallback`.
        model: the model; most methods have no pictures.
        images: the images in the pictures. Their augmentation and noise are always the same.
        preset: the augmentation settings, which are needed to convert normalized pixels to colors.
        callbacks: the callbacks of the trainer, which may contain trackers.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        model: SSLPreTrainedModel,
        images: LoadedBatch,
        preset: ViewPreset,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        super().__init__(stopwatch)
        self.model, self.images, self.preset, self.callbacks = model, images, preset, callbacks
        self._sent_views = False

    def draw(self, args, state) -> None:
        inputs = self.images.inputs(self.model.device, self.model.sample_masks)
        with evaluation_mode(self.model):
            pictures = self.model.pictures(inputs)
        files = [Path(args.output_dir) / f"{name}.png" for name in pictures]
        for file, tiles in zip(files, pictures.values(), strict=True):
            with replaced_file(file) as staging:
                montage(Views(tiles), self.preset, staging)
        views = Path(args.output_dir) / VIEWS
        if not self._sent_views and views.exists():
            files.append(views)
        self._sent_views = True
        for file in files:
            send_picture(self.callbacks, file, state.global_step)


def send_picture(callbacks: Iterable[TrainerCallback], file: Path, step: int) -> None:
    """Send a picture to the trackers among the callbacks: TensorBoard, W&B, Trackio and MLflow.

    Other trackers of transformers receive only numbers.

    Args:
        callbacks: the callbacks of a trainer.
        file: the picture, `NAME.png`. The trackers show it as NAME.
        step: completed optimizer steps.
    """
    for callback in callbacks:
        tracker, name = type(callback).__name__.removesuffix("Callback"), file.stem
        if tracker == "TensorBoard" and (writer := getattr(callback, "tb_writer", None)) is not None:
            pixels = np.asarray(PIL.Image.open(file).convert("RGB"))
            writer.add_image(name, pixels, step, dataformats="HWC")
        elif tracker in ("Wandb", "Trackio"):
            module = import_module(tracker.lower())
            module.log({name: module.Image(str(file)), "train/global_step": step})
        elif tracker == "MLflow":
            import_module("mlflow").log_image(PIL.Image.open(file), key=name, step=step)


class Interrupted(BaseException):
    """A signal arrived inside `StopOnSignal.interruptible`.

    This class is not an `Exception`, so that no handler of errors catches it.
    """


class StopOnSignal(TrainerCallback):
    """Stops training on SIGTERM or SIGINT (Ctrl-C).

    It finishes the training step and saves a checkpoint. It aborts a measurement of the monitor. A second
    signal stops the process immediately. Several processes stop together at the next logging step, because
    they wait for each other in every step.

    Attributes:
        received: the signal that arrived; None before the first signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interruptible = False
        self._previous: dict[signal.Signals, Any] = {}

    def exit_exception(self) -> BaseException:
        """Return the exception of the signal: SystemExit(143) or KeyboardInterrupt."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt()
        return SystemExit(128 + signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Interrupted` inside this block as soon as a signal arrives, if there is only one process."""
        if self.received is not None and process_count() == 1:
            raise Interrupted
        self._interruptible = process_count() == 1
        try:
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.received = signal.Signals(number)
            raise self.exit_exception()
        self.received = signal.Signals(number)
        stopping.set()
        if self._interruptible:
            self._interruptible = False
            raise Interrupted
        with suppress(OSError):  # os.write instead of print, because the signal may interrupt a print
            os.write(2, b"\nstopping after this step and a checkpoint; a second signal stops immediately\n")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.received = None
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:
                return  # outside the main thread (in some notebooks), Python cannot set handlers

    def on_step_end(self, args, state, control: TrainerControl, **kwargs) -> None:
        stop = self.received is not None
        if args.world_size > 1:
            if state.global_step % state.logging_steps:
                return
            stop = any_process(stop, args.device)
            if stop and self.received is None:
                self.received = signal.SIGTERM
        if stop:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_save(self, args, state, control: TrainerControl, **kwargs) -> None:
        if self.received is not None and args.world_size == 1:  # the signal arrived during saving
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the signal handlers from before training."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
