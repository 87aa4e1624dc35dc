# SPDX-License-Identifier: Apache-2.0
"""The only file that knows of other processes: gathering with gradient, and sums over processes."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SECONDS_TO_FREE = 0.5


def process_count() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the processes' tensors along the first dimension, in the order of their ranks, with
    gradient.

    The gradient of a row is the sum of what all processes want of it. Under DDP, which averages over W
    processes, a loss that every process computes from all rows therefore has exactly the gradient of one
    process that holds the whole batch.

    Args:
        tensor: (B, ...), of one shape on all processes.

    Returns:
        (W * B, ...); the tensor itself in a single process.
    """
    return _Gather.apply(tensor) if process_count() > 1 else tensor


def in_another_order(tensor: Tensor, *, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Deal the processes' rows out anew, without gradient.

    Args:
        tensor: (B, ...), of one shape on all processes.
        seed: of the order, the same on all processes.

    Returns:
        This process's rows of the new order, (B, ...), and a function that brings what was made of them, (B,
        ...), back to where the rows came from.
    """
    count, rank = process_count(), dist.get_rank() if process_count() > 1 else 0
    total = len(tensor) * count
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(tensor.device)

    def mine(rows: Tensor, wanted: Tensor) -> Tensor:
        return gather(rows.detach())[wanted.chunk(count)[rank]]

    return mine(tensor, order), lambda made: mine(made, order.argsort())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum of the processes' tensors, the same on each, with gradient; the tensor itself in a single
    process.
    """
    return _Sum.apply(tensor) if process_count() > 1 else tensor


def own_share(count: int) -> slice:
    """Which of `count` rows that all processes hold are this one's to work on; everything in a single
    process.
    """
    rank = dist.get_rank() if process_count() > 1 else 0
    size = -(-count // process_count())
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def mean_over_processes(scalars: list[Tensor]) -> list[float]:
    """Mean of each scalar over the processes, in one exchange; waits for the device."""
    if not scalars:
        return []
    stacked = torch.stack([scalar.float() for scalar in scalars])
    if process_count() > 1:
        dist.all_reduce(stacked)
    means: list[float] = (stacked / process_count()).tolist()
    return means


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Make every gradient the mean over the processes, as DDP does after a backward pass of its own."""
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for alike in _by_dtype(gradients):
        flat = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(flat)
        flat /= process_count()
        for gradient, part in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [[t for t in tensors if t.dtype == dtype] for dtype in dict.fromkeys(t.dtype for t in tensors)]


def wait_for_all() -> None:
    """Return when every process has come here; at once in a single process."""
    if process_count() > 1:
        dist.barrier()


def finish_communication() -> None:
    """Wait for all processes, and for their threads, before the process group is destroyed.

    Otherwise gloo can hang (torch 2.6, on a busy machine): the destruction of the group waits for a thread,
    while this thread waits for the lock of the interpreter, to free a tensor of the last operation.
    """
    if process_count() > 1:
        dist.barrier()
        if dist.get_backend() == "gloo":
            time.sleep(_SECONDS_TO_FREE)


def min_over_processes(number: int, device: torch.device) -> int:
    """The smallest of the processes' numbers, the same on each; waits for the device where there are
    several.
    """
    if process_count() == 1:
        return number
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least.item())


def from_first_process(value: Any) -> Any:
    """Return the value of the main process on every process. The value must be picklable."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process."""
    if process_count() == 1:
        return flag
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return bool(count.item())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(process_count())
        ]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(process_count())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
