# SPDX-License-Identifier: Apache-2.0
"""What becomes of a model before it is trained, none of which changes what it computes."""

import torch

from hf_ssl.modeling.attention import choose_attention
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.trainer.arguments import SSLTrainingArguments


def prepare(model: SSLPreTrainedModel, args: SSLTrainingArguments) -> None:
    """BatchNorm over all processes, the memory layout of convolutions, the faster attention; in place."""
    if args.sync_batch_norm and args.world_size > 1:
        synchronize_batch_norm(model)
    if args.channels_last:
        torch.nn.Module.to(model, memory_format=torch.channels_last)
    if args.device.type == "cpu":
        choose_attention(model)
