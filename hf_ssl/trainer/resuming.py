# SPDX-License-Identifier: Apache-2.0
"""Finds the newest checkpoint that a run can resume from: all files are there, and all weights
and the state of the optimizer are finite.
"""

import json
import logging
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from hf_ssl.errors import UserError
from hf_ssl.files import all_checkpoints, newest_checkpoint
from hf_ssl.modeling.finite import not_finite, tensors_in
from hf_ssl.modeling.image_trainer import missing_files
from hf_ssl.trainer.checkpoint_files import load_state
from hf_ssl.weight_files import not_finite_in

logger = logging.getLogger(__name__)

FIRST_DATA_STATE = "data_state_0.json"
_ONLY_FOR_TRAINING = (OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, "rng_state")


def usable_checkpoint(folder: Path) -> Path | None:
    """Return the newest usable checkpoint in the output folder of a run; None if it contains no checkpoint.

    If newer checkpoints are not usable, log a warning with the reason.

    Raises:
        UserError: the folder contains checkpoints, but none of them is usable.
        OSError: the folder cannot be read.
    """
    problems: dict[Path, str] = {}
    for checkpoint in reversed(all_checkpoints(folder)):
        problem = find_problem(checkpoint)
        if problem is None:
            for path, reason in problems.items():
                logger.warning("%s is not used, because it has %s; %s is used", path, reason, checkpoint.name)
            return checkpoint
        problems[checkpoint] = problem
    if not problems:
        return None
    (newest, reason), *others = problems.items()
    also = f"; {', '.join(path.name for path, _ in others)} cannot be used either" if others else ""
    raise UserError(
        f"training.output_dir: expected a checkpoint to resume from, got {newest} with {reason}{also}; "
        "delete the checkpoints to start the run again, or use another folder"
    )


def check_usable(checkpoint: Path) -> None:
    """Raise `UserError` if a run cannot resume from this checkpoint."""
    problem = find_problem(checkpoint)
    if problem is None:
        return
    others = [path for path in all_checkpoints(checkpoint.parent) if path != checkpoint]
    usable = next((path for path in reversed(others) if find_problem(path) is None), None)
    advice = "start the run again in another folder" if usable is None else f"use {usable}"
    raise UserError(
        f"checkpoint {checkpoint}: expected all files and finite weights, got {problem}; {advice}"
    )


def check_files(checkpoint: Path) -> None:
    """Raise `UserError` if a file is missing that further training needs."""
    missing = missing_files(checkpoint, FIRST_DATA_STATE)
    if missing:
        raise UserError(
            f"checkpoint {checkpoint}: expected all files for further training, got no {', '.join(missing)}; "
            "use another checkpoint, or start the run again in another folder"
        )


def find_problem(checkpoint: Path) -> str | None:
    """Return the reason why a run cannot resume from a checkpoint, or None.

    A checkpoint of the last step needs no state of the optimizer, because no training follows.
    """
    missing = missing_files(checkpoint, FIRST_DATA_STATE)
    if missing and is_last_step(checkpoint):
        missing = [name for name in missing if not name.startswith(_ONLY_FOR_TRAINING)]
    if missing:
        return f"no {', '.join(missing)}"
    name = not_finite_in(checkpoint)
    if name is None and not is_last_step(checkpoint):
        name = _not_finite_state(checkpoint / OPTIMIZER_NAME)
    return None if name is None else f"NaN or infinity in {name}"


def _not_finite_state(file: Path) -> str | None:
    """Return the name of the first number in the state of an optimizer that is not finite, or None.

    The result is also None for a damaged file, which raises an error when it is loaded.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError):
        return None
    return not_finite(tensors_in(state.get("state", {}), file.name)) if isinstance(state, dict) else None


def is_last_step(checkpoint: Path) -> bool:
    """Return whether the run was finished at this checkpoint; False if its state cannot be read."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return bool(state["global_step"] >= state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def lacks_measurement(checkpoint: str | Path, args: TrainingArguments) -> bool:
    """Return whether the monitor should have measured the step of a checkpoint, but a signal prevented it.

    Args:
        checkpoint: the checkpoint.
        args: the training arguments.
    """
    state = load_state(Path(checkpoint))
    step, epoch = state.global_step, state.epoch or 0.0
    if any(each.get("step") == step and any(map(_is_measurement, each)) for each in state.log_history):
        return False
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return epoch % 1 == 0 and epoch >= max(1, args.eval_delay)
    is_due = step >= state.max_steps or (state.eval_steps > 0 and step % state.eval_steps == 0)
    return args.eval_strategy == IntervalStrategy.STEPS and is_due and step >= args.eval_delay


def _is_measurement(name: str) -> bool:
    return name.startswith("eval_")


def last_good(folder: Path) -> str:
    """Return the end of a message about a diverged run. It names the last good checkpoint in the folder."""
    good = next((path for path in reversed(all_checkpoints(folder)) if find_problem(path) is None), None)
    found = "there is no good checkpoint"
    if good is not None:
        found = f"the last good checkpoint is {good}, of step {good.name.rpartition('-')[2]}"
    return (
        f"{found}; lower training.learning_rate or raise training.warmup_epochs, and start again in another "
        "folder"
    )


def set_aside_later(first: Path, output_dir: Path) -> None:
    """Rename the checkpoints after the one that a run resumes from, which belong to an abandoned run.

    Otherwise, `save_total_limit` would delete new checkpoints instead of the abandoned ones. The run would
    also resume from an abandoned checkpoint after an interruption.
    """
    if first.parent.resolve() != output_dir.resolve():
        return
    while (later := newest_checkpoint(first.parent)) is not None and later.name != first.name:
        aside = later.with_name(f"abandoned-{later.name}")
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)
        logger.warning("%s is from another continuation of %s; it is now %s", later, first.name, aside.name)
