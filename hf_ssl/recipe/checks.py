# SPDX-License-Identifier: Apache-2.0
"""What sections of a recipe must agree on: the encoder, the views and the method's needs, before any image is
read."""

from typing import TYPE_CHECKING, Any

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.methods import METHODS
from hf_ssl.recipe.sections import config_fields, one_line, suggestion
from hf_ssl.views.preset import ViewPreset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_ssl.recipe.recipe import Recipe


def backbone_class(model_type: str) -> type["PreTrainedConfig"]:
    """The config class of a transformers encoder; raises `UserError` with the nearest name if there is
    none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = [name for name in CONFIG_MAPPING if not name.startswith("ssl_")]
    if model_type not in known:
        raise UserError(f"unknown backbone.model_type {model_type}: {suggestion(str(model_type), known)}")
    return CONFIG_MAPPING[model_type]


def fitted_backbone(backbone: dict[str, Any], data: DataConfig, views: ViewPreset) -> dict[str, Any]:
    """`backbone` with the number of channels and the image size that follow from the other sections.

    Raises:
        UserError: the section says something else.
    """
    if backbone["model_type"] == "timm_wrapper":
        arguments = {"in_chans": data.channels, **(backbone.get("model_args") or {})}
        _agree("backbone.model_args.in_chans", arguments["in_chans"], "data.channels", data.channels)
        return {**backbone, "model_args": arguments} if data.channels != 3 else backbone
    fields = config_fields(backbone_class(backbone["model_type"]))
    fitted = dict(backbone)
    for key, value, source in (
        ("num_channels", data.channels, "data.channels"),
        ("image_size", views.final_size, "the size of the views"),
    ):
        if key in fields:
            _agree(f"backbone.{key}", fitted.setdefault(key, value), source, value)
    return fitted


def _agree(key: str, got: Any, source: str, expected: int) -> None:
    if got != expected:
        raise UserError(f"{key}: expected {expected}, which is {source}, got {got}; it can be left out")


def check_encoder(config: "PreTrainedConfig", data: DataConfig, views: ViewPreset) -> None:
    """Build the encoder without memory and run it on shapes alone; raises `UserError` if it cannot see these
    views."""
    import torch
    from transformers import AutoModel

    from hf_ssl.modeling.backbones import encode

    sizes = [views.final_size] + ([views.final_local_size] if views.local_count else [])
    for size in sizes:
        _check_patches(config, size)
    try:
        with torch.device("meta"), torch.no_grad():
            encoder = AutoModel.from_config(config)
            if encoder.main_input_name != "pixel_values":
                raise UserError(
                    f"backbone.model_type: expected an encoder of images, got {config.model_type}"
                )
            for size in sizes:
                encode(encoder, torch.empty(2, data.channels, size, size))
    except (
        UserError,
        NotImplementedError,
    ) as error:  # the latter: an operation that cannot run on shapes alone
        if isinstance(error, UserError):
            raise
    except Exception as error:  # whatever a third party's constructor makes of a person's values
        problem = f"{type(error).__name__} {one_line(error)}"
        raise UserError(
            f"backbone: {config.model_type} cannot encode views of {sizes} pixels: {problem}"
        ) from error


def _check_patches(config: "PreTrainedConfig", size: int) -> None:
    patch = config.to_dict().get("patch_size")
    if isinstance(patch, int) and size % patch:
        raise UserError(
            f"views of {size} pixels cannot be divided into patches of backbone.patch_size={patch} pixels"
        )


def check_method(recipe: "Recipe", batch_size: int) -> None:
    """Raise `UserError` if the method needs another encoder, more views of an image, images with a number, or
    more images at a time."""
    title, model = METHODS[recipe.method["name"]].title, recipe.model_class
    known, got = model.backbone_types, recipe.backbone["model_type"]
    if known is not None and got not in known:
        raise UserError(f"backbone.model_type: {title} trains {', '.join(known)}, got {got}")
    model.check_views(recipe.views.global_count, recipe.views.local_count)
    model.check_streaming(recipe.data.streaming)
    if model.couples_samples and batch_size < 2:
        raise UserError(
            f"training.batch_size: {title} compares images with each other and needs at least 2 at a time, "
            f"got {batch_size}"
        )
