# SPDX-License-Identifier: Apache-2.0
"""From a training checkpoint to what is published."""

from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModelForPreTraining
from transformers.utils import logging as transformers_logging

import hf_ssl.auto  # noqa: F401  registers the methods with transformers
from hf_ssl.errors import UserError
from hf_ssl.files import replaced_folder
from hf_ssl.hub.export import export_encoder
from hf_ssl.hub.processor import image_processor
from hf_ssl.modeling.base import SSLPreTrainedModel


def export_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Write the encoder of a training checkpoint as a plain transformers model, and the method model beside
    it.

    Raises:
        UserError: the checkpoint cannot be read or is none of hf_ssl; the directory holds something else.
    """
    transformers_logging.disable_progress_bar()
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty: give a new or empty directory for the encoder")
    try:
        model = AutoModelForPreTraining.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot read a checkpoint from {checkpoint}: {reason}") from error
    if not isinstance(model, SSLPreTrainedModel):
        raise UserError(f"{checkpoint} holds a {type(model).__name__}, which is no method of hf_ssl")
    preset = model.config.views
    export_encoder(model.exported_encoder, image_processor(preset, len(preset["mean"])), directory)
    with replaced_folder(directory / "pretraining") as folder:
        model.save_pretrained(folder)
    print(f"encoder in {directory}, method model in {directory / 'pretraining'}")
