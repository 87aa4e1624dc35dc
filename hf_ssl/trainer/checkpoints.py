# SPDX-License-Identifier: Apache-2.0
"""Saves complete checkpoints and resumes from them, also in the middle of an epoch."""

import inspect
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import transformers.trainer
from accelerate import skip_first_batches
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from hf_ssl.cards import environment
from hf_ssl.data import BrokenCounter, Source
from hf_ssl.data.batch import ProcessShare
from hf_ssl.data.loader import MapLoader
from hf_ssl.data.stream_loader import StreamLoader
from hf_ssl.errors import UserError, first_line
from hf_ssl.files import (
    delete_old_checkpoints,
    disk_errors_as_user_errors,
    newest_checkpoint,
    staging_path,
    use_normal_permissions,
)
from hf_ssl.modeling.finite import not_finite_training
from hf_ssl.modeling.gather import from_every_process, wait_for_all
from hf_ssl.modeling.image_trainer import list_files
from hf_ssl.precision import ACCELERATE
from hf_ssl.progress import progress
from hf_ssl.trainer.checkpoint_files import data_state_name, load_data_state, load_state, readable
from hf_ssl.trainer.logs import Stopwatch
from hf_ssl.trainer.online_probe import OnlineProbe
from hf_ssl.trainer.optimizers import GROUP_ARGUMENTS, OptimizingTrainer
from hf_ssl.trainer.resuming import (
    check_files,
    check_usable,
    lacks_measurement,
    last_good,
    set_aside_later,
    usable_checkpoint,
)
from hf_ssl.trainer.transformers_arguments import as_bool

_NO_SETTINGS = ("params", "lr", "last_epoch", "foreach", "fused", "capturable", "differentiable")
"""Arguments of optimizers and schedules that do not change the result, or change in each step."""
logger = logging.getLogger(__name__)


