# SPDX-License-Identifier: Apache-2.0
"""Defines the rows about a training step.

The other side is the plain torch loop of tutorials with two forward passes, or the model of transformers if
it has the method.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextV2Config,
    ConvNextV2Model,
    ResNetConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_ssl.methods.cpc.configuration_cpc import CPCConfig
from hf_ssl.methods.cpc.modeling_cpc import CPCForPreTraining
from hf_ssl.methods.mae.configuration_mae import MAEConfig
from hf_ssl.methods.mae.modeling_mae import MAEForPreTraining
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.fast_layers import choose_attention
from hf_ssl.precision import autocast, autocast_dtype, fastest_precision
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.machine_settings import prepare_model
from hf_ssl.trainer.optimizers import build_optimizer
from training.benchmarks.pairs import Pair
from training.benchmarks.row import Row

# Both sides use the same ResNet-18. With 128-pixel images, its feature maps have the sizes of a ResNet-18
# with a CIFAR stem and 32-pixel images.
RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
SIDE = 128


class PlainSimCLR(nn.Module):
    """SimCLR with the ResNet-18 of torchvision, as in tutorials."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.backbone = resnet18()
        self.backbone.fc = nn.Identity()
        self.projector = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        return self.projector(self.backbone(view))


def plain_nt_xent(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarities = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    batch = len(z1)
    return F.cross_entropy(similarities, torch.arange(2 * batch, device=z.device).roll(batch))


def resnet18_step(*, auto: bool, batch: int = 64) -> Any:
    """Measure a step in float32, or in the precision that `training.precision=auto` chooses on the device."""

    def build(device: torch.device) -> Pair:
        torch.manual_seed(0)
        dtype = autocast_dtype(fastest_precision(device.type).name) if auto else None
        views = torch.randn(batch, 2, 3, SIDE, SIDE, device=device)
        config = SimCLRConfig(
            backbone_config=ResNetConfig(**RESNET18), projection_layers=2, projection_size=128
        )
        model = SimCLRForPreTraining(config).to(device).to(memory_format=torch.channels_last).train()
        arguments = SSLTrainingArguments(optimizer="sgd", learning_rate=0.01, use_cpu=device.type == "cpu")
        optimizer = build_optimizer(model, arguments)
        plain = PlainSimCLR().to(device).train()
        plain_optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)

        def ours() -> None:
            with autocast(device, dtype):
                loss = model(views).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def peer() -> None:
            loss = plain_nt_xent(plain(views[:, 0]), plain(views[:, 1]))
            loss.backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()

        return Pair(ours, peer)

    return build


def mae_step(*, batch: int = 4) -> Any:
    """Measure a step of MAE with ViT-B/16 at 224 pixels and the decoder of the paper.

    Both sides use AdamW and the fused attention of torch.
    """

    def build(device: torch.device) -> Pair:
        torch.manual_seed(0)
        images = torch.randn(batch, 3, 224, 224, device=device)
        plain = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).to(device).train()
        model = MAEForPreTraining(MAEConfig(backbone_config=ViTConfig())).to(device).train()
        arguments = SSLTrainingArguments(optimizer="adamw", learning_rate=1e-4, use_cpu=device.type == "cpu")
        optimizer = build_optimizer(model, arguments)
        plain_optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, fused=True)

        def step(loss: torch.Tensor, used: torch.optim.Optimizer) -> None:
            loss.backward()
            used.step()
            used.zero_grad()

        return Pair(
            lambda: step(model(images[:, None]).loss, optimizer),
            lambda: step(plain(images).loss, plain_optimizer),
        )

    return build


# Patches of 8 pixels are encoded without enlargement: the encoder has a stride of 8.
CPC_ENCODER = {"patch_size": 2, "num_stages": 3, "hidden_sizes": [48, 96, 192], "depths": [1, 1, 1]}
STEPS, SKIPPED = 5, 1


