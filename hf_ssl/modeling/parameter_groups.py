# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: learning rate, weight decay and freezing of each parameter, and its depth."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from hf_ssl.errors import UserError
from hf_ssl.modeling.pooling import SPECIAL_TOKENS

# Tables of embeddings: parameters that are not weights of a layer (ViT, DINOv2, MAE, Swin, SAM, MViT ...).
_TABLE_NAMES = (
    *SPECIAL_TOKENS, "mask_token", "probe", "position_embeddings", "class_pos_emb", "patch_pos", "pixel_pos",
    "position_embedding_table", "relative_position_bias_table", "attention_biases", "rel_pos_h", "rel_pos_w",
    "height_rel", "width_rel",
)  # fmt: skip
_TABLE_START = "pos_embed"  # a prefix: also pos_embed_window (SAM 2) and pos_embed_0 (CrossViT)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# The number of a block, or of a stage and a block in it, in the names of transformers and timm: "layers.3.",
# "encoder.layer.3.", "encoder.stages.1.layers.0.", "encoder.layers.1.blocks.0.", "timm_model.layer1.0.",
# "encoder.block.1.0.", "timm_model.s1.b1.".
_BLOCK = re.compile(
    r"(?:^|\.)(?:stages|layers|layer|blocks|block|s)\.?(\d+)\.(?:(?:(?:layers|blocks)\.|b)?(\d+)\.)?"
)
_FIRST = re.compile(r"(^|\.)(\w*embed\w*|cls_token|reg_token|dist_token|\w*stem\w*|conv1|bn1)(\.|$)")
# Parts after the blocks. Names inside of them can match `_FIRST` (AIMv2, SAM).
_AFTER_BLOCKS = re.compile(r"(^|\.)(head|neck|classifier)\.")


@dataclass(frozen=True)
class ParameterRule:
    """Settings for the parameters whose full name contains a match of `pattern` (a regular expression).

    None keeps the setting of earlier rules.

    Attributes:
        learning_rate_scale: factor on the learning rate.
        fixed_learning_rate: whether the schedule does not apply (SimSiam's predictor).
        decay: whether weight decay applies.
        adapt: whether LARS adapts the learning rate.
        frozen_until: optimizer steps for which the parameter is frozen. Its gradient is dropped until then.
        frozen_epochs: the same in epochs. The later of the two applies.
        vectors_only: whether the rule applies only to vectors: biases and the gains of normalization layers.
    """

    pattern: str
    learning_rate_scale: float | None = None
    fixed_learning_rate: bool | None = None
    decay: bool | None = None
    adapt: bool | None = None
    frozen_until: int | None = None
    frozen_epochs: float | None = None
    vectors_only: bool = False


@dataclass(frozen=True)
class ParameterGroup:
    """The settings of a parameter after all rules. Parameters with equal settings form a parameter group."""

    learning_rate_scale: float = 1.0
    fixed_learning_rate: bool = False
    decay: bool = True
    adapt: bool = True
    frozen_until: int = 0
    frozen_epochs: float = 0.0


def assign_parameter_groups(
    model: nn.Module, rules: Iterable[ParameterRule], *, decay_all: bool = False
) -> dict[str, ParameterGroup]:
    """Return the parameter group of each trainable parameter, by name. Later rules override earlier ones.

    By default, weight decay and LARS adaptation do not apply to tokens, position tables and vectors. Vectors
    are biases and gains of normalization layers, also those with further dimensions of size 1 (ConvNeXt V2,
    Swin V2). A rule can change both, and `decay_all` changes weight decay. transformers' own default decays
    BatchNorm gains, `cls_token` and `position_embeddings`.

    Args:
        model: the method.
        rules: in order.
        decay_all: whether weight decay applies to all parameters without a rule.

    Raises:
        ValueError: a rule matches no trainable parameter. Its pattern is then probably misspelled.
    """
    rules = list(rules)
    unused = {rule.pattern for rule in rules}
    result = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, _, own_name = name.rpartition(".")
        owner = model.get_submodule(path)
        is_table = own_name in _TABLE_NAMES or own_name.startswith(_TABLE_START)
        is_table = is_table or isinstance(owner, nn.Embedding)
        is_vector = not is_table and _is_vector(parameter, owner)
        is_weight = not is_table and not is_vector
        group = ParameterGroup(decay=is_weight or decay_all, adapt=is_weight)
        for rule in rules:
            if re.search(rule.pattern, name) and (is_vector or not rule.vectors_only):
                unused.discard(rule.pattern)
                given = {f.name: getattr(rule, f.name) for f in fields(ParameterGroup)}
                group = replace(group, **{key: value for key, value in given.items() if value is not None})
        result[name] = group
    if unused:
        raise ValueError(
            f"parameter_rules: expected patterns that match a trainable parameter of {type(model).__name__}, "
            f"got {sorted(unused)}"
        )
    return result


