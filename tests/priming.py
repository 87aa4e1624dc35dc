# SPDX-License-Identifier: Apache-2.0
"""What a run does before its first step, for tests that make steps without one."""

from torch import Tensor

from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.outputs import RunProgress


def prime(model: SSLPreTrainedModel, *batches: dict[str, Tensor]) -> None:
    """Show the batches to a method that begins with a pass over the data; leave others alone."""
    if model.needs_memory_warmup:
        for batch in batches:
            model.train().fill_memory(batch)
        model.before_epoch(RunProgress(step=0, total_steps=10, steps_per_epoch=5))
