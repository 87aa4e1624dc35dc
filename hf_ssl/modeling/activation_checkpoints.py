# SPDX-License-Identifier: Apache-2.0
"""Activation checkpoints for any encoder: segments store only their outputs, and compute the rest again."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import encode, example_images
from hf_ssl.modeling.batch_norm import batch_norms, unchanged_statistics
from hf_ssl.modeling.eval_mode import copy_without_values


def supports_checkpointing(backbone: nn.Module) -> bool:
    """Return whether transformers' activation checkpointing works correctly for this encoder.

    transformers updates BatchNorm statistics a second time when it recomputes activations (MobileViT).
    """
    return not batch_norms(backbone) and any(
        hasattr(module, "gradient_checkpointing") for module in backbone.modules()
    )


def checkpoint_segments(
    backbone: Any, enable: bool, checkpoint: Callable[..., Any], every_n_layers: int = 1
) -> None:
    """Make segments of an encoder store only their outputs, and recompute the rest in the backward pass.

    It is for encoders whose activation checkpointing in transformers is missing or wrong
    (`supports_checkpointing`): ResNet, ConvNeXt, and all encoders of timm. Gradients and the statistics of
    BatchNorm do not change.

    Args:
        backbone: the encoder. The function changes `forward` of its segments.
        enable: whether the segments use activation checkpoints.
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
    """Return the names of the modules of an encoder whose activations are recomputed.

    A forward pass on the meta device counts the output elements of each module. Segments are the largest
    modules whose inner layers have at most `limit` output elements together. The limit with the lowest memory
    is chosen. This memory contains the outputs of segments and of layers outside of them, and the recomputed
    layers of the largest segment. The choice does not depend on the names and the nesting of modules. Modules
    that receive a list (DenseNet, HRNet) are not segments, because the list can change before the second
    pass.

    Returns:
        Names, first to last; empty if segments save less than a tenth of the memory (VGG), or if operations
        of the encoder depend on values.
    """
    copied: Any = copy_without_values(backbone)
    returned: dict[str, int] = {}
    for name, module in copied.named_modules():
        module.register_forward_hook(partial(_count_numbers, returned, name), with_kwargs=True)
    try:
        encode(copied, example_images(copied))
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
