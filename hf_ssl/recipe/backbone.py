# SPDX-License-Identifier: Apache-2.0
"""The section `backbone` of a recipe: a config of transformers, or a trained encoder (`init_from`)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError, check_name, one_line
from hf_ssl.evaluation.config import check_patch_grid
from hf_ssl.modeling.encoder_parts import PARTS, SUBFOLDER
from hf_ssl.sections import MISSING, config_fields, to_dataclass
from hf_ssl.views.preset import ViewPreset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def backbone_class(model_type: str) -> type["PreTrainedConfig"]:
    """Return the config class of an encoder of transformers.

    Raises:
        UserError: the model type is unknown. The message gives the most similar name.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from hf_ssl.modeling.configuration import method_of

    known = [name for name in CONFIG_MAPPING if method_of(name) is None]
    check_name("backbone.model_type", model_type, known, "a model type of transformers")
    return CONFIG_MAPPING[model_type]


def fitted_backbone(backbone: dict[str, Any], data: DataConfig, views: ViewPreset) -> dict[str, Any]:
    """Return the section `backbone`, completed with channels and image size from `data` and `views`.

    `check_encoder` checks an image size that the section sets.

    Raises:
        UserError: the section sets a different number of channels.
    """
    if backbone["model_type"] == "timm_wrapper":
        arguments = {"in_chans": data.channels, **(backbone.get("model_args") or {})}
        _check_channels("backbone.model_args.in_chans", arguments["in_chans"], data.channels)
        return {**backbone, "model_args": arguments} if data.channels != 3 else backbone
    fields = config_fields(backbone_class(backbone["model_type"]))
    fitted = dict(backbone)
    if "num_channels" in fields:
        _check_channels(
            "backbone.num_channels", fitted.setdefault("num_channels", data.channels), data.channels
        )
    if "image_size" in fields:
        fitted.setdefault("image_size", views.final_size)
    return fitted


def _check_channels(key: str, got: Any, expected: int) -> None:
    if got != expected:
        raise UserError(f"{key}: expected {expected}, which is data.channels, got {got}; leave it out")


def pretrained_config(init_from: str, views: ViewPreset) -> "PreTrainedConfig":
    """Return the config of the encoder `backbone.init_from`, for images of the size of the views.

    Raises:
        UserError: there is no encoder.
    """
    from hf_ssl.modeling.loading import load_config
    from hf_ssl.modeling.position_tables import config_at_size

    return config_at_size(load_config(init_from, "backbone.init_from"), views.final_size)


def pretrained_backbone(backbone: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """Return the section of a trained encoder with its `model_type`.

    Raises:
        UserError: the section contains other keys than `init_from` and a correct `model_type`, or `AutoModel`
            cannot load the encoder, or it takes another number of channels than the data have.
    """
    init_from = backbone["init_from"]
    if init_from == MISSING:
        raise UserError(
            "backbone.init_from: expected a folder or the Hub id of an encoder, got nothing; set "
            "backbone.init_from=..."
        )
    _check_whole(init_from)
    from hf_ssl.modeling.backbones import input_channels
    from hf_ssl.modeling.image_encoders import check_loads_alone
    from hf_ssl.modeling.loading import load_config

    config: Any = load_config(init_from, "backbone.init_from")
    check_loads_alone(config, "backbone.init_from")
    further = sorted(backbone.keys() - {"init_from", "model_type"})
    if further:
        raise UserError(
            f"backbone.{further[0]}: expected no value, because backbone.init_from={init_from} sets it, got "
            f"{backbone[further[0]]}; leave it out"
        )
    if backbone.get("model_type", config.model_type) != config.model_type:
        raise UserError(
            f"backbone.model_type: expected {config.model_type}, the type of backbone.init_from={init_from}, "
            f"got {backbone['model_type']}; leave it out"
        )
    channels = input_channels(config)
    if channels != data.channels:
        raise UserError(
            f"data.channels: expected {channels}, the channels of backbone.init_from={init_from}, got "
            f"{data.channels}; use data.channels={channels}"
        )
    return {"model_type": config.model_type, "init_from": init_from}


def _check_whole(init_from: str) -> None:
    """Raise UserError for the encoder of a single color view, which CMC writes to a subfolder."""
    folder = Path(init_from).expanduser()
    if re.fullmatch(SUBFOLDER, folder.name) and (folder.parent / PARTS).is_file():
        raise UserError(
            f"backbone.init_from: expected a whole encoder, got {init_from}, which encodes one color view; "
            f"use backbone.init_from={folder.parent} with the method cmc"
        )


def pretrained_views(init_from: str, given: dict[str, Any], data: DataConfig) -> ViewPreset:
    """Return the views of a run that starts from a trained encoder.

    Size, mean and std follow the image processor of the encoder, unless the section `views` sets them.
    """
    from hf_ssl.modeling.loading import view_settings

    views = to_dataclass(ViewPreset, view_settings(init_from, data.channels) | given, "views")
    views.check(data.channels)
    return views


def check_encoder(
    config: "PreTrainedConfig", data: DataConfig, views: ViewPreset, patch_grid: Sequence[int] | None = None
) -> None:
    """Check that the encoder can encode the views, by a forward pass on torch's meta device.

    Args:
        config: config of the encoder.
        data: the section `data`, which has the number of channels.
        views: the section `views`.
        patch_grid: `evaluation.patch_grid`, whose patches must cover the images and fit the encoder.

    Raises:
        UserError: the encoder cannot be built, or cannot encode these views or patches.
    """
    if patch_grid:
        check_patch_grid(*patch_grid, views.final_size)
    import torch
    from transformers import AutoModel

    from hf_ssl.modeling.backbones import check_image_sizes

    try:
        with torch.device("meta"):
            encoder = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except NotImplementedError:
        return  # the encoder has an operation that cannot run on shapes alone
    except Exception as error:  # the constructor of another library may raise anything for wrong values
        raise UserError(
            f"backbone: expected valid values for {config.model_type}, got {type(error).__name__} "
            f"{one_line(error)}"
        ) from error
    if encoder.main_input_name != "pixel_values":
        raise UserError(f"backbone.model_type: expected an encoder of images, got {config.model_type}")
    check_image_sizes(encoder, views.final_sizes, data.channels, views.final_size)
    if patch_grid:
        try:
            check_image_sizes(encoder, patch_grid[:1], data.channels)
        except UserError as error:
            raise UserError(
                f"evaluation.patch_grid: expected patches that {config.model_type} can encode, got patches "
                f"of {patch_grid[0]} pixels; use larger ones"
            ) from error
