# SPDX-License-Identifier: Apache-2.0
"""BatchNorm whose statistics span all processes, and BatchNorm without an offset."""

import torch
from torch import Tensor, nn

from hf_ssl.losses.precision import raised
from hf_ssl.modeling.gather import process_count, sum_over_processes


class BatchNorm1dWithoutOffset(nn.BatchNorm1d):
    """BatchNorm with a gain and no offset (`center=False` in TensorFlow), as SimCLR ends its projector.
    Input (N, D).
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.register_parameter("bias", None)


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batch of all processes; input (N, C, ...).

    torch's own SyncBatchNorm refuses the CPU. Statistics come from sums that are reduced with gradient, so
    that two processes compute what one process with both halves of the batch computes; running statistics
    therefore agree on all processes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions (N, C, ...), got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or process_count() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return self._synchronized(raised(input)).to(input.dtype)

    def _synchronized(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        count = x.new_full((1,), x.numel() // x.shape[1])
        total = sum_over_processes(torch.cat([x.sum(dims), count]))
        count, mean = total[-1], total[:-1] / total[-1]
        shape = (1, -1, *[1] * (x.ndim - 2))
        # Two passes: the sum of squared deviations keeps its digits where a difference of large sums would
        # lose them.
        centred = x - mean.view(shape)
        variance = sum_over_processes(centred.square().sum(dims)) / count
        if (
            self.track_running_stats
            and self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = (
                    self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                )
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), momentum)
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            result = result * self.weight.view(shape)
        return result if self.bias is None else result + self.bias.view(shape)


def synchronize_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm below `module` by one that spans all processes; parameters, buffers and their
    names stay.
    """
    for name, child in module.named_children():
        if isinstance(child, SynchronizedBatchNorm):
            continue
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synchronized = SynchronizedBatchNorm(child.num_features, child.eps, child.momentum, affine=False)
            synchronized.weight, synchronized.bias = child.weight, child.bias
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                synchronized.register_buffer(buffer, getattr(child, buffer))
            synchronized.train(child.training)
            setattr(module, name, synchronized)
        else:
            synchronize_batch_norm(child)
