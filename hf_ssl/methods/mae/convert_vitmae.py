# SPDX-License-Identifier: Apache-2.0
"""Conversion of published ViTMAE checkpoints of transformers."""

from typing import Any, TypeVar

from torch import nn
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining

from hf_ssl.methods.mae.configuration_mae import MAEConfig

Model = TypeVar("Model", bound=nn.Module)

# Fields that both encoders have and that affect the result. Each is passed, because the defaults of the two
# families (layer_norm_eps among them) are not the same in every version of transformers.
_ENCODER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias",
)  # fmt: skip
_METHOD_FIELDS = (
    "mask_ratio", "norm_pix_loss", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_num_attention_heads", "decoder_intermediate_size",
)  # fmt: skip
_DECODER_NAMES = {
    "decoder_embed": "embed", "decoder_pos_embed": "positions.table", "decoder_layers": "layers",
    "decoder_norm": "norm", "decoder_pred": "pixels", "mask_token": "mask_token",
}  # fmt: skip


def convert(model_class: type[Model], source: Any, views: dict | None = None) -> Model:
    """Return a model with the weights, position tables and settings of a ViTMAE.

    Args:
        model_class: `MAEForPreTraining`.
        source: a `ViTMAEForPreTraining`, or the folder or Hub id of one.
        views: the augmentation preset for the configuration of the new model.

    Raises:
        OSError, ValueError: `from_pretrained` raises them.
    """
    if not isinstance(source, ViTMAEForPreTraining):
        source = ViTMAEForPreTraining.from_pretrained(source)
    given = source.config
    config = MAEConfig(
        backbone_config=ViTConfig(**{name: getattr(given, name) for name in _ENCODER_FIELDS}),
        views=views,
        **{name: getattr(given, name) for name in _METHOD_FIELDS},
    )
    model = model_class(config).to(source.dtype)
    weights = {f"backbone.{name}": value for name, value in source.vit.state_dict().items()}
    weights |= {f"decoder.{_renamed(name)}": value for name, value in source.decoder.state_dict().items()}
    # A ViTMAE has no pooler. The new model keeps its own, which returns the class token.
    pooler = {key: value for key, value in model.state_dict().items() if key.startswith("backbone.pooler.")}
    model.load_state_dict(weights | pooler)
    return model


def _renamed(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{_DECODER_NAMES[first]}{dot}{rest}"
