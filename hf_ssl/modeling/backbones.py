# SPDX-License-Identifier: Apache-2.0
"""Backbones: initialize and freeze vision encoders of transformers, and return one feature vector per image.

They can also record the outputs of their layers, save memory by activation checkpoints, and use faster
attention on a CPU.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit.modeling_vit import eager_attention_forward

from hf_ssl.errors import UserError
from hf_ssl.modeling.batch_norm import unchanged_statistics
from hf_ssl.modeling.configuration import CLS_POOLER_TYPES, as_pair
from hf_ssl.modeling.pooling import pool


def feature_size(backbone: Any) -> int:
    """Return the number of dimensions of the pooled features."""
    config = backbone.config
    if config.model_type == "timm_wrapper":
        return int(backbone.timm_model.num_features)
    attributes = config.to_dict()
    if "hidden_sizes" in attributes:
        return int(attributes["hidden_sizes"][-1])
    return int(config.hidden_size)


def encode(backbone: PreTrainedModel, images: Tensor) -> Tensor:
    """Return the pooled features (N, D) of images (N, C, H, W).

    Position tables are interpolated if the images do not have the encoder's own size. Images are passed in
    channels-last format. Convolutions are fastest with it (1.3 times on a CPU), other layers are not
    affected.
    """
    arguments: dict[str, object] = {}
    if "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        own = as_pair(backbone.config.image_size)
        arguments["interpolate_pos_encoding"] = tuple(images.shape[-2:]) != own
    outputs = backbone(pixel_values=images.contiguous(memory_format=torch.channels_last), **arguments)
    return pool(outputs, model=backbone)


@torch.no_grad()
def set_identity_pooler(backbone: Any) -> None:
    """Make a ViT's pooler the identity, so that `pooler_output` is the class token.

    `AutoModel` always builds the pooler. An encoder saved without one would load with a random
    `pooler_output`, a different one each time.
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        nn.init.eye_(backbone.pooler.dense.weight)
        nn.init.zeros_(backbone.pooler.dense.bias)


def layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers or stages of an encoder, first to last: the members of its first list of modules."""
    lists = (list(m) for m in backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    return next(filter(None, lists), [])


class RecordedOutputs:
    """Records hidden states and attention weights inside a `with` block.

    Only the first pass through each layer is recorded.

    Args:
        backbone: the encoder.
        hidden_states, attentions: what is recorded.
    """

    def __init__(self, backbone: nn.Module, hidden_states: bool, attentions: bool) -> None:
        self.hidden_states: dict[int, Tensor] = {}
        self.attentions: dict[int, Tensor] = {}
        self._layers = layers(backbone) if hidden_states or attentions else []
        self._wanted = hidden_states, attentions
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "RecordedOutputs":
        hidden_states, attentions = self._wanted
        for number, layer in enumerate(self._layers):
            if hidden_states:
                self._hooks.append(layer.register_forward_hook(partial(self._record_hidden_state, number)))
            if attentions:
                for module in layer.modules():
                    self._hooks.append(module.register_forward_hook(partial(self._record_weights, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def selected_hidden_states(self, wanted: bool | Sequence[int]) -> tuple[Tensor | None, ...]:
        """Return all hidden states, or those with the wanted indices and None for the others."""
        states = list(self.hidden_states.values())
        chosen = range(len(states)) if isinstance(wanted, bool) else [index % len(states) for index in wanted]
        return tuple(state if index in chosen else None for index, state in enumerate(states))

    def _record_hidden_state(self, number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        if number == 0:
            self.hidden_states.setdefault(0, inputs[0])
        self.hidden_states.setdefault(number + 1, output[0] if isinstance(output, tuple) else output)

    def _record_weights(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            self.attentions.setdefault(number, output[1])


def supports_checkpointing(backbone: nn.Module) -> bool:
    """Return whether transformers supports activation checkpointing in this encoder."""
    return any(hasattr(module, "gradient_checkpointing") for module in backbone.modules())


def checkpoint_stages(
    backbone: nn.Module, enable: bool, checkpoint: Callable[..., Any], every_n_layers: int = 1
) -> None:
    """Make the stages of an encoder store only their outputs in training, and compute the rest again.

    It is for encoders in which transformers supports no activation checkpointing, such as ResNet and
    ConvNeXt.

    Args:
        backbone: the encoder. The method changes `forward` of its stages.
        enable: whether the stages use checkpoints from now on.
        checkpoint: `torch.utils.checkpoint.checkpoint`, possibly with options. The variant with
            `use_reentrant=False` is always used.
        every_n_layers: only every n-th stage uses checkpoints.

    Raises:
        UserError: the encoder has no stages.
    """
    stages = layers(backbone)
    if not stages:
        raise UserError(
            f"training.gradient_checkpointing: expected an encoder with stages, got "
            f"{type(backbone).__name__}; use false, and a smaller training.batch_size"
        )
    for number, stage in enumerate(stages):
        vars(stage).pop("forward", None)
        if enable and number % every_n_layers == 0:
            stage.forward = partial(_checkpointed, checkpoint, stage, stage.forward)


def _checkpointed(
    checkpoint: Callable[..., Any], stage: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any
) -> Any:
    if not (stage.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), unchanged_statistics(stage)

    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def freeze_unused(backbone: PreTrainedModel) -> None:
    """Freeze the parameters that no loss depends on.

    These are the pooler of `set_identity_pooler`, and the mask token of DINOv2 and DINOv3, which hides no
    patch here.
    """
    if backbone.config.model_type in CLS_POOLER_TYPES and backbone.pooler is not None:
        backbone.pooler.requires_grad_(False)
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def initialize_as_timm(backbone: Any) -> None:
    """Initialize a new timm encoder as timm does.

    transformers' wrapper samples the weights of every layer from N(0, 0.02). In a ResNet, timm's standard
    deviation of a convolution is up to nine times as large. timm also starts the last BatchNorm gain of a
    residual branch at zero, and the wrapper at one. So timm builds the architecture again, and this function
    copies its weights.
    """
    if backbone.config.model_type == "timm_wrapper" and not next(backbone.parameters()).is_meta:
        import timm

        fresh = timm.create_model(
            backbone.config.architecture,
            pretrained=False,
            num_classes=0,
            **(backbone.config.model_args or {}),
        )
        backbone.timm_model.load_state_dict(fresh.state_dict())


def freeze_patch_embedding(backbone: PreTrainedModel) -> None:
    """Freeze a vision transformer's patch embedding at its random initialization (MoCo v3, section 4.2).

    Other encoders are not changed.
    """
    attention = any("attn" in name or "attention" in name for name, _ in backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        if attention and re.search(r"(^|\.)patch_embed(ding|dings)?\.", name):
            parameter.requires_grad_(False)


# In bfloat16 on a CPU, torch's fused attention is slower than matrix products. For 16 to 128 images of 17 to
# 101 tokens, the products take a seventh to a quarter of the kernel's time (forward and backward). For 197
# tokens, they take three quarters (torch 2.15; `python -m training.benchmarks attention`).
ATTENTION_NAME = "sdpa_or_products"
MAX_SEQUENCE_LENGTH = 256
"""Longest sequence in tokens. Scores of longer sequences need much memory, and the kernel is not slower."""


def sdpa_or_products(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Call transformers' eager attention for short sequences in bfloat16 on a CPU, otherwise its "sdpa".

    Args:
        module: an attention module of transformers.
        query, key, value: (B, heads, tokens, dims).
        attention_mask: added to the scores, or None.
        kwargs: `scaling`, `dropout` and other arguments of transformers.

    Returns:
        The output (B, tokens, heads, dims), and the attention weights if they were computed.
    """
    slow = (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= MAX_SEQUENCE_LENGTH
    )
    attend = eager_attention_forward if slow else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, sdpa_or_products)


def choose_attention(model: nn.Module) -> None:
    """Make modules with the implementation "sdpa" use `sdpa_or_products`. Other modules do not change."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = ATTENTION_NAME
