# SPDX-License-Identifier: Apache-2.0
"""Checks that the sections of a recipe fit together, before any image is read."""

from typing import TYPE_CHECKING

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError, one_line
from hf_ssl.methods import METHODS
from hf_ssl.resources import resource
from hf_ssl.views.preset import ViewPreset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_encoder(config: "PreTrainedConfig", data: DataConfig, views: ViewPreset) -> None:
    """Check that the encoder can encode the views, by a forward pass on torch's meta device.

    Raises:
        UserError: the encoder cannot be built or cannot encode these views.
    """
    import torch
    from transformers import AutoModel

    from hf_ssl.modeling.backbones import check_image_sizes

    try:
        with torch.device("meta"):
            encoder = AutoModel.from_config(config)
    except NotImplementedError:
        return  # the encoder has an operation that cannot run on shapes alone
    except Exception as error:  # the constructor of another library may raise anything for wrong values
        raise UserError(
            f"backbone: expected valid values for {config.model_type}, got {type(error).__name__} "
            f"{one_line(error)}"
        ) from error
    if encoder.main_input_name != "pixel_values":
        raise UserError(f"backbone.model_type: expected an encoder of images, got {config.model_type}")
    check_image_sizes(encoder, views.final_sizes, data.channels)


def check_method(
    name: str,
    *,
    backbone_type: str,
    views: ViewPreset,
    streaming: bool,
    batch_size: int,
) -> None:
    """Check that a method can be trained with these settings.

    Args:
        name: key of the method in `METHODS`.
        backbone_type: model type of the encoder.
        views: the augmentation settings.
        streaming: whether the data are a stream.
        batch_size: images in an optimizer step.

    Raises:
        UserError: the method needs another encoder, another number of views, map-style data, or more images;
            or it has no text for the card.
    """
    try:
        resource("model_cards", "methods", f"{name}.md")
    except FileNotFoundError as error:
        raise UserError(
            f"method.name: expected model_cards/methods/{name}.md for the card, found none; write it as "
            "CONTRIBUTING.md explains"
        ) from error
    model = METHODS[name].model_class()
    model.check_backbone(backbone_type)
    model.check_views(views.count, views.local_count)
    model.check_streaming(streaming)
    model.check_batch_size(batch_size)
