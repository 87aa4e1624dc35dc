# SPDX-License-Identifier: Apache-2.0
"""Attention maps of vision transformers: their computation, rollout and threshold (layer 1).

Legend: B images, C channels, H, W pixels, h, w rows and columns of patches, A heads, S special tokens (class
token, distillation token, registers), T = S + h * w tokens, Q queries, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import input_channels
from hf_ssl.modeling.configuration import patch_sides, size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.image_encoders import image_encoder
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.modeling.pooling import has_class_token


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one layer; its query is the class token or, without one, the mean of the patches.

    Attributes:
        heads: (B, A, h, w) float32 on the CPU, the weight of each patch. The weights of a head in `heads` and
            `special` sum to 1.
        special: (B, A, S), the weights of the special tokens, which the maps do not show.
        rollout: (B, h, w), the attention through all layers; see `attention_rollout`.
        patches: (B, h, w, D), the patch features of the last layer; see `hf_ssl.evaluation.pca_colors`.
        query: "class token" or "mean of the patches".
    """

    heads: Tensor
    special: Tensor
    rollout: Tensor
    patches: Tensor
    query: str

    @property
    def mean(self) -> Tensor:
        """Return the mean over the heads (B, h, w)."""
        return self.heads.mean(dim=1)


def has_attention(model: nn.Module) -> bool:
    """Return whether `attention_maps` supports an encoder.

    In a supported encoder, each token attends to all tokens of one patch grid in every layer. These are ViT,
    DeiT, DINOv2 (also with registers), DINOv3, I-JEPA, MAE, MSN and BEiT of transformers. Convolutional
    networks and models with window attention (Swin) are not supported. Models of timm are not supported,
    because they do not return attention weights.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config = model.config.to_dict()
    return (
        "attentions" in (type(model)._can_record_outputs or {})
        and bool(config.get("patch_size"))
        and len(set(patch_sides(model.config))) == 1
        and all(isinstance(config.get(key), int) for key in ("num_attention_heads", "num_hidden_layers"))
    )


def attention_maps(model: nn.Module, images: Tensor, *, layer: int = -1) -> AttentionMaps:
    """Return the attention maps of one layer, computed in evaluation mode and without gradient.

    The maps need the attention implementation "eager", because SDPA returns no attention weights. The call
    does not change the encoder's attention implementation, training flags or weights. The rollout needs the
    attention weights of all layers, which take 4 * A * T * T bytes per layer and image.

    Args:
        model: an encoder that `has_attention` supports.
        images: (B, C, H, W) float, normalized as by the encoder's processor. H and W can have any size of at
            least one patch, because the position embeddings are interpolated.
        layer: number of the layer, from 0. Negative numbers count from the last layer.

    Raises:
        UserError: the encoder has no attention maps or no such layer, or the images have a wrong shape.
    """
    encoder = _with_attention(cast(nn.Module, image_encoder(model)))
    grid = _patch_grid(encoder, images)
    layers: int = encoder.config.num_hidden_layers
    if not -layers <= layer < layers:
        raise UserError(f"layer: expected a number from {-layers} to {layers - 1}, got {layer}")
    images = images.to(next(encoder.parameters()))  # to its device and precision
    with evaluation_mode(encoder), eager_attention(encoder):
        outputs = encoder(images, output_attentions=True, **size_arguments(encoder, images))
    # The clones are normal tensors on the CPU, so that a caller can compute gradients with them.
    attentions = [weights.float().cpu().clone() for weights in outputs.attentions]
    features = outputs.last_hidden_state.float().cpu().clone()
    return _maps(attentions, features, layer, grid, has_class_token(encoder))


def attention_rollout(attentions: Sequence[Tensor], query_BQT: Tensor | None = None) -> Tensor:
    """Return the attention rollout, the share of each input token in each query of the last layer.

    The rollout assumes that only attention mixes tokens. Layer l is M_l = 0.5 * A_l + 0.5 * I, where A_l is
    the mean over heads and I represents the residual connection. Its rows sum to 1.
    The rollout is M_L ... M_2 M_1.

    Args:
        attentions: attention weights of each layer (B, A, T, T), first layer first.
        query_BQT: weights over the output tokens. Few queries need much less computation than the complete
            matrix. None: each token is a query.

    Returns:
        (B, Q, T) or (B, T, T). Each row has the same sum as its query.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    first = attentions[0]
    batch, tokens = first.shape[0], first.shape[-1]
    rows = torch.eye(tokens).expand(batch, -1, -1) if query_BQT is None else query_BQT
    for weights_BATT in reversed(attentions):
        rows = 0.5 * rows @ weights_BATT.mean(dim=1) + 0.5 * rows
    return rows


def threshold_attention(maps: Tensor, mass: float = 0.6) -> Tensor:
    """Return the mask of the smallest set of patches that contains a given share of the attention.

    Args:
        maps: (..., h, w), not negative.
        mass: share in (0, 1]. The pictures of the DINO paper use 0.6.

    Returns:
        bool (..., h, w).

    Raises:
        UserError: `mass` is outside (0, 1].

    Source: Caron et al. 2021, arXiv:2104.14294, figure 4 and visualize_attention.py of the authors.
    """
    if not 0 < mass <= 1:
        raise UserError(f"mass: expected a share of the attention above 0 and at most 1, got {mass}")
    flat = maps.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values  # sum over the patches with larger weights
    kept = before < mass * flat.sum(dim=-1, keepdim=True) * (1 - 1e-6)  # tolerance for an exact share
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch to eager attention, which returns its weights, inside the block."""
    implementation: str = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def patch_size(model: nn.Module) -> int:
    """Return the side of a patch in pixels.

    Raises:
        UserError: the encoder has no attention maps.
    """
    return patch_sides(_with_attention(model).config)[0]


def _with_attention(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, ParallelEncoders):
        raise UserError(
            "model: expected one vision transformer, got an encoder of several narrow ones, which have no "
            "common attention maps; train with another method for them"
        )
    if not has_attention(model):
        raise UserError(
            "model: expected a vision transformer of transformers such as ViTModel, Dinov2Model, "
            f"DINOv3ViTModel or IJepaModel, got {type(model).__name__}, which has no attention maps"
        )
    return cast(PreTrainedModel, model)


def _patch_grid(model: PreTrainedModel, images: Tensor) -> tuple[int, int]:
    channels, side = input_channels(model.config), patch_size(model)
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise UserError(
            f"images: expected (B, {channels}, H, W) with at least {side} x {side} pixels (one patch), got "
            f"{tuple(images.shape)}"
        )
    return images.shape[2] // side, images.shape[3] // side


def _maps(
    attentions: list[Tensor], features: Tensor, layer: int, grid: tuple[int, int], class_token: bool
) -> AttentionMaps:
    batch, _, tokens, _ = attentions[0].shape
    special = tokens - grid[0] * grid[1]
    if special < 0 or features.shape[1] != tokens:
        raise UserError(f"model: expected {grid[0]} x {grid[1]} patches in its output, got {tokens} tokens")
    query = torch.zeros(batch, 1, tokens)
    if class_token:
        query[..., 0] = 1
    else:
        query[..., special:] = 1 / (tokens - special)
    weights = (query[:, None] @ attentions[layer]).squeeze(2)
    rollout = attention_rollout(attentions, query).squeeze(1)
    return AttentionMaps(
        heads=weights[..., special:].unflatten(-1, grid),
        special=weights[..., :special],
        rollout=rollout[..., special:].unflatten(-1, grid),
        patches=features[:, special:].unflatten(1, grid),
        query="class token" if class_token else "mean of the patches",
    )