class CheckpointTrainer(OptimizingTrainer):
    """The part of `SSLTrainer` that saves and loads checkpoints.

    The trainer writes a checkpoint to a temporary folder and renames this folder at the end. So a killed
    process leaves only complete checkpoints.

    Attributes:
        stopwatch: the time of training.
        broken: the images that could not be read.
        resumed: how many times the run was resumed.
        machine: `machine_of_training()` of a finished run that was loaded; None: this process trains.
    """

    machine: dict[str, Any] | None = None
    _earlier: tuple[dict[str, Any], ...] = ()  # machines before this one, see `machine_of_training`
    _resumed_metric: str | None = None
    _written: frozenset[Path] = frozenset()  # checkpoints of this call of `train`
    stopwatch: Stopwatch
    broken: BrokenCounter
    resumed: int
    images_seen: int
    online_probe: OnlineProbe | None
    source: Source
    _position: dict[str, Any] | None  # of a stream
    _resumed_step: int | None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.stopwatch.paused():
            with progress(f"saving checkpoint-{self.state.global_step}"):
                folder = self._write_checkpoint()
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder))

    def _batches_before(self, step: int) -> int:
        """Return the number of micro-batches of this process before an optimizer step.

        The last step of an epoch may have fewer than `gradient_accumulation_steps` micro-batches.
        """
        rows, accumulated = self.source.num_rows, self.args.gradient_accumulation_steps
        if rows is None:
            return step * accumulated
        share = ProcessShare(0, self.args.per_device_train_batch_size, world_size=self.args.world_size)
        in_an_epoch = share.batches(rows)
        epochs, steps = divmod(step, math.ceil(in_an_epoch / accumulated))
        return epochs * in_an_epoch + steps * accumulated

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save each new best model if it is loaded at the end, also between two saved steps.

        transformers (5.20 to 5.24) loads nothing if the best step is not a saved one.
        """
        if self._resumed_metric not in (None, self.args.metric_for_best_model):
            logger.warning(
                "training.metric_for_best_model: the best model of the checkpoint does not count, because %s "
                "selected it", self._resumed_metric
            )  # fmt: skip
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self._resumed_metric = None
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _write_checkpoint(self) -> Path:
        """Write `checkpoint-<step>`: model, optimizer, schedule, random states and position in the data.

        A checkpoint of an earlier run with the same step is replaced.

        Returns:
            The folder. Nothing happens if this call of `train` has written it already.

        Raises:
            UserError: the disk is full or not writable, or a weight is not finite. Earlier checkpoints stay.
        """
        root, step, writes = Path(str(self.args.output_dir)), self.state.global_step, self.args.should_save
        self.use_averaged_weights(True)
        final = root / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        staging = staging_path(final)
        if final in self._written:
            return final
        self.check_finite()
        with _complete_or_removed(final, staging if writes else None):
            if writes:  # of a process that was killed
                shutil.rmtree(staging, ignore_errors=True)
            wait_for_all()
            staging.mkdir(parents=True, exist_ok=True)
            self.save_model(str(staging), _internal_call=True)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            (staging / data_state_name(self.args.process_index)).write_text(json.dumps(self.data_state()))
            self._record_state(root)  # every process loads the best checkpoint at the end
            if writes:
                if self.online_probe is not None:
                    self.online_probe.save(staging)
                use_normal_permissions(staging)
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            wait_for_all()
            if writes:
                list_files(staging)
                shutil.rmtree(final, ignore_errors=True)
                staging.rename(final)
        self._written |= {final}
        if writes:
            best = self.state.best_model_checkpoint
            delete_old_checkpoints(root, self.args.save_total_limit, None if best is None else Path(best))
        return final

    def check_finite(self) -> None:
        """Switch to the averaged weights, and check all weights, buffers and the state of the optimizer.

        The weights and buffers are also those of teachers and memory.

        A loss that is not finite is noticed only when it is logged, and the weights may be saved before.

        Raises:
            UserError: a number is not finite, on this or on another process. All processes raise this error.
        """
        self.use_averaged_weights(True)
        found = from_every_process(not_finite_training(self.method, self.optimizer))
        name = next((each for each in found if each is not None), None)
        if name is not None:
            raise UserError(
                f"weights: expected finite numbers at step {self.state.global_step}, got NaN or infinity in "
                f"{name}; {self.advice_after_divergence()}"
            )

    def advice_after_divergence(self) -> str:
        """Return the end of the message about a diverged run."""
        return last_good(Path(str(self.args.output_dir)))

    def _record_state(self, root: Path) -> None:
        """Store the best checkpoint and the state of the callbacks in `self.state`."""
        state = self.state
        if state.best_global_step:
            best = root / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best.exists() or state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(best)
        by_name: dict[str, list[dict]] = {}
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                by_name.setdefault(type(part).__name__, []).append(part.state())
        exported: Any = {name: states if len(states) > 1 else states[0] for name, states in by_name.items()}
        state.stateful_callbacks = exported

    def data_state(self) -> dict[str, Any]:
        """Return the state of this process besides the model, as JSON data.

        It contains the position of a stream, the broken images found so far, the seconds of training, how
        many times the run was resumed, the number of processed images of all processes, and the machine.
        """
        return {
            "position": self._position,
            "broken": self.broken.state_dict(),
            "seconds": self.stopwatch.seconds,
            "resumed": self.resumed,
            "images_seen": self.images_seen,
            "metric_for_best_model": self.args.metric_for_best_model,
            "machine": self.machine_of_training(),
        }

    def machine_of_training(self) -> dict[str, Any]:
        """Return software and hardware, precision, and number of processes of the last part of the training.

        "earlier" has those of earlier parts, if they differ, with "last_step" of each part.
        If the command of a finished run is repeated, also on another machine, these facts stay the same.
        """
        return self.machine or self._this_machine() | {"earlier": list(self._earlier)}

    def _this_machine(self) -> dict[str, Any]:
        return {
            "environment": environment(self.args.device, self.args.world_size),
            "precision": ACCELERATE[self.accelerator.mixed_precision],
            "processes": self.args.world_size,
        }

    def load_finished(self, checkpoint: Path) -> None:
        """Load the weights and the state of a finished run, as at its end."""
        self._load_from_checkpoint(str(checkpoint))
        self.resumed -= 1  # loading counted a resumed run, but no training follows
        # Older versions did not store the machine.
        self.machine = load_data_state(checkpoint, self.args.process_index).get("machine")
        self.state = load_state(checkpoint)
        if lacks_measurement(checkpoint, self.args):
            self._determine_best_metric(self.evaluate(), None)
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = checkpoint.parent / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)  # the folder of the run can have another name now
            self._load_best_model()

    def finished_output(self, resume_from_checkpoint: str | bool) -> TrainOutput | None:
        """Load a checkpoint of the last step, and return the result of `train`; None if steps are left.

        If steps are left, checkpoints of later steps in the same folder become `abandoned-checkpoint-N`.

        transformers (5.20 to 5.24) makes a further step if the last step is inside an epoch.
        """
        folder = None if resume_from_checkpoint is True else resume_from_checkpoint
        if not folder:
            return None
        total = self.args.max_steps
        if total <= 0:
            total = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if load_state(Path(folder)).global_step != total:
            if self.args.should_save:
                set_aside_later(Path(folder), Path(str(self.args.output_dir)))
            return None
        self.load_finished(Path(folder))
        return TrainOutput(self.state.global_step, 0.0, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_data_state(Path(resume_from_checkpoint), self.args.process_index)
        self.broken.load_state_dict(state["broken"])
        self._position = state["position"]
        self._resumed_step = load_state(Path(resume_from_checkpoint)).global_step
        self.stopwatch.restore(state["seconds"])
        self.resumed = state["resumed"] + 1
        images = self._batches_before(self._resumed_step) * self.args.batch_size
        # Older versions did not count the images.
        self.images_seen = state.get("images_seen", images // self.args.gradient_accumulation_steps)
        self._resumed_metric = state.get("metric_for_best_model")
        before = dict(state.get("machine") or {})  # older versions did not store the machine
        self._earlier = tuple(before.pop("earlier", ()))
        if before and before != self._this_machine():
            self._earlier += (before | {"last_step": self._resumed_step},)
        with readable(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.online_probe is not None:
                self.online_probe.load(Path(resume_from_checkpoint), self.args.device)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Also raise `UserError` if the checkpoint has more steps than the run."""
        self._written = frozenset()
        numbers = super().set_initial_training_values(args, dataloader)
        if self._resumed_step is not None and numbers[-1] < self._resumed_step:
            raise UserError(
                f"training.max_steps: expected at least {self._resumed_step}, as in the checkpoint, got "
                f"{numbers[-1]}; use an earlier checkpoint"
            )
        return numbers

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        check_files(Path(checkpoint))
        optimizer = cast(Optimizer, self.optimizer)
        own = inspect.signature(type(getattr(optimizer, "optimizer", optimizer))).parameters
        before, schedule = [dict(group) for group in optimizer.param_groups], dict(vars(self.lr_scheduler))
        with readable(Path(checkpoint)):
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
                groups = list(zip(before, optimizer.param_groups, strict=True))
                if any(old.keys() - new.keys() for old, new in groups):
                    raise ValueError("the optimizer differs")
            except ValueError as error:
                raise UserError(
                    "training.optimizer: expected the optimizer and the parameter groups of the checkpoint, "
                    f"got others ({first_line(error)}); resume with the arguments of the run (optimizer, "
                    "layer_decay, head_warmup_epochs, decay_all_parameters)"
                ) from error
        for key in dict.fromkeys([*GROUP_ARGUMENTS, *(name for name in own if name not in _NO_SETTINGS)]):
            if key == "weight_decay" and self.args.weight_decay_end is not None:
                continue
            kept = [new[key] for old, new in groups if key in new and old.get(key) != new[key]]
            names = GROUP_ARGUMENTS.get(key, (f"optim_args, {key}",))
            _report_kept(", training.".join(names), kept)
        for key in inspect.signature(type(self.lr_scheduler)).parameters:
            value = vars(self.lr_scheduler).get(key)
            if isinstance(value, int | float | str) and key not in _NO_SETTINGS and value != schedule[key]:
                _report_kept(f"lr_scheduler_kwargs, {key}", [value])


