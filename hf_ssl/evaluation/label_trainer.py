# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for protocols that train with labels and make their own batches (layer 1)."""

import hashlib
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from filelock import FileLock, Timeout
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MOMENTUM
from hf_ssl.files import all_checkpoints, disk_errors_as_user_errors
from hf_ssl.modeling.eval_mode import unchanged_random_state
from hf_ssl.modeling.gather import from_every_process, process_count, process_rank
from hf_ssl.modeling.image_trainer import (
    CONTENTS,
    ImageTrainer,
    list_files,
    missing_files,
    save_for_trainer,
)

logger = logging.getLogger(__name__)

# A learning rate that suits one of them changes the weights by too much or too little with the other.
OPTIMIZERS = {"sgd": "0.01", "adamw": "1e-4"}
"""Name of an optimizer -> a learning rate to begin with, for messages."""
BETAS = (0.9, 0.999)
_FIRST_WAIT = 0.1  # seconds until a message appears
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_rate(where: str, key: str, rate: Any, optimizer: str | None, recipe: str, published: str) -> None:
    """Raise UserError if a setting changes the optimizer of a recipe, but not its learning rate.

    Args:
        where: the section of the settings.
        key, rate: name and value of the setting of the learning rate; None: that of the recipe.
        optimizer: the optimizer of the settings; None: that of the recipe.
        recipe, published: name of the recipe, and its optimizer.
    """
    if rate is None and optimizer not in (None, published):
        value = f"[{OPTIMIZERS[str(optimizer)]}]" if key.endswith("s") else OPTIMIZERS[str(optimizer)]
        raise UserError(
            f"{where}.{key}: expected a learning rate for {optimizer}, because the rate of recipe {recipe} "
            f"is for {published}, got null; add, for example, {where}.{key}={value}"
        )


def training_folder(
    folder: str | None,
    protocol: str,
    settings: Any,
    model: torch.nn.Module,
    images: Any,
    labels: Iterable[Any],
) -> Path | None:
    """Return the folder of a training, whose name contains a hash of everything that determines its result.

    Args:
        folder: the folder of all trainings; None: no checkpoints.
        protocol: name of the protocol.
        settings: all settings of the training, also those of the images, as values with a `repr`.
        model: the model with its initial weights.
        images: the training images, which `read(rows)` returns. Their `fingerprint` is hashed. Data sets in
            Python have none, and at most 16 of M images are hashed.
        labels: arrays, of which the first one contains the M row numbers of the training.
    """
    if folder is None:
        return None
    config = getattr(model, "config", None)
    described = None if config is None else _without_place(config.to_dict())
    parts = (settings, getattr(images, "fingerprint", None), described)
    digest = hashlib.sha256(repr(parts).encode())
    rows, *others = labels
    sample = rows[np.unique(np.linspace(0, len(rows) - 1, min(16, len(rows))).astype(int))]
    pixels = [image.cpu().numpy() for image in images.read(sample)]
    weights = [each.cpu().numpy() for each in model.state_dict().values()]
    for array in (rows, *others, *pixels, *weights):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return Path(folder).expanduser() / f"{protocol}-{digest.hexdigest()[:16]}"


def _without_place(config: Any) -> Any:
    """Return a configuration without the folder from which it was loaded.

    A classifier of transformers is loaded from a temporary folder, whose name differs in each process.
    """
    if isinstance(config, dict):
        return {key: _without_place(value) for key, value in config.items() if key != "_name_or_path"}
    return config


