# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a checkpoint. A damaged or missing file is an error of one sentence."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from hf_ssl.errors import UserError, first_line, one_line


@contextmanager
def readable(checkpoint: Path, expected: str = "readable files") -> Iterator[None]:
    """Turn the errors of a damaged or foreign file into a `UserError` that names the checkpoint."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {checkpoint}: expected {expected}, got no {Path(str(error.filename)).name}; use a "
            "checkpoint of SSLTrainer"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, UnpicklingError) as error:
        if "loading state_dict" in str(error):
            raise UserError(
                f"checkpoint {checkpoint}: expected the weights of this model, got {one_line(error)[:300]}; "
                "resume with the model of the run"
            ) from error
        raise UserError(
            f"checkpoint {checkpoint}: expected {expected}, got {first_line(error)}; remove the "
            "checkpoint, and the run resumes from the one before it"
        ) from error


def load_state(checkpoint: Path) -> TrainerState:
    """Return the state of transformers' Trainer in a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    with readable(checkpoint, f"JSON in {TRAINER_STATE_NAME}"):
        return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def load_data_state(checkpoint: Path, process_index: int) -> dict[str, Any]:
    """Return the `data_state()` of this process in a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = checkpoint / data_state_name(process_index)
    if not path.exists():  # the run had fewer processes; the state of the first one is the nearest
        path = checkpoint / data_state_name(0)
    with readable(checkpoint, f"JSON in {path.name}"):
        return json.loads(path.read_text())


def data_state_name(process_index: int) -> str:
    """Return the name of the file with the `data_state()` of a process."""
    return f"data_state_{process_index}.json"
