# SPDX-License-Identifier: Apache-2.0
"""Computes gradients of batches that do not fit into memory, for losses that need the whole batch at once.

Without BatchNorm, loss and gradients equal those of the whole batch up to rounding.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from hf_ssl.errors import UserError
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.batch_norm import unchanged_statistics
from hf_ssl.modeling.eval_mode import RandomState
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.trainer.arguments import SSLTrainingArguments

logger = logging.getLogger(__name__)

Inputs = dict[str, Tensor]


def cached_backward(
    model: SSLPreTrainedModel,
    chunks: list[Callable[[], Inputs]],
    *,
    backward: Callable[[Tensor], None],
    precision: Callable[[], AbstractContextManager[Any]],
) -> SSLOutput:
    """Return the loss of a whole batch, and add its gradient to `.grad`.

    Only the activations of one chunk are in memory at a time. There are three steps. First, each chunk is
    embedded without a graph. Second, the loss of all embeddings and its gradient with respect to each
    embedding are computed. Third, each chunk is embedded again with a graph and the same random state, and
    its part of the gradient is propagated back. Each image needs two forward passes and one backward pass,
    which is about a third more computation. Memory grows with the chunk, not with the batch.

    The result equals that of one forward and backward pass if `embed` treats images independently. BatchNorm
    does not: it uses the statistics of a chunk (over all processes, if synchronized) in both forward passes.
    Its running statistics are updated once per chunk. Queues and centers are updated once per batch.
    Gradients are not averaged over processes.

    Args:
        model: the model of the method, without a wrapper for several processes.
        chunks: each function returns the model inputs of one chunk. Every call returns the same inputs.
        backward: runs the backward pass of a loss: `Tensor.backward`, or a function that scales the loss.
        precision: returns a new context for each forward pass (autocast). Autocast caches the weights that it
            casts. A cache from the first forward pass would have no graph.

    Source: Gao et al., arXiv:2101.06983, section 3.2.
    """
    states, parts = [], []
    device = next(model.parameters()).device
    for inputs in chunks:
        states.append(RandomState(device))
        with torch.no_grad(), precision():
            parts.append(model.embed(inputs()))
    sizes = [len(next(iter(part.values()))) for part in parts]
    leaves = {name: _leaf(torch.cat([part[name] for part in parts])) for name in parts[0]}
    del parts
    with precision():
        output = model.loss_from_embeddings(leaves)
    loss = cast(Tensor, output.loss)
    backward(loss)
    shares = {name: leaf.grad.split(sizes) for name, leaf in leaves.items() if leaf.grad is not None}
    after = RandomState(device)
    for number, (inputs, state) in enumerate(zip(chunks, states, strict=True)):
        state.restore()
        with unchanged_statistics(model), precision():
            embeddings = model.embed(inputs())
        wanted = {name: share[number] for name, share in shares.items() if embeddings[name].requires_grad}
        torch.autograd.backward([embeddings[name] for name in wanted], list(wanted.values()))
    after.restore()
    return SSLOutput(loss=loss.detach(), terms=output.terms)


def check_chunking(model: SSLPreTrainedModel, *, own_loss: bool = False) -> None:
    """Raise `UserError` for a loss that is a mean over images, or for a loss that the trainer defines.

    For a mean over images, gradient accumulation gives the same result with less memory and time.

    Args:
        model: the model of the method.
        own_loss: whether the user defines `compute_loss` or `compute_loss_func`, which chunks do not call.
    """
    if own_loss:
        raise UserError(
            "training.contrastive_chunk_size: expected no value with another compute_loss, which chunks do "
            "not call, got a number; define `objective` of the method"
        )
    if not model.couples_samples:
        raise UserError(
            f"training.contrastive_chunk_size: expected no value, because the loss of {type(model).__name__} "
            "compares no images with each other, got a number; use training.gradient_accumulation_steps"
        )


def warn_about_accumulation(model: SSLPreTrainedModel, args: SSLTrainingArguments) -> None:
    """Log a warning if gradient accumulation changes a loss that compares images with each other."""
    parts, size = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if parts > 1 and model.compares_images(model.config) and args.contrastive_chunk_size is None:
        logger.warning(
            "training.gradient_accumulation_steps=%d: the loss compares only the %d images of a micro-batch; "
            "training.contrastive_chunk_size=%d without accumulation compares all images of the batch with "
            "the same memory", parts, size, size,
        )  # fmt: skip


def _leaf(tensor: Tensor) -> Tensor:
    """Return a leaf tensor, at which the graph of the loss begins."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())
