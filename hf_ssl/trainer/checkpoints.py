# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_ssl.errors import UserError
from hf_ssl.files import disk_errors, staging_path, use_normal_permissions
from hf_ssl.modeling.gather import wait_for_all

if TYPE_CHECKING:
    from hf_ssl.trainer.trainer import SSLTrainer


def save_checkpoint(trainer: SSLTrainer) -> Path:
    """Write `checkpoint-<step>` with all that resuming needs: model, optimiser, schedule, random states,
    data position. Returns the folder, which may have been there before.

    Raises:
        UserError: the disk is full or may not be written; nothing half-written is left, earlier checkpoints
        stay.
    """
    root = Path(str(trainer.args.output_dir))
    step = trainer.state.global_step
    final = root / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    staging = staging_path(final)
    if final.exists():
        return final
    with _complete_or_removed(final, staging if trainer.args.should_save else None):
        staging.mkdir(parents=True, exist_ok=True)
        trainer.save_model(str(staging), _internal_call=True)
        trainer._save_optimizer_and_scheduler(str(staging))
        trainer._save_scaler(str(staging))
        trainer._save_rng_state(str(staging))
        (staging / _data_state_name(trainer.args.process_index)).write_text(json.dumps(trainer.data_state()))
        if trainer.args.should_save:
            use_normal_permissions(staging)
            _record_state(trainer, root, step)
            trainer.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        wait_for_all()
        if trainer.args.should_save:
            staging.rename(final)
    if trainer.args.should_save:
        rotate_checkpoints(
            str(root), trainer.args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=False
        )
    return final


@contextmanager
def _complete_or_removed(final: Path, staging: Path | None) -> Iterator[None]:
    """Remove the incomplete folder if the block raises; errors of the disk become a UserError."""
    with disk_errors(f"{final.name} to {final.parent}"):
        try:
            yield
        except BaseException:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into a `UserError` that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {checkpoint} cannot be read ({reason}): remove it, and the run goes on from the one "
            "before it"
        ) from error


def load_data_state(checkpoint: Path, process_index: int) -> dict[str, Any]:
    """What `trainer.data_state()` was on this process when the checkpoint was written.

    Raises:
        UserError: the file is missing or no JSON.
    """
    path = checkpoint / _data_state_name(process_index)
    if not path.exists():  # another number of processes: any rank's state is the nearest there is
        path = checkpoint / _data_state_name(0)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be resumed: {path.name} is missing or unreadable"
        ) from error


def _record_state(trainer: SSLTrainer, root: Path, step: int) -> None:
    state = trainer.state
    if state.best_global_step:
        best = root / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best.exists() or state.best_global_step == step:
            state.best_model_checkpoint = str(best)
    by_name: dict[str, list[dict]] = {}
    for part in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(part, ExportableState):
            by_name.setdefault(type(part).__name__, []).append(part.state())
    exported: Any = {name: states if len(states) > 1 else states[0] for name, states in by_name.items()}
    state.stateful_callbacks = exported


def _data_state_name(process_index: int) -> str:
    return f"data_state_{process_index}.json"
