# SPDX-License-Identifier: Apache-2.0
"""A pass over the data before the first step, for methods that begin with a memory of all images."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.gather import gather
from hf_ssl.progress import progress

SEED_OFFSET = 2**33
"""Added to the run's seed, so that the first pass of training sees other views."""


@torch.no_grad()
def remember_all(model: SSLPreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Let a method remember a batch's embeddings, as a step does, and learn nothing from it."""
    embeddings = model.embed(**inputs)
    model.remember({name: gather(embeddings[name]) for name in model.remembered})


class FirstPass(TrainerCallback):
    """Shows a method all images before the first step; nothing when a run resumes.

    The network is in training mode, as the authors of DeepCluster v2 have it.

    Args:
        model: the method; one without `begins_with_a_pass` is left alone.
        loader: makes the loader of the pass.
        precision: makes the context of a forward pass (autocast).
    """

    def __init__(
        self,
        model: SSLPreTrainedModel,
        loader: Callable[[], Any],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.loader, self.precision = model, loader, precision

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not self.model.begins_with_a_pass or state.global_step > 0:
            return
        self.model.train()
        loader = self.loader()
        with progress("embedding all images once", len(loader), unit="batch") as bar:
            for batch in loader:
                with self.precision():
                    remember_all(self.model, batch.inputs(args.device, self.model.draw))
                bar.update(1)
        loader.close()
