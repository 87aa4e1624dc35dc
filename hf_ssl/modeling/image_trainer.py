# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer for models of images: the base class of all trainers of hf_ssl (layer 1)."""

from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_ssl.errors import UserError


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


def save_for_trainer(model: PreTrainedModel, folder: str) -> None:
    """Write the weights with the names of the modules, and the configuration.

    transformers 5.20 to 5.24 writes the weights of a ViT with their old names, which its own Trainer cannot
    load (issue 43701).
    """
    model.save_pretrained(folder, save_original_format=False)
