# SPDX-License-Identifier: Apache-2.0
"""DINO against a slow version of its training loop, and its parts."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, normalize
from transformers import AutoModel, Dinov2Config, Dinov2WithRegistersConfig, ResNetConfig, ViTConfig

from hf_ssl.methods.dino.configuration_dino import DINOConfig
from hf_ssl.methods.dino.modeling_dino import DINOForPreTraining
from hf_ssl.modeling.heads import WeightNormLinear
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.modeling.parameter_groups import assign_parameter_groups
from hf_ssl.modeling.vit import add_drop_path
from hf_ssl.trainer.callbacks import clip_each

STEPS, BATCH, RATE = 6, 3, 0.1
SMALL = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
VIT, DINOV2 = ViTConfig(**SMALL, intermediate_size=16), Dinov2Config(**SMALL)
REGISTERS = Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)


def build(**settings):
    torch.manual_seed(0)
    defaults = dict(
        backbone_config=VIT, output_size=7, projection_hidden_size=9, bottleneck_size=5, momentum=0.7,
        teacher_temperature=0.07, teacher_temperature_warmup_epochs=2.0, drop_path_rate=0.0,
    )  # fmt: skip
    return DINOForPreTraining(DINOConfig(**defaults | settings)).double().train()


class Slow(nn.Module):
    """Backbone, head and last layer of a network of their own."""

    def __init__(self, backbone, projector, last_layer):
        super().__init__()
        self.backbone, self.projector = copy.deepcopy(backbone), copy.deepcopy(projector)
        self.directions = nn.Parameter(last_layer.weight.detach().clone())
        self.lengths = None if last_layer.gain is None else nn.Parameter(last_layer.gain.detach().clone())
        self.requires_grad_()

    def forward(self, image):
        """Outputs (K,) of one view (C, H, W) of one image."""
        inner = image.shape[-1] != 16
        x = self.backbone(image[None], interpolate_pos_encoding=inner).last_hidden_state[0, 0]
        layers = [layer for layer in self.projector if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(layers):
            x = layer.weight @ x + layer.bias
            x = gelu(x) if number < len(layers) - 1 else x
        x = x / x.norm()
        rows = [row / row.norm() for row in self.directions]
        outputs = torch.stack([row @ x for row in rows])
        return outputs if self.lengths is None else outputs * self.lengths[:, 0]


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_steps_equal_a_slow_loop(norm_last_layer):
    """Loss with the old center, then the center, then the teacher; schedules of momentum and temperature; the
    last layer still in the first pass of two steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    local = torch.randn(STEPS, BATCH, 3, 3, 8, 8, generator=generator, dtype=torch.float64)
    model = build(norm_last_layer=norm_last_layer)
    student, teacher = (Slow(model.backbone, model.projector, model.last_layer) for _ in "st")
    center = torch.zeros(7, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    for step in range(STEPS):
        progress = RunProgress(step, STEPS, steps_per_epoch=2)
        model.before_step(progress)
        got = model(pixel_values=images[step], local_pixel_values=local[step]).loss
        got.backward()
        if step < 2:
            for parameter in model.last_layer.parameters():
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(RunProgress(step + 1, STEPS, steps_per_epoch=2))

        temperature = [0.04, 0.07, 0.07][step // 2]  # numpy.linspace(0.04, 0.07, 2), then 0.07
        assert model.teacher_temperature.item() == pytest.approx(temperature)
        loss, seen = 0.0, []
        for globals_, locals_ in zip(images[step], local[step], strict=True):
            views = [student(view) for view in [*globals_, *locals_]]
            with torch.no_grad():
                aims = [teacher(view) for view in globals_]
            seen += aims
            for a, aim in enumerate(aims):
                target = ((aim - center) / temperature).softmax(0)
                for v, view in enumerate(views):
                    if v != a:
                        loss = loss - (target * (view / 0.1).log_softmax(0)).sum() / (BATCH * 2 * 4)
        assert got.item() == pytest.approx(loss.item(), rel=1e-7)
        center = 0.9 * center + 0.1 * sum(seen) / len(seen)
        torch.testing.assert_close(model.center.mean, center, rtol=1e-7, atol=1e-9)
        named = dict(student.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        momentum = 1 - (1 - 0.7) * (math.cos(math.pi * step / STEPS) + 1) / 2
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                if gradient is not None and not (step < 2 and name in ("directions", "lengths")):
                    parameter -= RATE * gradient
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.copy_(momentum * slow + (1 - momentum) * fast)
    for part, expected in (
        (model.backbone, student.backbone),
        (model.projector, student.projector),
        (model.teacher_backbone, teacher.backbone),
        (model.teacher_projector, teacher.projector),
    ):
        for (name, value), other in zip(part.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-9, msg=name)
    torch.testing.assert_close(model.teacher_last_layer.weight, teacher.directions.data, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 30])
def test_the_temperature_of_the_teacher_changes_once_per_epoch(warmup):
    """main_dino.py: `numpy.linspace(start, end, warmup)`, then `end`, indexed by the epoch."""
    model = build(teacher_temperature_warmup_epochs=float(warmup), teacher_temperature_start=0.03)
    schedule = np.concatenate((np.linspace(0.03, 0.07, warmup), np.full(40 - warmup, 0.07)))
    for step in range(40 * 3):
        model.before_step(RunProgress(step, 40 * 3, steps_per_epoch=3))
        assert model._teacher_temperature.value == pytest.approx(schedule[step // 3], rel=1e-12)


def test_a_warmup_within_an_epoch_changes_the_temperature_every_step():
    model = build(teacher_temperature_warmup_epochs=0.5, teacher_temperature_start=0.03)
    found = []
    for step in range(6):
        model.before_step(RunProgress(step, 8, steps_per_epoch=8))
        found.append(model._teacher_temperature.value)
    assert found == pytest.approx([0.03, 0.04, 0.05, 0.06, 0.07, 0.07])


def test_the_last_layer_waits_a_pass():
    model = build(freeze_last_layer_epochs=1.5, norm_last_layer=False)
    found = assign_parameter_groups(model, model.parameter_rules)
    waiting = {name: how.frozen_epochs for name, how in found.items() if how.frozen_epochs}
    assert waiting == {"last_layer.weight": 1.5, "last_layer.gain": 1.5}


def test_the_last_layer_of_fixed_length_gives_cosines():
    layer = WeightNormLinear(4, 6, fixed_norm=True)
    x = normalize(torch.randn(3, 4), dim=1)
    torch.testing.assert_close(layer(x), torch.cosine_similarity(x[:, None], layer.weight[None], dim=-1))
    longer = WeightNormLinear(4, 6, fixed_norm=False)
    longer.gain.data.fill_(3.0)
    assert longer(x).shape == (3, 6) and longer(x).norm() > layer(x).norm()


@pytest.mark.parametrize("config", [VIT, DINOV2, REGISTERS], ids=["vit", "dinov2", "registers"])
def test_drop_path_drops_whole_branches_of_some_images_of_the_student(config):
    torch.manual_seed(0)
    model = build(backbone_config=config, drop_path_rate=0.5).float()
    images = torch.randn(1, 3, 16, 16).expand(64, -1, -1, -1)
    for branch in (model.backbone, model.teacher_backbone):
        rows = branch(images).last_hidden_state[:, 0].detach()
        differing = len(torch.unique(rows.round(decimals=4), dim=0))
        # two branches of the last block, each kept or not
        assert differing == (4 if branch is model.backbone else 1)
    model.eval()
    rows = model.backbone(images).last_hidden_state[:, 0]
    torch.testing.assert_close(rows, model.teacher_backbone(images).last_hidden_state[:, 0])


def test_scheduled_values_start_as_configured_if_the_checkpoint_holds_only_an_encoder(tmp_path):
    model = build()
    model.backbone.save_pretrained(tmp_path)
    loaded = DINOForPreTraining.from_pretrained(tmp_path, config=model.config)
    assert loaded.teacher_temperature.item() == pytest.approx(0.04)
    assert loaded.momentum.item() == pytest.approx(0.7)


def test_drop_path_keeps_the_mean():
    backbone = AutoModel.from_config(VIT).train()
    layer = backbone.layers[-1]
    add_drop_path(backbone, 0.3)
    torch.manual_seed(0)
    assert layer.dropout(torch.ones(20_000, 2, 3)).mean().item() == pytest.approx(1.0, abs=0.02)


def test_other_encoders_are_left_alone():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    backbone = build(backbone_config=config, drop_path_rate=0.5).backbone
    assert not any(module._forward_hooks for module in backbone.modules())


def test_a_teacher_has_no_drop_path_of_its_own():
    config = Dinov2Config(**SMALL, drop_path_rate=0.2)
    model = build(backbone_config=config)
    assert model.backbone.config.drop_path_rate == 0.2
    assert model.teacher_backbone.config.drop_path_rate == 0.0


def test_each_gradient_is_clipped_by_itself():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[0.3], [0.4]]), torch.zeros(2)]
    clip_each(gradients, 1.0)
    torch.testing.assert_close(gradients[0], torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], torch.tensor([[0.3], [0.4]]))
    assert not gradients[2].any()