class PlainCPC(nn.Module):
    """CPC that encodes and predicts one position of the grid after the other."""

    def __init__(self, config: CPCConfig) -> None:
        super().__init__()
        model = CPCForPreTraining(config)
        self.backbone = ConvNextV2Model(model.backbone.config)
        self.context, self.target = model.context, model.target
        self.maps = nn.ModuleList(nn.Linear(192, 64) for _ in range(STEPS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        places, rows = range(0, 25, 4), 7
        grid = torch.stack([
            torch.stack([
                self.backbone(images[:, :, top : top + 8, left : left + 8]).pooler_output for left in places
            ], dim=1)
            for top in places
        ], dim=1)  # fmt: skip
        context, targets = self.context(grid), self.target(grid)
        every, batch, losses = targets.flatten(0, 2), len(images), []
        first = torch.arange(batch, device=images.device) * rows * rows
        for step in range(1, STEPS + 1):
            terms = []
            for row in range(rows - step - SKIPPED):
                for column in range(rows):
                    scores = 0.1 * self.maps[step - 1](context[:, row, column]) @ every.T
                    terms.append(F.cross_entropy(scores, first + (row + step + SKIPPED) * rows + column))
            losses.append(torch.stack(terms).mean())
        return torch.stack(losses).mean()


def cpc_step(*, batch: int = 32) -> Any:
    """Measure a step of CPC with 32-pixel images and a grid of 7 x 7 patches of 8 pixels."""

    def build(device: torch.device) -> Pair:
        torch.manual_seed(0)
        images = torch.randn(batch, 3, 32, 32, device=device)
        config = CPCConfig(
            backbone_config=ConvNextV2Config(**CPC_ENCODER),
            views={"size": 32, "count": 1},
            prediction_steps=STEPS,
            skip_step=SKIPPED,
            context_layers=2,
            context_hidden_size=64,
        )
        model = CPCForPreTraining(config).to(device).train()
        arguments = SSLTrainingArguments(optimizer="adamw", learning_rate=1e-4, use_cpu=device.type == "cpu")
        prepare_model(model, arguments)
        optimizer = build_optimizer(model, arguments)
        plain = PlainCPC(config).to(device).train()
        plain_optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, fused=True)

        def step(loss: torch.Tensor, used: torch.optim.Optimizer) -> None:
            loss.backward()
            used.step()
            used.zero_grad()

        return Pair(
            lambda: step(model(images[:, None]).loss, optimizer), lambda: step(plain(images), plain_optimizer)
        )

    return build


def vit_tiny_step(*, batch: int = 32) -> Any:
    """Measure forward and backward pass of ViT-Tiny, with views of 64 pixels and patches of 8 pixels."""

    def build(device: torch.device) -> Pair:
        images = torch.randn(batch, 3, 64, 64, device=device)
        config = ViTConfig(
            image_size=64, patch_size=8, hidden_size=192, num_attention_heads=3, intermediate_size=768
        )
        plain, model = (
            ViTModel(deepcopy(config), add_pooling_layer=False).to(device).train() for _ in range(2)
        )
        choose_attention(model)

        def step(encoder: torch.nn.Module) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                features = encoder(images).last_hidden_state
            features.float().square().mean().backward()
            encoder.zero_grad()

        return Pair(lambda: step(model), lambda: step(plain))

    return build


ROWS = [
    Row(
        "step",
        "SimCLR ResNet-18 step, 64 images, float32",
        "plain torch, two forwards",
        1.35,
        resnet18_step(auto=False),
        "step",
        None,
        7,
        accelerator=True,
    ),
    Row(
        "step_auto",
        "SimCLR ResNet-18 step, 64 images, precision=auto",
        "plain torch, two forwards, float32",
        1.9,
        resnet18_step(auto=True),
        "step",
        None,
        7,
        accelerator=True,
    ),
    Row(
        "mae",
        "MAE ViT-B/16 step, 4 images, float32",
        "transformers ViTMAE",
        1.0,
        mae_step(),
        "step",
        1,
        accelerator=True,
    ),
    Row(
        "cpc",
        "CPC ConvNeXt V2 step, 32 images of 7 x 7 patches, float32",
        "plain torch, patch by patch",
        1.67,
        cpc_step(),
        "step",
        1,
        accelerator=True,
    ),
    Row(
        "attention",
        "ViT-Tiny, 65 tokens, bfloat16, forward and backward",
        "torch's fused attention",
        1.5,
        vit_tiny_step(),
        "step",
        1,
        precision="bfloat16",
    ),
]
