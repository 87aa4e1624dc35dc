# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for models of images: the base class of all trainers of hf_ssl (layer 1)."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ssl.errors import UserError
from hf_ssl.files import read_json, write_json

CONTENTS = "complete"
"""Last file of a checkpoint, with the names of all other files. Older versions wrote no names."""
_USUAL = (
    (TRAINER_STATE_NAME,),
    (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
    (OPTIMIZER_NAME,),
    (SCHEDULER_NAME,),
    ("rng_state.pth", "rng_state_0.pth"),
)
"""Files of every checkpoint of transformers' Trainer, each with its other name."""


class ImageTrainer(Trainer):
    """transformers' Trainer without its work for language models, and with strict checkpoints."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0. The estimate of transformers is for language models."""
        return 0

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise UserError(
                f"checkpoint: expected the weights of this model, got missing keys "
                f"{load_result.missing_keys[:3]} and unexpected keys {load_result.unexpected_keys[:3]}; use "
                "the model of the checkpoint, or another folder"
            )


def list_files(checkpoint: Path) -> None:
    """Write the names of all files of a checkpoint to its file `CONTENTS`."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / CONTENTS, sorted(name for name in names if name != CONTENTS))


def missing_files(checkpoint: Path, *further: str) -> list[str]:
    """Return the names of the files that a checkpoint lacks.

    transformers' Trainer (5.20 to 5.24) resumes without an error if the state of the optimizer, of the
    schedule or of the random numbers is missing. The weights would then differ from those of a whole run.

    Args:
        checkpoint: its folder.
        further: files that a checkpoint without a list of its files (of an older version) also needs.
    """
    listed = checkpoint / CONTENTS
    if listed.is_file() and listed.stat().st_size:
        wanted: list[tuple[str, ...]] = [(str(name),) for name in read_json(listed)]
    else:
        wanted = [*_USUAL, *((name,) for name in further)]
    return [names[0] for names in wanted if not any((checkpoint / name).is_file() for name in names)]


def save_for_trainer(model: PreTrainedModel, folder: str) -> None:
    """Write the weights with the names of the modules, and the configuration.

    transformers 5.20 to 5.24 writes the weights of a ViT with their old names, which its own Trainer cannot
    load (issue 43701).
    """
    model.save_pretrained(folder, save_original_format=False)