def _report_kept(name: str, kept: list[Any]) -> None:
    """Log the settings of a checkpoint that replace other ones of the training arguments."""
    if kept:
        values = ", ".join(map(str, dict.fromkeys(kept)))
        logger.warning("training.%s: the run keeps the value of the checkpoint: %s", name, values)


def checkpoint_to_resume(given: Any, args: TrainingArguments) -> Any:
    """Return the checkpoint that a run resumes from: its folder, or False. True means that there is none.

    Args:
        given: the argument of `train`; None uses `args.resume_from_checkpoint`.
        args: the training arguments.

    Raises:
        UserError: the value is neither the folder of a checkpoint nor a boolean, or the checkpoint has not
            all files that a save writes, or weights that are not finite.
    """
    given = as_bool(args.resume_from_checkpoint if given is None else given)
    if given is True:
        newest = usable_checkpoint(Path(str(args.output_dir)))
        wait_for_all()  # no process may rename checkpoints before all have read the folder
        return True if newest is None else str(newest)
    if not given:
        return False
    if not isinstance(given, str | PathLike) or not (Path(given) / TRAINER_STATE_NAME).is_file():
        raise UserError(
            f"resume_from_checkpoint: expected the folder of a checkpoint, got {given}; use "
            f"{newest_checkpoint(Path(str(args.output_dir))) or 'false'}"
        )
    if Path(given).resolve().parent != Path(str(args.output_dir)).resolve():
        check_no_checkpoints(args)
    check_usable(Path(given))
    return str(given)


