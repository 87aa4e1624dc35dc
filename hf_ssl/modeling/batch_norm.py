# SPDX-License-Identifier: Apache-2.0
"""Three variants of BatchNorm: statistics of all processes, statistics of parts of a batch, no offset."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from hf_ssl.errors import UserError
from hf_ssl.losses.upcasting import upcast, without_autocast
from hf_ssl.modeling.gather import process_count, sum_over_processes

Layer = TypeVar("Layer", bound="_AnyBatchNorm")


class BatchNorm1dWithoutOffset(nn.BatchNorm1d):
    """BatchNorm with a gain and no offset (`center=False` in TensorFlow), for inputs (N, D).

    SimCLR's projector ends with it.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.register_parameter("bias", None)


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm for inputs (N, C, ...) with any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"input: expected at least 2 dimensions (N, C, ...), got {input.ndim}")

    def _count_batch(self) -> float:
        """Count a batch, and return the weight of its statistics; 1 / count for `momentum=None`."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1.0 / float(self.num_batches_tracked)


class SynchronizedBatchNorm(_AnyBatchNorm):
    """BatchNorm with statistics of the batch of all processes, for inputs (N, C, ...).

    torch's own SyncBatchNorm does not support the CPU. Sums over processes have a gradient. So two processes
    compute the same as one process with both halves of the batch, and their running statistics agree.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or process_count() == 1:
            return super().forward(input)
        return self._synchronized(upcast(input)).to(input.dtype)

    @without_autocast
    def _synchronized(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        count = x.new_full((1,), x.numel() // x.shape[1])
        total = sum_over_processes(torch.cat([x.sum(dims), count]))
        count, mean = total[-1], total[:-1] / total[-1]
        shape = (1, -1, *[1] * (x.ndim - 2))
        # The sum of squared deviations needs a second reduction. A difference of two large sums would lose
        # precision.
        centered = x - mean.view(shape)
        variance = sum_over_processes(centered.square().sum(dims)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                momentum = self._count_batch()
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)
        result = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape)
        return result if self.bias is None else result + self.bias.view(shape)


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm layer, of any variant."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return all BatchNorm layers in `module`, of any variant."""
    return [m for m in module.modules() if is_batch_norm(m)]


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize as in training, but keep its running statistics.

    Use it when the embeddings of a batch are computed a second time. The forward pass then updates copies of
    the buffers. With `track_running_stats=False`, it would save fewer tensors for the backward pass than the
    first one. Activation checkpointing then raises an error.
    """
    originals = [(layer, dict(layer.named_buffers(recurse=False))) for layer in batch_norms(module)]
    for layer, buffers in originals:
        for name, buffer in buffers.items():
            setattr(layer, name, buffer.clone())
    try:
        yield
    finally:
        for layer, buffers in originals:
            for name, buffer in buffers.items():
                setattr(layer, name, buffer)


class SplitBatchNorm(_AnyBatchNorm):
    """BatchNorm that normalizes `splits` parts of a batch separately in training, for inputs (N, C, ...).

    On one device, it computes the same as unsynchronized BatchNorm on `splits` devices. Sample i belongs to
    part i modulo `splits`. Running statistics are the mean over the parts.
    """

    splits = 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(input)
        if len(input) % self.splits:
            raise UserError(
                "training.batch_size: expected a multiple of "
                f"method.batch_norm_splits={self.splits} images for each process, got {len(input)}"
            )
        return (
            self._normalized(input.unflatten(0, (-1, self.splits)).flatten(1, 2))
            .unflatten(1, (self.splits, -1))
            .flatten(0, 1)
        )

    def _normalized(self, x: Tensor) -> Tensor:
        """Normalize x (N / splits, splits * C, ...), in which each part has its own channels."""
        weight, bias = (None if p is None else p.repeat(self.splits) for p in (self.weight, self.bias))
        mean, variance = self.running_mean, self.running_var
        if not self.track_running_stats or mean is None or variance is None:
            return batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        means, variances = mean.repeat(self.splits), variance.repeat(self.splits)
        result = batch_norm(x, means, variances, weight, bias, True, self._count_batch(), self.eps)
        mean.copy_(means.unflatten(0, (self.splits, -1)).mean(0))
        variance.copy_(variances.unflatten(0, (self.splits, -1)).mean(0))
        return result


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every BatchNorm in `module` by one that normalizes `splits` parts of a batch separately."""
    for layer in _replace(module, SplitBatchNorm, "method.batch_norm_splits=1"):
        layer.splits = splits


def uses_global_batch_statistics(module: nn.Module) -> bool:
    """Return whether every BatchNorm in `module` uses the whole batch of all processes."""
    layers = batch_norms(module)
    if any(isinstance(layer, SplitBatchNorm) for layer in layers):
        return False
    return process_count() == 1 or all(isinstance(layer, SynchronizedBatchNorm) for layer in layers)


def synchronize_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm in `module` by one with statistics of all processes.

    Parameters, buffers and their names do not change.
    """
    _replace(module, SynchronizedBatchNorm, "training.sync_batch_norm=false")


def _replace(module: nn.Module, kind: type[Layer], remedy: str) -> list[Layer]:
    """Replace every BatchNorm of torch in `module` by one of class `kind`, and return the new ones.

    Raises:
        UserError: a BatchNorm computes more, such as timm's with an activation. The message names the remedy.
    """
    new = []
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.modules.batchnorm._BatchNorm) or isinstance(child, _AnyBatchNorm):
                continue
            if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1dWithoutOffset):
                raise UserError(
                    f"backbone: expected plain BatchNorm layers, got {type(child).__name__}, which computes "
                    f"more; use {remedy}"
                )
            new.append(_replacement(kind, child))
            setattr(parent, name, new[-1])
    return new


def _replacement(kind: type[Layer], layer: nn.modules.batchnorm._BatchNorm) -> Layer:
    """Return a BatchNorm of class `kind` with the parameters and buffers of `layer`."""
    replacement = kind(layer.num_features, layer.eps, layer.momentum, affine=False)
    replacement.weight, replacement.bias = layer.weight, layer.bias
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        replacement.register_buffer(buffer, getattr(layer, buffer))
    replacement.train(layer.training)
    return replacement
