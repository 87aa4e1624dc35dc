# SPDX-License-Identifier: Apache-2.0
"""Further features of an encoder beside the published one: `FEATURES` of `hf_ssl.modeling.pooling` (layer 1).

Legend: B images, S special tokens (class token, distillation token, registers), P patches, D features.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_ssl.modeling.backbones import layers
from hf_ssl.modeling.pooling import FEATURES, LAST_BLOCKS, SPECIAL_TOKENS, has_class_token, map_axes

_POOLED_FIRST = "dinov3_convnext"  # model type whose first token is the mean of the positions


class FurtherFeatures:
    """Computes further features from a forward pass of an encoder inside a `with` block.

    Hooks on the last four blocks record their outputs. transformers would return the outputs of all blocks,
    and its wrapper of timm returns them without the class token.

    Args:
        model: the encoder.
        names: the wanted features, of `FEATURES`. If none of them needs the last four blocks, there are no
            hooks.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = FEATURES) -> None:
        self._model = model
        self._blocks = layers(model)[-LAST_BLOCKS:] if any("last" in name for name in names) else []
        self._norm = _final_norm(model)
        self._special = special_tokens(model)
        self._states: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "FurtherFeatures":
        for number, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_hook(partial(self._record, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._states.clear()

    def _record(self, number: int, block: nn.Module, inputs: Any, output: Any) -> None:
        self._states[number] = output[0] if isinstance(output, tuple) else output

    def available(self, outputs: Mapping[str, Any]) -> list[str]:
        """Return the names of the features that the encoder has, from an output."""
        last = outputs.get("last_hidden_state")
        if last is None or last.ndim not in (3, 4):
            return []
        if last.ndim == 4 or not has_class_token(self._model):
            return ["tokens"]
        if last.shape[1] <= self._special:
            return ["cls"]
        names = ["cls", "cls_mean", "tokens"]
        return list(FEATURES) if self._has_last_blocks(last) else names

    def _has_last_blocks(self, last: Tensor) -> bool:
        """Return whether the recorded outputs of the blocks lead to the output of the encoder.

        This fails for an encoder whose list of blocks or final LayerNorm is another one than expected.
        """
        if len(self._states) < LAST_BLOCKS:
            return False
        state = self._states[LAST_BLOCKS - 1]
        return state.shape == last.shape and torch.allclose(
            self._norm(state).float(), last.float(), rtol=1e-2, atol=1e-2
        )

    def read(self, outputs: Mapping[str, Any], name: str) -> Tensor:
        """Return one feature (B, D), or the tokens (B, P, D), of the last forward pass.

        Args:
            outputs: the output of the encoder.
            name: one of the `available` features. "cls": the class token; "cls_mean": class token and mean of
                the patch tokens, (B, 2 D); "cls_last4": the class tokens of the last four blocks, (B, 4 D),
                the last block at the end; "cls_last4_mean": the same and the mean of the patch tokens of the
                last block, (B, 5 D); "tokens": the patch tokens, or the positions of a feature map.

        Source: DINOv2 (2304.07193), appendix B.3, and its `eval/linear.py`. The final LayerNorm is applied to
        the output of each block.
        """
        last = outputs["last_hidden_state"]
        patches = patch_tokens(self._model, last, self._special)
        if name == "tokens":
            return patches
        parts = [last[:, 0]]
        if "last" in name:
            parts = [self._norm(self._states[number][:, 0]) for number in range(LAST_BLOCKS)]
        if name.endswith("mean"):
            parts.append(patches.mean(dim=1))
        return torch.cat(parts, dim=1)


def special_tokens(model: nn.Module) -> int:
    """Return the number S of tokens before the patch tokens in the output of an encoder."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) == _POOLED_FIRST:
        return 1
    named = {name.split(".")[-1]: parameter for name, parameter in model.named_parameters()}
    tables = [named[name] for name in SPECIAL_TOKENS if name in named]
    return sum(1 if table.ndim == 1 else table.shape[-2] for table in tables)  # CLIP's class token is (D,)


def patch_tokens(model: nn.Module, last_hidden_state: Tensor, special: int) -> Tensor:
    """Return the patch tokens (B, P, D) of an encoder, or the positions of its feature map.

    Args:
        model: the encoder.
        last_hidden_state: tokens (B, S + P, D) or a feature map, whose axes `map_axes` returns.
        special: S, see `special_tokens`.
    """
    if last_hidden_state.ndim == 3:
        return last_hidden_state[:, special:]
    first, last = map_axes(model)
    return last_hidden_state.flatten(first, last).movedim(first, 1)


def _final_norm(model: nn.Module) -> nn.Module:
    """Return the normalization after the last block, which transformers names layernorm or norm."""
    inner = getattr(model, "timm_model", model)
    found = (getattr(inner, name, None) for name in ("layernorm", "norm"))
    return next((module for module in found if isinstance(module, nn.Module)), nn.Identity())