def _is_vector(parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Return whether a parameter of the module `owner` has one number for each channel, or one for all.

    A matrix with one row is no vector, and neither is the weight of a convolution.
    """
    if parameter.ndim <= 2 or isinstance(owner, _CONVOLUTIONS):
        return parameter.ndim <= 1
    return parameter.numel() == max(parameter.shape)


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Return the depth of each parameter of an encoder, for layer-wise learning rate decay.

    Embeddings and stem have depth 0, and so have all other parameters before the first block, such as CLIP's
    LayerNorm after the embeddings. The first block has 1. Parameters after the last block are one deeper than
    it.

    Args:
        names: names of all parameters of the encoder, in its order.
    """
    blocks = {name: _block(name) for name in names}
    found = sorted({block for block in blocks.values() if block is not None})
    order = {block: number for number, block in enumerate(found, start=1)}
    depths: dict[str, int] = {}
    last = len(order) + 1
    outside = 0 if found else last  # depth of the next parameter outside of blocks
    for name, block in blocks.items():
        if block is not None:
            depths[name], outside = order[block], last
        elif _AFTER_BLOCKS.search(name):
            depths[name] = last
        else:
            depths[name] = 0 if _FIRST.search(name) else outside
    return depths


def block_count(names: Iterable[str]) -> int:
    """Return the number L of blocks of an encoder, or 0 if its blocks are not numbered."""
    return len({_block(name) for name in names} - {None})


def layer_scales(names: Collection[str], decay: float, where: str, encoder: str) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter: `decay ** (L + 1 - depth)`.

    Heads have the factor 1, and so have parameters after the last block. The last block has `decay`, also in
    an encoder without parameters after it (ResNet).

    Args:
        names: names of all parameters of the encoder.
        decay: factor from each block to the one before it.
        where: key of this value, for messages.
        encoder: name of the class of the encoder, for messages.

    Raises:
        UserError: decay is not 1 for an encoder without numbered blocks.

    Source: BEiT (2106.08254), `optim_factory.py`, and MAE, `util/lr_decay.py`.
    """
    blocks = block_count(names)
    if decay != 1 and not blocks:
        raise UserError(
            f"{where}: expected an encoder with numbered blocks, got {encoder} with no numbered blocks; "
            "leave it out"
        )
    return {name: decay ** (blocks + 1 - depth) for name, depth in layer_depths(names).items()}


def optimizer_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the parameter groups of the trained parameters for an optimizer of torch.

    Weight decay does not apply to biases, gains, tokens and position tables.

    Args:
        model: the model.
        learning_rate, weight_decay: settings of weights.
        scales: factor on the learning rate of each parameter; None: 1.
    """
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, group in assign_parameter_groups(model, []).items():
        scale = 1.0 if scales is None else scales[name]
        groups.setdefault((scale, group.decay), []).append(parameters[name])
    return [
        {"params": members, "lr": learning_rate * scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), members in groups.items()
    ]


def _block(name: str) -> tuple[int, int] | None:
    found = _BLOCK.search(name)
    return None if found is None else (int(found[1]), int(found[2] or 0))
