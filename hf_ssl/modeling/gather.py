# SPDX-License-Identifier: Apache-2.0
"""Communication between processes: gathering with gradient, sums, barriers.

No other file uses process groups.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SECONDS_TO_FREE = 0.5
_BYTES_AT_ONCE = 2**26
_shares_work = False


def process_count() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the number of this process; 0 without a process group."""
    return dist.get_rank() if process_count() > 1 else 0


@contextmanager
def joined_processes(device_type: str) -> Iterator[None]:
    """Join the processes that torchrun or accelerate launch has started, for the duration of the block.

    Nothing happens if the environment describes one process, or if a process group exists.

    Args:
        device_type: "cpu", "cuda", ... With CUDA, each process uses the device of its local rank.
    """
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    global _shares_work
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    _shares_work = True
    try:
        yield
        wait_for_all()
    finally:  # also after an error, which most often stops all processes at the same place
        _shares_work = False
        _wait_for_threads()
        dist.destroy_process_group()


def work_is_shared() -> bool:
    """Return whether this process runs in `joined_processes` with others.

    All these processes call the same functions. In other process groups, one process may call a function
    alone.
    """
    return _shares_work and process_count() > 1


def is_first_on_machine() -> bool:
    """Return whether no other process of this machine has a lower rank."""
    return process_count() == 1 or os.environ.get("LOCAL_RANK", str(process_rank())) == "0"


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all W processes, concatenated in the order of ranks (W * B, ...), with gradient.

    The gradient of a row is the sum of its gradients on all processes. DDP averages over processes. So a loss
    that every process computes from all rows has exactly the gradient of one process with the whole batch.

    Args:
        tensor: (B, ...), with one shape on all processes. A single process gets the tensor itself.
    """
    return _Gather.apply(tensor) if process_count() > 1 else tensor


def shuffle_over_processes(tensor: Tensor, *, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Shuffle rows over all processes, without gradient.

    Args:
        tensor: (B, ...), with one shape on all processes.
        seed: seed of the order, the same on all processes.

    Returns:
        This process's rows (B, ...) after shuffling, and a function that restores the order: it maps results
        (B, ...) of the shuffled rows to results of the original rows.
    """
    count, rank = process_count(), process_rank()
    total = len(tensor) * count
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(tensor.device)

    def select(rows: Tensor, index: Tensor) -> Tensor:
        return gather(rows.detach())[index.chunk(count)[rank]]

    return select(tensor, order), lambda results: select(results, order.argsort())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors of all processes, with gradient.

    A single process gets the tensor itself.
    """
    return _Sum.apply(tensor) if process_count() > 1 else tensor


def own_share(count: int) -> slice:
    """Return the slice of `count` rows that this process computes, if all processes hold all rows."""
    rank = process_rank()
    size = -(-count // process_count())
    return slice(min(count, rank * size), min(count, (rank + 1) * size))


def mean_over_processes(scalars: list[Tensor]) -> list[float]:
    """Return the mean of each scalar over the processes, in one operation. The host waits for the device."""
    if not scalars:
        return []
    stacked = torch.stack([scalar.float() for scalar in scalars])
    if process_count() > 1:
        dist.all_reduce(stacked)
    means: list[float] = (stacked / process_count()).tolist()
    return means


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes, as DDP does after its own backward pass."""
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        flat /= process_count()
        for gradient, part in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(part.view_as(gradient))


def wait_for_all() -> None:
    """Wait until every process calls this function. A single process does not wait."""
    if process_count() > 1:
        dist.barrier()


def finish_communication() -> None:
    """Wait for all processes, and for their threads, before the process group is destroyed.

    Otherwise gloo can hang (torch 2.6, on a busy machine). The destruction of the group waits for a thread of
    gloo. That thread waits for the interpreter lock, because it frees a tensor of the last operation.
    """
    wait_for_all()
    _wait_for_threads()


def _wait_for_threads() -> None:
    if process_count() > 1 and dist.get_backend() == "gloo":
        time.sleep(_SECONDS_TO_FREE)


def min_over_processes(number: int, device: torch.device) -> int:
    """Return the smallest number of all processes. With several, the host waits for the device."""
    if process_count() == 1:
        return number
    smallest = torch.tensor(number, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest.item())


def from_first_process(value: Any) -> Any:
    """Return the value of the main process on every process. The value must be picklable."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def from_every_process(value: Any) -> list[Any]:
    """Return the values of all processes in the order of ranks. The values must be picklable."""
    values = [value] * process_count()
    if process_count() > 1:
        dist.all_gather_object(values, value)
    return values


def join_rows(rows: Tensor | None, device: torch.device) -> Tensor:
    """Return the rows of all processes on the CPU, concatenated in the order of ranks, without gradient.

    Args:
        rows: (N, ...) on the CPU. N may differ between processes. None: this process has no rows.
        device: device of this process, for the communication.
    """
    shapes = from_every_process(None if rows is None else (rows.shape, rows.dtype))
    size, dtype = next(shape for shape in shapes if shape is not None)
    counts = [0 if shape is None else shape[0][0] for shape in shapes]
    joined = torch.empty(sum(counts), *size[1:], dtype=dtype)
    at_once = max(1, _BYTES_AT_ONCE // max(1, joined[:1].nbytes))
    channel = device if process_count() > 1 and dist.get_backend() == "nccl" else torch.device("cpu")
    for rank, own in enumerate(joined.split(counts)):
        if rank == process_rank() and rows is not None:
            own.copy_(rows)
        if process_count() > 1:
            for part in own.split(at_once) if len(own) else ():
                moved = part.to(channel)
                dist.broadcast(moved, src=rank)
                part.copy_(moved)
    return joined


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on any process."""
    return not min_over_processes(int(not flag), device)


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
