# SPDX-License-Identifier: Apache-2.0
"""Position tables of a trained encoder, interpolated once for images of another size."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING
from transformers.utils import logging

from hf_ssl.modeling.configuration import as_pair

logger = logging.get_logger(__name__)

_TABLES = ("position_embeddings", "position_embedding.weight")
_RELATIVE = ("use_relative_position_bias", "use_shared_relative_position_bias")
"""Fields of BEiT. Its tables of relative positions have another form and are not interpolated."""


def config_at_size(config: Any, side: int) -> Any:
    """Return the config of an encoder for square images of `side` pixels.

    The result is `config` itself if the encoder needs no other table. It is also `config` itself if the table
    cannot be interpolated, such as that of a rectangle, and `check_image_sizes` then raises an error.

    Args:
        config: the config, which stays unchanged.
        side: side of the images that users of the published encoder pass to it.
    """
    size = config.to_dict().get("image_size")
    if size is None or type(config) not in MODEL_MAPPING:
        return config
    if len(own := set(as_pair(size))) > 1 or own == {side}:
        return config
    if any(getattr(config, name, False) for name in _RELATIVE):
        return config
    patch = config.to_dict().get("patch_size")
    if not isinstance(patch, int) or side % patch:  # transformers 5.24 interpolates only for one patch size
        return config
    kind: Any = MODEL_MAPPING[type(config)]
    if "interpolate_pos_encoding" not in inspect.signature(kind.forward).parameters:
        return config  # a convolutional network, or an encoder that interpolates in each call
    config = copy.deepcopy(config)
    config.image_size = side
    return config


@torch.no_grad()
def state_at_size(encoder: Any, backbone: Any) -> dict[str, Tensor]:
    """Return the weights of a trained encoder, with position tables of the shapes in `backbone`.

    The encoder's own code interpolates, as it does for `interpolate_pos_encoding=True`. The first outputs of
    the training are then those of the encoder. The function logs a warning if it interpolates a table.

    Args:
        encoder: the trained encoder, which stays unchanged.
        backbone: an encoder of the same class, for images of another size.
    """
    state, wanted = encoder.state_dict(), backbone.state_dict()
    for name, module in encoder.named_modules():
        interpolate = getattr(module, "interpolate_pos_encoding", None)
        for key in (f"{name}.{table}".lstrip(".") for table in _TABLES):
            if interpolate is None or key not in state or key not in wanted:
                continue
            shape = wanted[key].shape
            if shape == state[key].shape:
                continue
            # Only the shape of the tokens matters. With the old shape, the method returns the table itself.
            height, width = as_pair(backbone.config.image_size)
            tokens = state[key].new_empty(1, *shape[-2:])
            state[key] = interpolate(tokens, height, width).reshape(shape)
            logger.warning(
                "backbone.init_from: the position table is interpolated from images of %s to %d pixels",
                encoder.config.image_size, height,
            )  # fmt: skip
    return state
