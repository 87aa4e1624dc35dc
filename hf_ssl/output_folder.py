# SPDX-License-Identifier: Apache-2.0
"""Checks and marks the output folder of a run, and finds its last checkpoint and its choices (layer 5)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_ssl.data import DataConfig
from hf_ssl.data.own_folders import RUN_MARK
from hf_ssl.effects import WEIGHTS, effect
from hf_ssl.errors import UserError
from hf_ssl.files import (
    RUN_LOCK,
    check_new_or_empty,
    disk_errors_as_user_errors,
    read_json,
    remove_incomplete,
    write_json,
)
from hf_ssl.modeling.lars import LARSConfig
from hf_ssl.names import with_current_keys
from hf_ssl.precision import AUTO
from hf_ssl.recipe import Recipe
from hf_ssl.sections import default_values
from hf_ssl.trainer.checkpoint_files import load_state
from hf_ssl.trainer.machine_settings import Choices
from hf_ssl.trainer.resuming import usable_checkpoint
from hf_ssl.views.preset import ViewPreset

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_CHOICES, _REVISION = "choices", "data_revision"
IDENTITY = RUN_MARK  # is never published, because it contains the path of the data

_LENGTH_KEYS = ("max_steps", "num_train_epochs")


def last_checkpoint(recipe: Recipe) -> Path | None:
    """Return the last usable checkpoint in the recipe's output folder; None for a new run.

    This function writes no files.

    Raises:
        UserError: the folder contains another run, contains other files, cannot be read, or none of its
            checkpoints is usable.
    """
    folder = recipe.output_dir
    mark = folder / IDENTITY
    try:
        if mark.exists():
            now = recipe.to_dict()
            _compare(_in_current_format(read_json(mark), now), now, folder)
            return usable_checkpoint(folder)
    except OSError as error:
        raise UserError(
            f"training.output_dir: expected a readable folder, got {folder}: {error.strerror}"
        ) from error
    check_new_or_empty(folder, "training.output_dir", " or a run of hf_ssl")
    return None


def stored_choices(recipe: Recipe) -> Choices:
    """Return the settings that the run in the recipe's output folder chose for its machine."""
    return _in_current_format(read_json(recipe.output_dir / IDENTITY), recipe.to_dict())[_CHOICES]


def stored_revision(recipe: Recipe) -> str | None:
    """Return the revision of the images of the run in the recipe's output folder.

    The result is None for a run of an older version, which did not store it.
    """
    return read_json(recipe.output_dir / IDENTITY).get(_REVISION)


@contextmanager
def only_command(folder: Path) -> Iterator[None]:
    """Lock the output folder during the block, so that two commands do not mix their checkpoints.

    The operating system releases the lock when the process ends, also after `kill -9`. Child processes do not
    inherit a lock of `lockf`. With `flock`, the workers of the data loader would keep it for some seconds. On
    a file system without locks, the block runs without a lock. The package filelock (4.3) would create a file
    there that stays after `kill -9`, so the run could not resume.

    Raises:
        UserError: another command trains in the folder, or the folder cannot be written.
    """
    file = folder / RUN_LOCK
    with disk_errors_as_user_errors(f"training.output_dir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        opened = file.open("w")
    with opened:
        try:
            if fcntl is not None:
                fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"training.output_dir: expected a folder that no other command uses, got {folder}, in which "
                "another command trains; wait until it ends, or use another folder"
            ) from error
        except OSError as error:
            logger.info("%s is not locked: %s", folder, error)
        try:
            yield
        finally:
            opened.close()  # Windows cannot delete an open file
            file.unlink(missing_ok=True)


def mark_output_folder(recipe: Recipe, choices: Choices, revision: str) -> None:
    """Mark the output folder as that of this recipe, and remove incomplete files of a killed process.

    Args:
        recipe: the recipe of the run.
        choices: the choices for the machine, which `stored_choices` returns later.
        revision: the revision of the images, which `stored_revision` returns later.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = recipe.output_dir
    with disk_errors_as_user_errors(f"training.output_dir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(folder)
        write_json(folder / IDENTITY, {**recipe.to_dict(), _CHOICES: choices, _REVISION: revision})


def is_finished(checkpoint: Path) -> bool:
    """Return whether the run was finished when this checkpoint was saved."""
    state = load_state(checkpoint)
    return state.global_step >= state.max_steps


def _in_current_format(run: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `_run.json` in the form of this version.

    Older versions made no choices for the machine. Their recipes set `bf16` and `dataloader_num_workers`. The
    defaults were float32 and 0. If the current recipe has `auto`, the run keeps its earlier values.
    """
    training = with_current_keys(run.get("training", {}))
    if "lars" in training:  # older versions stored only the values that were set
        training["lars"] = asdict(LARSConfig(**training["lars"]))
    # A run of a version without a setting had what is the default now.
    run = {**run, "training": training}
    for section, cls in (("data", DataConfig), ("views", ViewPreset)):
        run[section] = default_values(cls) | run.get(section, {})
    if _CHOICES in run:
        return run
    had, given = dict(run["training"]), now["training"]
    values = {
        "precision": "bfloat16" if had.get("bf16") else "float16" if had.get("fp16") else "float32",
        "dataloader_num_workers": had.get("dataloader_num_workers", 0),
    }
    choices: Choices = {}
    for name, value in values.items():
        keys = {name, "bf16", "fp16"} if name == "precision" else {name}
        if given.get(name, AUTO) not in (AUTO, value) or any(map(given.get, keys - {name})):
            continue
        had = {key: old for key, old in had.items() if key not in keys}
        had |= {key: given[key] for key in keys & given.keys()}
        if given.get(name, AUTO) == AUTO:
            choices[f"training.{name}"] = {"value": value, "reason": "the run started with it"}
    return {**run, "training": had, _CHOICES: choices}


def _compare(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise `UserError` if a value that affects the weights differs."""
    for section, values in now.items():
        if effect(section) != WEIGHTS:
            continue
        values, earlier = _flat(values), _flat(before.get(section, {}))
        for key in sorted(values.keys() | earlier.keys(), key=lambda key: (key != "name", key)):
            if effect(f"{section}.{key}") != WEIGHTS:
                continue
            if values.get(key) != earlier.get(key):
                was, is_now = (
                    "not set" if value is None else value for value in (earlier.get(key), values.get(key))
                )
                advice = "use another folder"
                if key in _LENGTH_KEYS:
                    advice += " (the schedule of the learning rate depends on the length of the run)"
                raise UserError(
                    f"training.output_dir: expected an empty folder or the same run, got {folder}, where "
                    f"{section}.{key} was {was} and is now {is_now}; {advice}"
                )


def _flat(section: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a section with one key for each value of a group, e.g. "lars.variant"."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat
