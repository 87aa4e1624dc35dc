# SPDX-License-Identifier: Apache-2.0
"""Trains on batches that do not fit into memory, for losses that need the whole batch at once.

Loss and gradients equal those of the whole batch up to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_ssl.errors import UserError
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.outputs import SSLOutput

Inputs = dict[str, Tensor]


def cached_backward(
    model: SSLPreTrainedModel,
    chunks: list[Callable[[], Inputs]],
    *,
    backward: Callable[[Tensor], None],
    precision: Callable[[], AbstractContextManager[Any]],
) -> SSLOutput:
    """Loss of a whole batch and its gradient, while the activations of one chunk exist at a time.

    1. Embed each chunk without a graph and keep the embeddings alone. 2. Compute the loss of all of them
    together, and its gradient with respect to each. 3. Embed each chunk again with the same random draws,
    now with a graph, and send its share of that gradient through it. Each image is encoded twice forward
    and once backward: about a third more arithmetic, for memory that grows with the chunk.

    Equal to one forward and backward pass of the whole batch wherever images do not see each other inside
    `embed`. BatchNorm does see them: its statistics are those of a chunk (over all processes, if
    synchronised), the same in both passes, and its running statistics move once for each chunk. Queues and
    centres move once for the batch. Gradients are added to `.grad` and are not averaged over processes.

    Args:
        model: the method itself, not wrapped for several processes.
        chunks: each makes the model's inputs of some images, the same ones whenever it is called.
        backward: how a loss is sent backwards, `Tensor.backward` or one that scales it.
        precision: makes the context of a forward pass (autocast); a new one for each, since autocast keeps
            the weights that it has cast, without a graph if it met them in the first pass.

    Source: Gao et al., arXiv:2101.06983, section 3.2.
    """
    states, parts = [], []
    for inputs in chunks:
        states.append(_RandomState.now())
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
    after = _RandomState.now()
    for number, (inputs, state) in enumerate(zip(chunks, states, strict=True)):
        state.restore()
        with running_statistics_kept(model), precision():
            embeddings = model.embed(inputs())
        wanted = {name: share[number] for name, share in shares.items() if embeddings[name].requires_grad}
        torch.autograd.backward([embeddings[name] for name in wanted], list(wanted.values()))
    after.restore()
    return SSLOutput(loss=loss.detach(), terms=output.terms)


def check_chunks_help(model: SSLPreTrainedModel) -> None:
    """Raise `UserError` for a loss that is a mean over images: accumulation does the same for less."""
    if not model.couples_samples:
        raise UserError(
            f"training.contrastive_chunk_size: the loss of {type(model).__name__} compares no images with "
            "each other, and training.gradient_accumulation_steps takes less memory and time"
        )


def _leaf(tensor: Tensor) -> Tensor:
    """Where the graph of the loss begins."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


class _RandomState:
    """The state of the generators that layers such as dropout draw from: the CPU's and the accelerator's."""

    def __init__(self, cpu: Tensor, accelerator: Tensor | None) -> None:
        self.cpu, self.accelerator = cpu, accelerator

    @classmethod
    def now(cls) -> "_RandomState":
        module = _accelerator_module()
        return cls(torch.get_rng_state(), None if module is None else module.get_rng_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        module = _accelerator_module()
        if module is not None:
            module.set_rng_state(self.accelerator)


def _accelerator_module() -> Any:
    """`torch.cuda`, `torch.xpu` or `torch.mps`; None without an accelerator."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm; it still normalizes with the statistics of the batch."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