def check_no_checkpoints(args: TrainingArguments) -> None:
    """Raise `UserError` if a new run would save its checkpoints beside those of an earlier run."""
    earlier = newest_checkpoint(Path(str(args.output_dir)))
    if earlier is not None and args.save_strategy != SaveStrategy.NO:
        raise UserError(
            f"training.output_dir: expected a folder without checkpoints for a new run, got {earlier}; "
            "use another folder, delete the checkpoints, or continue an unfinished run with "
            "train(resume_from_checkpoint=True)"
        )


@contextmanager
def keep_loader_position() -> Iterator[None]:
    """Make transformers' Trainer count the batches before the checkpoint without reading them.

    To resume, the Trainer (5.20 to 5.24) calls accelerate's `skip_first_batches`. That function builds a
    plain DataLoader from the data set and the batch sampler of our loader. The plain DataLoader does not hold
    the images of `data.cache=device`, and it reads a stream from the beginning. Our loaders already have a
    start position, so the replaced function returns the loader unchanged.

    `ignore_data_skip=True` would also avoid the call. But then the Trainer counts the first batch after the
    checkpoint as the first batch of the epoch. So it would not recognize the end of an epoch whose last
    step has fewer micro-batches.
    """
    original = transformers.trainer.skip_first_batches
    transformers.trainer.skip_first_batches = _return_unchanged
    try:
        yield
    finally:
        transformers.trainer.skip_first_batches = original


def _return_unchanged(loader: Any, num_batches: int = 0) -> Any:
    """Return our loader unchanged; it starts after the batches of the earlier part of the run."""
    if isinstance(loader, MapLoader | StreamLoader):
        return loader
    return skip_first_batches(loader, num_batches)  # a loader that the user defined


@contextmanager
def _complete_or_removed(final: Path, staging: Path | None) -> Iterator[None]:
    """Remove the incomplete folder if the block raises; errors of the disk become a UserError."""
    with disk_errors_as_user_errors(f"{final.name} to {final.parent}"):
        try:
            yield
        except BaseException:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            raise
