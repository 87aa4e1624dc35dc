# SPDX-License-Identifier: Apache-2.0
"""What transformers' Trainer computes in each step and training without labels does not need, left out."""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy


class LeanTrainer(Trainer):
    """transformers' Trainer without the work that only language models need."""

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # losses are means over images; there is nothing to count

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the stock estimate is one for language models."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Only where it is logged, or known from clipping: it takes 1 ms for 200 tensors."""
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS and self.state.global_step > 0
        logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        if grad_norm is None and by_steps and not logged and not self.args.fp16:
            return None
        return super()._get_grad_norm(model, grad_norm)
