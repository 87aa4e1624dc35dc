# SPDX-License-Identifier: Apache-2.0
"""The encoder of images in a larger model: the ViT in a ViTMAE, or a tower of a model with texts."""

from typing import Any

import torch
from transformers import MODEL_MAPPING, ViTConfig, ViTModel

from hf_ssl.errors import UserError
from hf_ssl.modeling.configuration import MASKING_TYPE
from hf_ssl.modeling.eval_mode import unchanged_random_state

TOWER = "vision_model"
"""Name of the encoder of images in the models of `TWO_TOWERS`."""
TWO_TOWERS = (
    "aimv2", "align", "altclip", "blip", "chinese_clip", "clip", "clipseg", "groupvit", "metaclip_2", "owlv2",
    "owlvit", "siglip", "siglip2", "tipsv2", "vision-text-dual-encoder",
)  # fmt: skip
"""Model types with one encoder for images and another one for texts."""
_NAMES = ("model_type", "architectures", "transformers_version", "pooler_act")


def image_config(config: Any) -> Any:
    """Return the config of the encoder that `image_encoder` returns."""
    if config.model_type in TWO_TOWERS:
        return config.vision_config
    if config.model_type != MASKING_TYPE:
        return config
    given, fields = config.to_dict(), ViTConfig().to_dict()
    shared = {key: value for key, value in given.items() if key in fields and key not in _NAMES}
    return ViTConfig(**shared | {"pooler_act": "linear", "published_feature": "mean"})


def check_loads_alone(config: Any, where: str) -> None:
    """Raise UserError if `AutoModel` cannot load an encoder, so that nobody could load the trained one.

    transformers 5.24 knows the encoders of images in BLIP, OWL-ViT and some others only inside of the whole
    models.

    Args:
        config: the config of the encoder.
        where: the argument or the key that names the encoder.
    """
    if type(config) not in MODEL_MAPPING:
        raise UserError(
            f"{where}: expected an encoder that AutoModel loads by itself, got {config.model_type}, which "
            "can only be evaluated; start from another one, such as that of CLIP or SigLIP"
        )


def image_encoder(model: Any) -> Any:
    """Return the encoder of images in a model of transformers, with the same weights; other models stay.

    A model of images and texts (CLIP) contains an encoder of images, whose features this project measures and
    trains. A ViTMAE masks three quarters of the patches, also in evaluation mode, and selects them at random
    in each call. The result is then its ViT. The feature is the mean of all tokens, because MAE does not
    train the class token.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in TWO_TOWERS:
        tower = getattr(model, TOWER)
        tower.name_or_path = model.name_or_path  # `load_processor` reads it
        return tower.train(model.training)
    return _without_masks(model) if model_type == MASKING_TYPE else model


def _without_masks(model: Any) -> Any:
    """Return the ViT in a ViTMAE, with an identity as pooler."""
    model = model.base_model  # without the decoder
    config = image_config(model.config)
    config.name_or_path = model.name_or_path
    own = next(model.parameters())
    with unchanged_random_state(torch.device("cpu")):
        found = ViTModel(config).to(own.device, own.dtype)
    size = config.hidden_size
    pooler = {"pooler.dense.weight": torch.eye(size), "pooler.dense.bias": torch.zeros(size)}
    found.load_state_dict(pooler | model.state_dict())
    return found.train(model.training)
