# SPDX-License-Identifier: Apache-2.0
"""Implements LARS in the three variants that published results of self-supervised learning use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The variants compute the step from gradient g, weight w, weight decay d, trust coefficient c, momentum m and
# learning rate lr:
#   barlowtwins  u = g + d w;  v = m v + c |w|/|u| u;            w -= lr v
#   simclr       u = g + d w;  v = m v + lr c |w|/|u| u;         w -= v
#   larc         u = g + d w;  v = m v + c |w|/(|g| + d |w|) u;  w -= lr v
# BYOL, VICReg and MoCo v3 also use `barlowtwins`. lightly, solo-learn and apex use `larc`. With `simclr`, a
# change of lr affects new gradients only.
VARIANTS = ("barlowtwins", "simclr", "larc")


@dataclass
class LARSConfig:
    """Settings of LARS, the group `training.lars` of a recipe.

    Attributes:
        trust_coefficient, variant, clip: see `LARS`.
        adapt_all_parameters: whether LARS also adapts the learning rate of biases, normalization layers and
            tokens, as in the code of SwAV.
    """

    trust_coefficient: float = 0.001
    variant: str = "barlowtwins"
    clip: bool = False
    adapt_all_parameters: bool = False


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888).

    Args:
        params: parameters or parameter groups. `adapt=False` disables the scaling for a group. All authors
            do this for biases and normalization layers.
        lr: learning rate.
        momentum: decay of the momentum buffer.
        weight_decay: factor of the weights. The product is added to the gradient before the norms are
            computed.
        trust_coefficient: the scale c of the adaptation (0.001 in the authors' code, 0.02 in the CIFAR
            recipes of solo-learn).
        variant: one of `VARIANTS`. Each is named after its source.
        clip: whether the effective learning rate is at most lr: min(adaptation / lr, 1). This is `clip_lr`
            of solo-learn.

    Raises:
        ValueError: the variant is unknown.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = LARSConfig.trust_coefficient,
        variant: str = LARSConfig.variant,
        clip: bool = LARSConfig.clip,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "clip": clip,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step. Parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        if group["adapt"]:
            adaptations = self._adaptations(group, parameters, gradients, updates)
            updates = [update * adaptation for update, adaptation in zip(updates, adaptations, strict=True)]
        if group["variant"] == "simclr":
            torch._foreach_mul_(updates, group["lr"])
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-1.0 if group["variant"] == "simclr" else -group["lr"])

    @staticmethod
    def _adaptations(
        group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], updates: list[Tensor]
    ) -> list[Tensor]:
        weight_norms = torch.stack(torch._foreach_norm(parameters))
        if group["variant"] == "larc":
            step_norms = (
                torch.stack(torch._foreach_norm(gradients)) + group["weight_decay"] * weight_norms + 1e-8
            )
        else:
            step_norms = torch.stack(torch._foreach_norm(updates))
        adaptation = group["trust_coefficient"] * weight_norms / step_norms
        if group["clip"] and group["lr"] > 0:
            adaptation = (adaptation / group["lr"]).clamp(max=1)
        usable = (weight_norms > 0) & (step_norms > 0)
        return list(torch.where(usable, adaptation, torch.ones_like(adaptation)).unbind())
