# SPDX-License-Identifier: Apache-2.0
"""A backbone that is trained already: `backbone.init_from`."""

from typing import TYPE_CHECKING, Any

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError

MISSING = "???"  # OmegaConf's mark for what must be given

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def started_config(init_from: str) -> "PreTrainedConfig":
    """The configuration of the encoder `backbone.init_from`. Raises `UserError` if there is none."""
    from hf_ssl.evaluation.loading import load_config

    config = load_config(init_from)
    if config.model_type.startswith("ssl_"):
        raise UserError(
            f"backbone.init_from={init_from} holds a method of hf_ssl: give the folder of the encoder, "
            "which is the one above pretraining/, or export the checkpoint"
        )
    return config


def started_backbone(backbone: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """The section of a backbone that is trained already, with its `model_type`.

    Raises:
        UserError: the section says more than `init_from` and a `model_type` that agrees, or the encoder wants
            other channels than the data have.
    """
    init_from = backbone["init_from"]
    if init_from == MISSING:
        raise UserError("backbone.init_from is missing: expected the folder or the Hub id of an encoder")
    config: Any = started_config(init_from)
    further = sorted(backbone.keys() - {"init_from", "model_type"})
    if further:
        raise UserError(f"backbone.{further[0]} cannot be set: backbone.init_from={init_from} decides it")
    if backbone.get("model_type", config.model_type) != config.model_type:
        raise UserError(
            f"backbone.model_type: backbone.init_from={init_from} is a {config.model_type}, got "
            f"{backbone['model_type']}; it can be left out"
        )
    channels = config.to_dict().get("num_channels", data.channels)
    if channels != data.channels:
        raise UserError(
            f"data.channels: backbone.init_from={init_from} takes images of {channels} channels, got "
            f"{data.channels}"
        )
    return {"model_type": config.model_type, "init_from": init_from}
