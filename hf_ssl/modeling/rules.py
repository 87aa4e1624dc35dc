# SPDX-License-Identifier: Apache-2.0
"""How a parameter is to be optimised, as data that a method or the optimiser's builder reads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from torch import nn

# Embedding tables that are parameters of a model but no weights of a layer (ViT, DINOv2, MAE, Swin ...).
_TABLE_NAMES = (
    "cls_token", "mask_token", "register_tokens", "distillation_token", "position_embeddings", "pos_embed",
    "relative_position_bias_table",
)  # fmt: skip


@dataclass(frozen=True)
class ParameterRule:
    """What holds for the parameters whose full name `pattern` (a regular expression) matches somewhere;
    None leaves it as it is.

    Attributes:
        learning_rate_scale: factor on the learning rate.
        fixed_learning_rate: the schedule does not apply (SimSiam's predictor).
        decay: whether weight decay applies.
        adapt: whether LARS adapts the rate.
        frozen_until: optimiser steps before the parameter starts to move; its gradient is dropped until then.
        frozen_epochs: the same in passes over the data; the later of the two counts.
        vectors_only: the rule leaves out weights and concerns what has at most one dimension: biases and the
            gains of norms.
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
class Treatment:
    """The outcome of all rules for one parameter; equal treatments share a parameter group."""

    learning_rate_scale: float = 1.0
    fixed_learning_rate: bool = False
    decay: bool = True
    adapt: bool = True
    frozen_until: int = 0
    frozen_epochs: float = 0.0


def treatments(
    model: nn.Module, rules: Iterable[ParameterRule], *, decay_all: bool = False
) -> dict[str, Treatment]:
    """The treatment of each trainable parameter, by name; later rules win.

    Biases, gains of norms (everything with at most one dimension), class and mask tokens and position
    tables are neither decayed nor adapted unless `decay_all` or a rule says so. transformers' own default
    decays BatchNorm gains, `cls_token` and `position_embeddings`.

    Raises:
        ValueError: a rule matches no parameter, which is a typing error in its pattern.
    """
    rules = list(rules)
    unused = {rule.pattern for rule in rules}
    result = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = parameter.ndim > 1 and name.rpartition(".")[2] not in _TABLE_NAMES
        treatment = Treatment(decay=is_weight or decay_all, adapt=is_weight)
        for rule in rules:
            if re.search(rule.pattern, name) and not (rule.vectors_only and parameter.ndim > 1):
                unused.discard(rule.pattern)
                given = {f.name: getattr(rule, f.name) for f in fields(Treatment)}
                treatment = replace(
                    treatment, **{key: value for key, value in given.items() if value is not None}
                )
        result[name] = treatment
    if unused:
        raise ValueError(
            f"parameter rules {sorted(unused)} match no trainable parameter of {type(model).__name__}"
        )
    return result
