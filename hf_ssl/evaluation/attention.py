# SPDX-License-Identifier: Apache-2.0
"""Where a vision transformer looks: attention maps, rollout, thresholded masks, and patches as colours.

Legend: B images, C channels, H, W pixels, h, w patches down and across, A heads, S special tokens (class
token, distillation token, registers), T = S + h * w tokens, Q queries, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.modeling.eval_mode import evaluation_mode

_MASKING = "vit_mae"  # the one encoder class that hides most patches whenever it is used


@dataclass(frozen=True)
class AttentionMaps:
    """What one layer looks at, from the class token, or from the mean of the patches where there is none.

    Attributes:
        heads: (B, A, h, w) float32 on the CPU: the weight of each patch. Together with `special` each head
            sums to 1.
        special: (B, A, S): the weight of the tokens that are no patches, which maps leave out.
        rollout: (B, h, w): all layers followed back to the input, see `attention_rollout`.
        patches: (B, h, w, D): the encoder's last features of the patches, see `pca_colours`.
        query: "class token" or "mean of the patches".
    """

    heads: Tensor
    special: Tensor
    rollout: Tensor
    patches: Tensor
    query: str

    @property
    def mean(self) -> Tensor:
        """(B, h, w): the mean over heads."""
        return self.heads.mean(dim=1)


def has_attention(model: nn.Module) -> bool:
    """Whether `attention_maps` can be had: every layer attends from all tokens to all of one patch grid.

    True for ViT, DeiT, DINOv2 (registers too), DINOv3, I-JEPA, MAE, MSN and BEiT of transformers; False for
    convolutional networks, for windows (Swin), and for timm's models, which keep their attention to
    themselves.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config = model.config.to_dict()
    return "attentions" in (type(model)._can_record_outputs or {}) and all(
        isinstance(config.get(key), int) for key in ("patch_size", "num_attention_heads", "num_hidden_layers")
    )


def attention_maps(model: nn.Module, images: Tensor, *, layer: int = -1) -> AttentionMaps:
    """Attention of one layer over the patches of images, in eval mode and without gradient.

    The encoder's attention implementation (SDPA keeps its weights to itself, so the maps need "eager"),
    training flags and weights are the same afterwards. All layers' weights are held for the rollout: 4 * A *
    T * T bytes a layer and image.

    Args:
        model: an encoder that `has_attention`.
        images: (B, C, H, W) float, normalised as the encoder's processor does; of any size of at least one
            patch, square or not (position embeddings are interpolated).
        layer: which, from 0; negative ones count from the last.

    Raises:
        UserError: an encoder without attention maps, no such layer, or images that it cannot take.
    """
    encoder = _with_attention(model)
    grid = _patch_grid(encoder, images)
    layers: int = encoder.config.num_hidden_layers
    if not -layers <= layer < layers:
        raise UserError(f"expected layer from {-layers} to {layers - 1}, got {layer}: there are {layers}.")
    parameter = next(encoder.parameters())
    images = images.to(parameter.device, parameter.dtype)
    with evaluation_mode(encoder), eager_attention(encoder):
        outputs = encoder(images, output_attentions=True, **_arguments(encoder, len(images), grid))
    # Plain tensors on the CPU: a caller may do arithmetic with gradient on them.
    attentions = [weights.float().cpu().clone() for weights in outputs.attentions]
    features = outputs.last_hidden_state.float().cpu().clone()
    return _maps(attentions, features, layer, grid, has_class_token(encoder))


def attention_rollout(attentions: Sequence[Tensor], query_BQT: Tensor | None = None) -> Tensor:
    """How much of each input token reaches each query of the last layer, if attention were all that mixes.

    A layer passes on half of what it reads and half of its own token, which stands for the residual
    connection: M_l = 0.5 * A_l + 0.5 * I with A_l the mean over heads, rows sum to 1. The rollout is
    M_L ... M_2 M_1.

    Args:
        attentions: of each layer, first layer first, (B, A, T, T).
        query_BQT: weights over the output tokens, to follow some of them alone (far cheaper than the whole
            matrix); None: every token.

    Returns:
        (B, Q, T) or (B, T, T); rows sum to what the queries sum to.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    first = attentions[0]
    batch, tokens = first.shape[0], first.shape[-1]
    rows = torch.eye(tokens).expand(batch, -1, -1) if query_BQT is None else query_BQT
    for weights_BATT in reversed(attentions):
        rows = 0.5 * rows @ weights_BATT.mean(dim=1) + 0.5 * rows
    return rows


def attention_mask_of(maps: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold a given share of the attention on patches.

    Args:
        maps: (..., h, w), not negative.
        mass: in (0, 1]; 0.6 in the DINO paper's pictures.

    Returns:
        bool (..., h, w).

    Raises:
        UserError: `mass` outside (0, 1].

    Source: Caron et al. 2021, arXiv:2104.14294, figure 4 and the author's visualize_attention.py.
    """
    if not 0 < mass <= 1:
        raise UserError(f"expected a mass of attention above 0 and up to 1, got {mass}.")
    flat = maps.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values  # what the patches ahead of each one hold
    kept = before < mass * flat.sum(dim=-1, keepdim=True) * (1 - 1e-6)  # an exact share needs no patch more
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


