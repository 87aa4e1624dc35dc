# SPDX-License-Identifier: Apache-2.0
"""The vision transformer of timm: its architecture, and the names of its weights in transformers.

The authors of MoCo v3, DINO, MAE and I-JEPA use the same names.

Legend: D width, P patches, C channels.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import IJepaConfig, IJepaModel, ViTConfig, ViTModel

from hf_ssl.conversion.architecture import Architecture, unexpected, unsupported, weight
from hf_ssl.conversion.checkpoint import StateDict
from hf_ssl.errors import UserError

FAMILY = "vision transformer"
_OWN = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
"""LayerScale -> the linear layer before it. transformers' ViT has none, so that layer gets the factors."""
_HEADS = re.compile(r"(head|fc|decoder_\w+|mask_token)(\.|$)")
_SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1408, 40): "g"}
_EPS = 1e-6
"""Epsilon of all layer norms in the code of timm and of the authors; that of transformers is 1e-12."""


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of the names under which the weights of a vision transformer stand."""
    first, second = "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"
    known = set(names)
    return [
        name.removesuffix(first)
        for name in sorted(known)
        if name.endswith(first) and name.removesuffix(first) + second in known
    ]


def read(weights: StateDict, heads: int | None, known_heads: Mapping[int, int]) -> Architecture:
    """Return the encoder in the weights of a vision transformer.

    Args:
        weights: their names begin with "patch_embed", "blocks" and so on.
        heads: number of attention heads; None: see `known_heads`.
        known_heads: width -> number of attention heads.

    Raises:
        UserError: the number of heads is not known, or the features of this network differ from those of
            every `ViTModel` and `IJepaModel` of transformers.
    """
    left_out = [name for name in weights if _HEADS.match(name)]
    own = {name: value for name, value in weights.items() if name not in left_out}
    if "fc_norm.weight" in own and "norm.weight" not in own:
        raise unsupported(
            FAMILY, "a layer norm before the pooling", "one after it, as in fine-tuned encoders of MAE"
        )
    fields, image_size = _fields(own)
    has_class_token = "cls_token" in own
    fields["num_attention_heads"] = _heads(fields["hidden_size"], heads, known_heads)
    own, notes = _with_all_positions(*_without_scales(own))
    renamed: StateDict = {}
    for name, value in own.items():
        renamed |= _renamed(name, value)
    config: Any = ViTConfig(**fields, pooler_act="linear") if has_class_token else IJepaConfig(**fields)
    model_class = ViTModel if has_class_token else IJepaModel
    return Architecture(_name(config), model_class, config, renamed, left_out, image_size, notes)


def _name(config: Any) -> str:
    size = _SIZES.get((config.hidden_size, config.num_hidden_layers))
    if size is None:
        return (
            f"ViT/{config.patch_size} with width {config.hidden_size} and {config.num_hidden_layers} blocks"
        )
    return f"ViT-{size}/{config.patch_size}"


def _fields(weights: StateDict) -> tuple[dict[str, Any], int]:
    """Return the fields of the configuration except the number of heads, and the side of the images."""
    projection = weight(weights, "patch_embed.proj.weight", FAMILY, 4)
    width, channels, patch, columns = projection.shape
    if patch != columns:
        raise unsupported(FAMILY, "square patches", f"patches of {patch} x {columns} pixels")
    positions = weight(weights, "pos_embed", FAMILY, 3).shape[1]
    side = math.isqrt(positions)
    # The table of some encoders of timm has no row for the class token.
    if positions - side**2 not in ((0, 1) if "cls_token" in weights else (0,)):
        raise unsupported(FAMILY, "positions for a square image", f"{positions} positions")
    blocks = {int(found[1]) for found in map(_BLOCK.match, weights) if found is not None}
    _check_layers(weights)
    hidden = weight(weights, "blocks.0.mlp.fc1.weight", FAMILY, 2).shape[0]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": max(blocks) + 1,
        "intermediate_size": hidden,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": side * patch,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "hidden_act": "gelu",
        "layer_norm_eps": _EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return fields, side * patch


def _check_layers(weights: StateDict) -> None:
    """Raise UserError for the layers of other vision transformers: RMSNorm, and MLPs with gates (SwiGLU)."""
    norms = [name for name in weights if _BLOCK.match(name) and name.endswith("norm1.weight")]
    if norms and not any(name.replace("weight", "bias") in weights for name in norms):
        raise unsupported(FAMILY, "LayerNorm", "norms without biases, such as RMSNorm")
    start = "blocks.0.mlp."
    shapes = {name: tuple(each.shape) for name, each in weights.items() if name.startswith(start)}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    first, second = shapes.get(f"{start}fc1.weight"), shapes.get(f"{start}fc2.weight")
    if shapes and (first is None or (second is not None and first[0] != second[1])):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise unsupported(FAMILY, "two linear layers in each MLP", f"{got}, as with SwiGLU")


def _heads(width: int, heads: int | None, known: Mapping[int, int]) -> int:
    found = known.get(width) if heads is None else heads
    if found is None:
        raise UserError(
            f"--heads: expected the number of attention heads for the width {width}, which the file does not "
            f"contain, got none; add --heads N, often {max(1, width // 64)}"
        )
    if found < 1 or width % found:
        raise UserError(
            f"--heads: expected a divisor of the width {width}, got {found}; use {max(1, width // 64)}"
        )
    return found


def _without_scales(weights: StateDict) -> tuple[StateDict, list[str]]:
    """Return the weights with each LayerScale multiplied into the linear layer before it, and notes."""
    changed = dict(weights)
    for name in weights:
        found = _BLOCK.match(name)
        if found is None or found[2] not in _SCALES:
            continue
        layer, scale = f"blocks.{found[1]}.{_SCALES[found[2]]}", changed.pop(name)
        linear = weight(changed, f"{layer}.weight", FAMILY, 2)
        if scale.shape != linear.shape[:1]:
            raise unsupported(FAMILY, f"{name} with {len(linear)} numbers", f"{tuple(scale.shape)}")
        changed[f"{layer}.weight"] = linear * scale[:, None]
        bias = changed.get(f"{layer}.bias")
        if bias is not None and bias.shape == scale.shape:  # `convert` reports other shapes
            changed[f"{layer}.bias"] = bias * scale
    if len(changed) == len(weights):
        return changed, []
    return changed, ["The factors of LayerScale are multiplied into the weights of the layers before them."]


def _with_all_positions(weights: StateDict, notes: list[str]) -> tuple[StateDict, list[str]]:
    """Return the weights with a position for the class token. It is zero if the file has none."""
    positions = weights["pos_embed"]
    if "cls_token" not in weights or math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        return weights, notes
    return {**weights, "pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}, notes


def _renamed(name: str, value: torch.Tensor) -> StateDict:
    """Return {name in transformers: value}. The weights of queries, keys and values become three."""
    if name in _OWN:
        return {_OWN[name]: value}
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise unexpected(FAMILY, name)
    start = f"layers.{found[1]}"
    part, _, end = found[2].rpartition(".")
    if part == "attn.qkv":
        if value.ndim == 0 or len(value) % 3:
            raise unsupported(FAMILY, f"{name} with three equal parts", f"{tuple(value.shape)}")
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{start}.attention.{part}.{end}": each for part, each in parts}
    if part not in _PARTS:
        raise unexpected(FAMILY, name)
    return {f"{start}.{_PARTS[part]}.{end}": value}
