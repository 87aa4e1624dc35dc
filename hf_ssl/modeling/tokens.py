# SPDX-License-Identifier: Apache-2.0
"""Stock vision transformers run on some of an image's patches: those that are left out cost nothing.

Legend: N images, C channels, H, W, S special tokens, P patches of an image (row by row), K kept, D dims.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ssl.errors import UserError

# Model types of the encoders that can do it; each adds its positions before the first block, so that a token
# knows its place whichever others are left out (DINOv3's rotary positions are made in the blocks instead).
TOKEN_TYPES = ("vit", "deit", "ijepa", "dinov2", "dinov2_with_registers")

_SPECIAL_TOKENS = {"vit": 1, "deit": 2, "ijepa": 0, "dinov2": 1, "dinov2_with_registers": 1}
_WITH_INNER_ENCODER = ("dinov2", "dinov2_with_registers")


def special_tokens(backbone: PreTrainedModel) -> int:
    """How many tokens stand before those of patches: CLS, registers, DeiT's distillation token.

    Raises:
        UserError: the encoder is none of `TOKEN_TYPES`.
    """
    config: Any = backbone.config
    if config.model_type not in TOKEN_TYPES:
        raise UserError(
            f"backbone.model_type: needs a vision transformer that can leave patches out "
            f"({', '.join(TOKEN_TYPES)}), got {config.model_type}"
        )
    registers = config.num_register_tokens if config.model_type == "dinov2_with_registers" else 0
    return _SPECIAL_TOKENS[config.model_type] + registers


def encode_tokens(backbone: PreTrainedModel, images_NCHW: Tensor, kept_NK: Tensor | None = None) -> Tensor:
    """The last hidden state of an encoder that sees only the kept patches of each image.

    The encoder's own modules do all of it, so that attention implementation, gradient checkpointing, drop
    path and dtype are as in its own forward; no token of a patch that is left out goes through a block.

    Args:
        backbone: an encoder of `TOKEN_TYPES`.
        images_NCHW: normalised; the position table is interpolated where the size is not the encoder's own.
        kept_NK: int64 patch numbers, row-major, in the order in which their tokens come out; None keeps all,
            which is the encoder's own forward.

    Returns:
        (N, S + K, D): special tokens first, after the final layer norm.

    Raises:
        UserError: the encoder is none of `TOKEN_TYPES`.
    """
    special = special_tokens(backbone)
    tokens = embed_patches(backbone, images_NCHW)
    if kept_NK is not None:
        patches = select(tokens[:, special:], kept_NK)
        tokens = torch.cat([tokens[:, :special], patches], dim=1)
    for layer in encoder_layers(backbone):
        tokens = layer(tokens)
    module: Any = backbone
    return module.layernorm(tokens)


def select(tokens_NPD: Tensor, index_NK: Tensor) -> Tensor:
    """Of each image the tokens (N, K, D) with the numbers (N, K)."""
    return tokens_NPD.gather(1, index_NK.unsqueeze(-1).expand(-1, -1, tokens_NPD.shape[-1]))


def embed_patches(backbone: Any, images_NCHW: Tensor) -> Tensor:
    """All tokens (N, S + P, D) as they enter the first block: projected, with positions."""
    projection = backbone.embeddings.patch_embeddings.projection
    images_NCHW = images_NCHW.to(projection.weight.dtype)
    if backbone.config.model_type in _WITH_INNER_ENCODER:
        return backbone.embeddings(images_NCHW)  # interpolates by itself
    own = tuple(images_NCHW.shape[-2:]) == tuple(backbone.embeddings.image_size)
    return backbone.embeddings(images_NCHW, interpolate_pos_encoding=not own)


def encoder_layers(backbone: Any) -> Any:
    """The encoder's blocks, first to last."""
    return backbone.encoder.layer if backbone.config.model_type in _WITH_INNER_ENCODER else backbone.layers