def pca_colours(patches_BhwD: Tensor) -> Tensor:
    """The three main directions of patch features as red, green and blue: alike patches have alike colours.

    All images share the directions. Each channel runs from its 2nd to its 98th percentile. Equal features
    give equal colors, up to rounding, if the three largest variances are distinct. Directions of equal
    variance are not unique: they depend on the version of torch and on the processor.

    Args:
        patches_BhwD: `AttentionMaps.patches`, or any features on a grid with D of 3 or more.

    Returns:
        (B, h, w, 3) float32 in [0, 1].

    Source: the pictures of Oquab et al. 2023, arXiv:2304.07193, figure 1, without their removal of the
    background.
    """
    rows = patches_BhwD.flatten(0, 2).double()
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    # The sign of a direction is arbitrary. This code makes the largest component positive. Components that
    # differ by less than a ten-thousandth count as equal, and the first of them is used. Otherwise, rounding
    # would determine the sign.
    sizes = directions.abs()
    tied = sizes >= (1 - 1e-4) * sizes.amax(dim=1, keepdim=True)
    largest = directions.gather(1, tied.int().argmax(dim=1, keepdim=True))
    values = rows @ (directions * largest.sign()).T
    values = nn.functional.pad(values, (0, 3 - values.shape[1]))
    low, high = torch.quantile(values, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    spread = high - low
    spread = spread.clamp(min=1e-6 * float(spread.max()) + 1e-30)  # rounding errors are no direction
    colours = ((values - low) / spread).clamp(0, 1)
    return colours.float().reshape(*patches_BhwD.shape[:3], 3)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that shows its weights, and for MAE's encoder no masking; afterwards all is as it was."""
    config = model.config
    implementation: str = config._attn_implementation
    mask_ratio = config.mask_ratio if config.model_type == _MASKING else None
    model.set_attn_implementation("eager")
    if mask_ratio is not None:
        config.mask_ratio = 0.0
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        if mask_ratio is not None:
            config.mask_ratio = mask_ratio


def has_class_token(model: nn.Module) -> bool:
    """Whether the first token of an encoder's output is one of its own, and no patch."""
    return any(name.split(".")[-1] == "cls_token" for name, _ in model.named_parameters())


def patch_size(model: nn.Module) -> int:
    """Side of a patch in pixels. Raises UserError for an encoder without attention maps."""
    return _with_attention(model).config.patch_size


def _with_attention(model: nn.Module) -> PreTrainedModel:
    if not has_attention(model):
        raise UserError(
            f"{type(model).__name__} has no attention maps: expected a vision transformer of transformers "
            "such as ViTModel, Dinov2Model, DINOv3ViTModel or IJepaModel."
        )
    return cast(PreTrainedModel, model)


def _patch_grid(model: PreTrainedModel, images: Tensor) -> tuple[int, int]:
    channels, side = model.config.num_channels, model.config.patch_size
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise UserError(
            f"expected images (B, {channels}, H, W) of at least {side} x {side} pixels, one patch, got "
            f"{tuple(images.shape)}."
        )
    return images.shape[2] // side, images.shape[3] // side


def _arguments(model: PreTrainedModel, batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    """What a class needs to take any size and to leave all patches where they are."""
    known = signature(type(model).forward).parameters
    arguments: dict[str, Any] = {}
    if "interpolate_pos_encoding" in known:
        arguments["interpolate_pos_encoding"] = True
    if model.config.model_type == _MASKING:  # it shuffles by the order of this noise
        arguments["noise"] = torch.arange(grid[0] * grid[1], device=model.device).expand(batch, -1)
    return arguments


def _maps(
    attentions: list[Tensor], features: Tensor, layer: int, grid: tuple[int, int], class_token: bool
) -> AttentionMaps:
    batch, _, tokens, _ = attentions[0].shape
    special = tokens - grid[0] * grid[1]
    if special < 0 or features.shape[1] != tokens:
        raise UserError(f"expected {grid[0]} x {grid[1]} patches among the tokens, got {tokens} tokens.")
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
