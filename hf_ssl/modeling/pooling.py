# SPDX-License-Identifier: Apache-2.0
"""Pooling (layer 1): turns the output of an encoder into one feature vector per image.

Training, monitor, evaluation, cards and Spaces use the same rule, `pooling_rule`, so that all of them measure
and describe the same feature. This module imports neither torch nor transformers, because recipes need none.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from hf_ssl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Pooling = Literal["auto", "pooler", "cls", "mean"]
POOLINGS = get_args(Pooling)
POOLED = {"pooler": "pooler_output", "cls": "the class token", "mean": "the mean of all tokens"}
"""The feature that each pooling except "auto" returns, in words."""
CLASS_TOKENS = ("cls_token", "class_embedding")
"""Names of the parameter of the class token. The second one is that of CLIP and similar encoders."""
SPECIAL_TOKENS = (*CLASS_TOKENS, "distillation_token", "dist_token", "register_tokens", "reg_token")
"""Names of the parameters of tokens before the patch tokens, in transformers and timm."""
LAST_BLOCKS = 4
VECTORS = {
    "cls": POOLED["cls"],
    "cls_mean": "the class token and the mean of the patch tokens",
    "cls_last4": "the class tokens of the last four blocks",
    "cls_last4_mean": "the class tokens of the last four blocks and the mean of the patch tokens",
}
"""The features of DINOv2's linear probe, in words."""
FEATURES = (*VECTORS, "tokens")
"""Further features, which protocols can request; see `hf_ssl.modeling.further_features.FurtherFeatures`.

"cls" is also a pooling. "tokens" are the patch tokens themselves.
"""


def declare_feature(encoder: "PreTrainedModel", pooling: Pooling) -> None:
    """Record in an encoder's config, and so in `config.json`, which output the method publishes as feature.

    Args:
        encoder: its config gets the attribute `published_feature`, unless `pooling` is "auto".
        pooling: see `pool`.
    """
    if pooling != "auto":
        encoder.config.published_feature = pooling


def declare_patch_grid(encoder: "PreTrainedModel", grid: Sequence[int] | None) -> None:
    """Record in an encoder's config that the mean feature of a grid of patches is a second feature (CPC).

    Args:
        encoder: its config gets the attribute `published_patch_grid`. None deletes this attribute, which an
            encoder has if CPC trained it before.
        grid: side and distance of the patches, in pixels of the encoder's input.
    """
    if grid is not None:
        encoder.config.published_patch_grid = list(grid)
    elif declared_patch_grid(encoder) is not None:
        del encoder.config.published_patch_grid


def declared_patch_grid(model: "nn.Module") -> list[int] | None:
    """Return side and distance of patches that `declare_patch_grid` recorded for an encoder, or None."""
    return getattr(getattr(model, "config", None), "published_patch_grid", None)


def pooling_rule(model: "nn.Module", outputs: Mapping[str, Any]) -> Pooling:
    """Return the pooling that "auto" means for an encoder.

    It is the feature that the method of the encoder declares (`declare_feature`): "mean" for MAE and I-JEPA.
    Without a declaration, it is "pooler" if the encoder returns `pooler_output` (ResNet, ConvNeXt V2, Swin,
    ViT, DINOv2, timm). Else it is `rule_without_pooler`.

    Args:
        model: the encoder.
        outputs: an output of the encoder.
    """
    declared = getattr(getattr(model, "config", None), "published_feature", None)
    if declared in POOLED:
        return declared
    return "pooler" if _is_pooled(outputs.get("pooler_output")) else rule_without_pooler(model)


def _is_pooled(output: Any) -> bool:
    """Return whether a `pooler_output` is one vector per image, such as (B, D) or (B, D, 1, 1).

    With `global_pool=""`, models of timm return all tokens (B, T, D) or a map (B, D, H, W) instead.
    """
    return output is not None and all(size == 1 for size in output.shape[2:])


def rule_without_pooler(model: "nn.Module") -> Pooling:
    """Return "cls" if an encoder has a class token (MSN), else "mean".

    It is also "mean" if the config says that the feature is a mean of tokens (BEiT, Data2Vec). Such an
    encoder has a class token that no loss trained.
    """
    averages = getattr(getattr(model, "config", None), "use_mean_pooling", False)
    return "cls" if has_class_token(model) and not averages else "mean"


def has_class_token(model: "nn.Module") -> bool:
    """Return whether an encoder has a parameter for the class token."""
    return any(name.split(".")[-1] in CLASS_TOKENS for name, _ in model.named_parameters())


def map_axes(model: "nn.Module | None") -> tuple[int, int]:
    """Return the axes of the positions in the feature map of an encoder.

    They are (2, 3), for maps (B, D, H, W), except for some models of timm (Swin), which return (B, H, W, D).
    """
    timm_model = getattr(model, "timm_model", None)
    return (1, 2) if getattr(timm_model, "output_fmt", "NCHW") == "NHWC" else (2, 3)


def pool(outputs: Mapping[str, Any], pooling: Pooling = "auto", model: "nn.Module | None" = None) -> "Tensor":
    """Return one feature vector per image from the output of an encoder.

    Args:
        outputs: the output of a transformers vision encoder.
        pooling: "pooler": `pooler_output`, flattened because that of a ResNet is (B, D, 1, 1); "cls": the
            first token; "mean": the mean of all tokens (B, T, D), or of all positions of a feature map
            (B, D, H, W); "auto": see `pooling_rule`.
        model: the encoder, which "auto" needs if `outputs` contains no `pooler_output`, and "mean" for a
            feature map of timm.

    Returns:
        Features (B, D) in the precision of the output.

    Raises:
        UserError: `outputs` does not contain what `pooling` needs.
    """
    if pooling == "auto":
        if model is None and outputs.get("pooler_output") is None:
            raise UserError(
                "pooling: expected 'cls' or 'mean' for an output without pooler_output, got 'auto'"
            )
        pooling = "pooler" if model is None else pooling_rule(model, outputs)
    source = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    values = outputs.get(source)
    if values is None:
        raise UserError(f"pooling: expected an encoder that returns {source} for {pooling!r}, got none")
    if pooling == "pooler":
        return values.flatten(1)
    if pooling == "mean":
        first, last = (1, 1) if values.ndim == 3 else map_axes(model)
        return values.flatten(first, last).mean(dim=first)
    if pooling == "cls":
        if values.ndim != 3:
            raise UserError(f"pooling: expected tokens (B, T, D) for 'cls', got {tuple(values.shape)}")
        if model is not None and not has_class_token(model):
            raise UserError(
                f"pooling: expected an encoder with a class token for 'cls', got {type(model).__name__}; use "
                "'mean' or 'auto'"
            )
        return values[:, 0]
    raise UserError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
