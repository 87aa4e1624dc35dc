# SPDX-License-Identifier: Apache-2.0
"""Backbones: initialize and freeze vision encoders of transformers, and return one feature vector per image.

They can also record the outputs of their layers, save memory by activation checkpoints, and use faster
attention on a CPU.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vit.modeling_vit import eager_attention_forward
from transformers.utils import logging

from hf_ssl.errors import UserError, one_line
from hf_ssl.modeling.batch_norm import batch_norms, unchanged_statistics
from hf_ssl.modeling.configuration import CLS_POOLER_TYPES, as_pair
from hf_ssl.modeling.eval_mode import copy_without_values, evaluation_mode
from hf_ssl.modeling.pooling import pool

logger = logging.get_logger(__name__)  # of transformers, which can warn once

_TIMM_STATES = "forward_intermediates"
"""Method of the models of timm that returns hidden states. A few models lack it."""
_feature_sizes: dict[str, int] = {}


def feature_size(backbone: Any) -> int:
    """Return the number of dimensions of the pooled features.

    A pass without values measures it, because configs name it differently or not at all (EfficientNet,
    MobileNetV2, MobileViT, timm's MobileNetV3). `hidden_size` counts if operations of the encoder depend on
    values.

    Raises:
        UserError: the encoder has no output that can be pooled, or the pass fails and the config has no
            `hidden_size`.
    """
    key = f"{type(backbone)} {backbone.config.to_json_string(use_diff=False)}"
    if key not in _feature_sizes:
        copied: Any = copy_without_values(backbone)
        try:
            _feature_sizes[key] = encode(copied, _example_images(copied)).shape[1]
        except RuntimeError as error:
            size = backbone.config.to_dict().get("hidden_size")
            if size is None:
                raise UserError(
                    "backbone: expected an encoder with a working forward pass, got "
                    f"{backbone.config.model_type} with the error: {str(error).partition(chr(10))[0][:150]}"
                ) from error
            return int(size)
    return _feature_sizes[key]


def _example_images(copied: Any) -> Tensor:
    """Return images (2, C, H, W) of the size that an encoder expects, without values."""
    config = copied.config
    if config.model_type == "timm_wrapper":
        arguments = config.model_args or {}
        channels = arguments.get("in_chans", 3)
        size = arguments.get("img_size") or copied.timm_model.pretrained_cfg["input_size"][1:]
    else:
        known = config.to_dict()
        channels, size = known.get("num_channels", 3), known.get("image_size") or 224
    return torch.empty(2, channels, *as_pair(size), device="meta")


def check_image_sizes(backbone: Any, sizes: Iterable[int], channels: int) -> None:
    """Check that an encoder can encode square images of these sizes, by a pass without values.

    If this pass fails, a pass with zeros decides, because operations of an encoder can depend on values.

    Args:
        backbone: the encoder, possibly on the device "meta".
        sizes: sides of the images, in pixels.
        channels: number of channels of the images.

    Raises:
        UserError: it cannot.
    """
    sides = sorted(set(sizes))
    for model in (copy_without_values(backbone), backbone):
        device = next(model.parameters()).device
        try:
            with evaluation_mode(model):
                for side in sides:
                    encode(cast(Any, model), torch.zeros(2, channels, side, side, device=device))
        except NotImplementedError:
            return  # the encoder has an operation that cannot run on shapes alone
        except Exception as error:  # the code of another library may raise anything
            if model is backbone or next(backbone.parameters()).is_meta:
                raise UserError(
                    f"backbone: expected an encoder for views of {sides} pixels, got "
                    f"{backbone.config.model_type}: {type(error).__name__} {one_line(error)[:200]}"
                ) from error
        else:
            return


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
    """Return the blocks of a vision transformer, first to last: the members of its first list of modules."""
    lists = (list(m) for m in backbone.modules() if isinstance(m, nn.ModuleList | nn.Sequential))
    return next(filter(None, lists), [])


class RecordedOutputs:
    """Records hidden states and attention weights inside a `with` block.

    They are those that the encoder's own forward pass returns. If a method calls only the blocks of a vision
    transformer (MAE), they are those of the blocks. Only the first pass is recorded.

    Args:
        backbone: the encoder.
        hidden_states: whether hidden states are recorded, or the indices of those that are wanted.
        attentions: whether attention weights are recorded.

    Raises:
        UserError: `hidden_states` is neither a bool nor indices, or the encoder does not return the wanted
            outputs. The encoder's forward pass and the properties raise it too.
    """

    def __init__(
        self, backbone: PreTrainedModel, hidden_states: bool | Sequence[int] | None, attentions: bool | None
    ) -> None:
        self._backbone, self._indices = backbone, _indices(hidden_states)
        self._wanted = {
            name: True
            for name, wanted in (
                ("output_hidden_states", hidden_states is True or self._indices is not None),
                ("output_attentions", attentions),
            )
            if wanted
        }
        self._own: Any = None
        self._states: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        if self._wanted:
            self._check_encoder()

    def __enter__(self) -> "RecordedOutputs":
        if self._wanted:
            self._hooks += [
                self._backbone.register_forward_pre_hook(self._request, with_kwargs=True),
                self._backbone.register_forward_hook(self._record_own),
            ]
            for number, layer in enumerate(layers(self._backbone)):
                self._hooks.append(layer.register_forward_hook(partial(self._record_state, number)))
                for module in layer.modules():
                    self._hooks.append(module.register_forward_hook(partial(self._record_weights, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def hidden_states(self) -> tuple[Tensor | None, ...] | None:
        """Return all hidden states, or those with the wanted indices and None for the others.

        None if hidden states are not recorded.
        """
        if "output_hidden_states" not in self._wanted:
            return None
        states = self._found("hidden_states", self._states)
        if self._indices is None:
            return states
        count = len(states)
        wrong = [index for index in self._indices if not -count <= index < count]
        if wrong:
            raise UserError(
                f"output_hidden_states: expected indices from {-count} to {count - 1} for "
                f"{type(self._backbone).__name__}, got {wrong[0]}"
            )
        chosen = {index % count for index in self._indices}
        return tuple(state if index in chosen else None for index, state in enumerate(states))

    @property
    def attentions(self) -> tuple[Tensor, ...] | None:
        """Return the attention weights of each layer. None if they are not recorded.

        The result is () if `attn_implementation` is not "eager".
        """
        return self._found("attentions", self._weights) if "output_attentions" in self._wanted else None

    def _found(self, name: str, of_layers: dict[int, Tensor]) -> tuple[Tensor, ...]:
        found = tuple(of_layers.values()) if self._own is None else tuple(self._own.get(name) or ())
        if not found and (name == "hidden_states" or self._computes_weights):
            raise UserError(
                f"output_{name}: expected an encoder that returns {name}, got "
                f"{type(self._backbone).__name__}; use false"
            )
        return found

    @property
    def _computes_weights(self) -> bool:
        return self._backbone.config._attn_implementation in ("eager", None)

    def _check_encoder(self) -> None:
        """Raise `UserError` for outputs that transformers omits or that end in its own error."""
        kind, attention = type(self._backbone).__name__, self._backbone.config._attn_implementation
        timm = self._backbone.config.model_type == "timm_wrapper"
        for name in self._wanted:
            if timm and (name == "output_attentions" or not hasattr(self._backbone.timm_model, _TIMM_STATES)):
                raise UserError(f"{name}: expected false for this encoder of timm, got true")
            if name == "output_attentions" and not self._computes_weights:  # no error, as in transformers
                logger.warning_once(
                    f'output_attentions: expected attn_implementation="eager", which computes the weights, '
                    f'got "{attention}" in {kind}; call model.set_attn_implementation("eager")'
                )

    def _request(self, backbone: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        return (inputs, named | self._wanted) if self._own is None else (inputs, named)

    def _record_own(self, backbone: nn.Module, inputs: Any, output: Any) -> None:
        if self._own is None:
            self._own = output
            _ = self.hidden_states, self.attentions  # an error must not follow an update of the memory

    def _record_state(self, number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        if number == 0 and inputs:
            self._states.setdefault(0, inputs[0])
        self._states.setdefault(number + 1, output[0] if isinstance(output, tuple) else output)

    def _record_weights(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            self._weights.setdefault(number, output[1])


def _indices(wanted: object) -> list[int] | None:
    """Return the indices of wanted hidden states, or None for a bool or None."""
    if wanted is None or isinstance(wanted, bool):
        return None
    if isinstance(wanted, Sequence) and all(type(index) is int for index in wanted):
        return [int(index) for index in wanted]
    raise UserError(f"output_hidden_states: expected true, false or indices such as [0, -1], got {wanted!r}")


def supports_checkpointing(backbone: nn.Module) -> bool:
    """Return whether transformers' activation checkpointing is right for this encoder.

    transformers updates the statistics of BatchNorm a second time when it computes activations again
    (MobileViT).
    """
    return not batch_norms(backbone) and any(
        hasattr(module, "gradient_checkpointing") for module in backbone.modules()
    )


def checkpoint_segments(
    backbone: Any, enable: bool, checkpoint: Callable[..., Any], every_n_layers: int = 1
) -> None:
    """Make segments of an encoder store only their outputs in training, and compute the rest again.

    It is for encoders whose activation checkpointing in transformers is missing or wrong
    (`supports_checkpointing`): ResNet, ConvNeXt, and all encoders of timm. Gradients and the statistics of
    BatchNorm do not change.

    Args:
        backbone: the encoder. The function changes `forward` of its segments.
        enable: whether the segments use checkpoints from now on.
        checkpoint: `torch.utils.checkpoint.checkpoint`, possibly with options. The variant with
            `use_reentrant=False` is always used.
        every_n_layers: only every n-th segment uses checkpoints.

    Raises:
        UserError: no segments save memory.
    """
    for module in backbone.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func is _checkpointed:
            del module.forward
    if not enable:
        return
    modules = dict(backbone.named_modules())
    names = find_segments(backbone) if len(modules) > 1 else []
    if not names:
        raise UserError(
            "training.gradient_checkpointing: expected an encoder with blocks that store activations, got "
            f"{type(backbone).__name__}; use false, and a smaller training.batch_size"
        )
    for segment in (modules[name] for name in names[::every_n_layers]):
        segment.forward = partial(_checkpointed, checkpoint, segment, segment.forward)


def find_segments(backbone: Any) -> list[str]:
    """Return the names of the modules of an encoder whose activations are computed again.

    A pass without values measures how many numbers each module returns. Segments are the largest modules
    whose inner layers together return at most a limit of numbers. The limit minimizes the memory: what
    layers outside of segments and the segments return, and the inner layers of the largest segment, which
    exist again during the backward pass. This does not depend on the names and the nesting of modules.
    Modules that receive a list (DenseNet, HRNet) are no segments, because the list can change before the
    second pass.

    Returns:
        Names, first to last; empty if segments save less than a tenth of the memory (VGG), or if operations
        of the encoder depend on values.
    """
    copied: Any = copy_without_values(backbone)
    returned: dict[str, int] = {}
    for name, module in copied.named_modules():
        module.register_forward_hook(partial(_count_numbers, returned, name), with_kwargs=True)
    try:
        encode(copied, _example_images(copied))
    except RuntimeError:
        return []
    inner: dict[str, int] = {}
    for name, module in copied.named_modules():
        parent = name
        while parent and not list(module.children()):
            parent = parent.rpartition(".")[0]
            inner[parent] = inner.get(parent, 0) + returned.get(name, 0)
    found: list[str] = []
    total = inner.pop("")
    least = 0.9 * total
    # Lists of modules return nothing. A module with one layer saves nothing.
    inner = {name: size for name, size in inner.items() if size > returned.get(name, size)}
    for limit in sorted(set(inner.values()), reverse=True):
        chosen: list[str] = []
        for name, _ in copied.named_modules():
            if inner.get(name, limit + 1) <= limit and not (chosen and name.startswith(f"{chosen[-1]}.")):
                chosen.append(name)
        saved = sum(inner[name] - returned[name] for name in chosen)
        needed = total - saved + max(inner[name] for name in chosen)
        if needed < least:
            least, found = needed, chosen
    return found


def _count_numbers(
    returned: dict[str, int], name: str, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any
) -> None:
    """Add the size of a module's output, unless it is a module with layers that receives a list."""
    if not list(module.children()) or not any(
        isinstance(value, list | tuple | dict) for value in (*inputs, *named.values())
    ):
        outputs = output if isinstance(output, tuple | list) else [output]
        count = sum(tensor.numel() for tensor in outputs if isinstance(tensor, Tensor))
        returned[name] = returned.get(name, 0) + count


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