@contextmanager
def training_arguments(
    *,
    folder: Path | None,
    epochs: int,
    batch_size: int,
    warmup_steps: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[TrainingArguments]:
    """Yield the arguments of a training. The training must run inside the `with` block.

    At the end of the block, all global random states and the state of accelerate are restored.

    Args:
        folder: folder for one checkpoint per epoch; None: no checkpoints.
        epochs: number of epochs.
        warmup_steps: number of steps in which the learning rate rises from zero. It then decays to zero along
            a cosine.
        batch_size: number of images in a batch of all processes.
        seed: seed of the global random states during training.
        device: device of the computation.
        dtype: precision of autocast; None: float32.

    Raises:
        UserError: the folder cannot be made.
    """
    with (
        _own_random_state(device),
        _own_accelerate_state(),
        _one_process_unless_joined(),
        tempfile.TemporaryDirectory() as unused,
    ):
        args = TrainingArguments(
            output_dir=str(folder or unused),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,  # the loader, not this number, sets the batches
            lr_scheduler_type="cosine",
            warmup_steps=warmup_steps,
            max_grad_norm=0.0,
            seed=seed,
            use_cpu=device.type == "cpu",
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16 and device.type != "cpu",
            save_strategy="no" if folder is None else "epoch",
            save_total_limit=2,  # the older one is complete while the newer one is written
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_broadcast_buffers=False,
        )
        # Instead of float32, transformers (5.24) would use `accelerate launch --mixed_precision`.
        args.mixed_precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        _ = args.device  # determines the number of GPUs
        args._n_gpu = min(args.n_gpu, 1)  # one process computes on one GPU
        with disk_errors_as_user_errors(f"checkpoints to {args.output_dir}"):
            Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            yield args


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """Wait until no other command makes the same training, whose checkpoints are in the same folder.

    The training then continues from the last checkpoint of the other one, so its result is the same. The
    processes of one command share one lock, which the first one holds.
    """
    if folder is None or process_rank() > 0:
        yield
        return
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=_FIRST_WAIT)
    except Timeout:
        logger.warning("waiting for another command, which makes the same training in %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class LabelTrainer(ImageTrainer):
    """transformers' Trainer with the batches and the learning rates of a protocol.

    Args:
        model: the model.
        args: arguments of `training_arguments`.
        loader: the batches of this process.
        optimizer: a name of `OPTIMIZERS`.
        groups: parameter groups of the optimizer.
        advance: called with 1 after each epoch.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        loader: Any,
        optimizer: str,
        groups: list[dict[str, Any]],
        advance: Callable[[int], object],
    ) -> None:
        super().__init__(model, args)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Advance(advance))
        self._loader, self._optimizer_name, self._groups = loader, optimizer, groups

    def run(self, folder: Path | None) -> None:
        """Train. If the folder contains a complete checkpoint, resume from the newest one."""
        checkpoint = None if folder is None else _newest_complete(folder)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def get_train_dataloader(self) -> Any:
        """Return the loader itself. The Trainer would return one that accelerate changed."""
        return self._loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, None]:
        """Return the next batches. The loss needs no number of items."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer of the settings."""
        if self.optimizer is None:
            if self._optimizer_name == "sgd":
                self.optimizer = SGD(self._groups, lr=1.0, momentum=MOMENTUM, nesterov=True)
            else:
                self.optimizer = AdamW(self._groups, lr=1.0, betas=BETAS)
        return self.optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # a FeatureClassifier or a detector
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_for_trainer(model, str(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint. If one process cannot write it, all processes raise UserError.

        Otherwise, the others would continue, and wait for this process.
        """
        root, problem = Path(str(self.args.output_dir)), None
        try:
            with disk_errors_as_user_errors(f"checkpoints to {root}"):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    # Last, because the Trainer does not write its files atomically.
                    list_files(root / f"checkpoint-{self.state.global_step}")
        except UserError as error:
            problem = str(error)
        problems = [text for text in from_every_process(problem) if text is not None]
        if problems:
            raise UserError(problems[0])


def _newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint with all its files, or None. Log a warning for each newer one."""
    for checkpoint in reversed(all_checkpoints(folder)):
        if (checkpoint / CONTENTS).exists():
            missing = missing_files(checkpoint)
            if not missing:
                return checkpoint
            logger.warning("%s is not used, because it has no %s", checkpoint, ", ".join(missing))
    return None


class _Advance(TrainerCallback):
    """Updates a progress bar after each epoch."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.advance = advance

    def on_epoch_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.advance(1)


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Restore all global random states after the block, because the Trainer seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    with unchanged_random_state(device):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """Restore the state of accelerate at the end of the block.

    All accelerators of a process share one state. Each `TrainingArguments` (transformers 5.24) replaces it.
    Without this function, the Trainer of the pretraining would then use the precision of the protocol.
    """
    kinds = (PartialState, AcceleratorState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    try:
        yield
    finally:
        for kind, values in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(values)


@contextmanager
def _one_process_unless_joined() -> Iterator[None]:
    """Hide the environment variables of a launcher if this process has not joined the others.

    After a pretraining under torchrun, only the main process evaluates. With these variables, the Trainer
    would wait for processes that do not train.
    """
    hidden = (
        {} if process_count() > 1 else {key: os.environ.pop(key) for key in _LAUNCHER if key in os.environ}
    )
    try:
        yield
    finally:
        os.environ.update(hidden)
