# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from hf_ssl.errors import UserError
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.rules import ParameterRule
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.lars import LARS
from hf_ssl.trainer.optimizers import build_optimizer, build_scheduler


def slow_lars(weight, gradients, rates, *, momentum, decay, trust, variant, clip):
    """The definition in plain numbers, one weight at a time."""
    velocity = [0.0] * len(weight)
    for gradient, rate in zip(gradients, rates, strict=True):
        update = [g + decay * w for g, w in zip(gradient, weight, strict=True)]
        norm = lambda values: math.sqrt(sum(value * value for value in values))  # noqa: E731
        below = norm(gradient) + decay * norm(weight) + 1e-8 if variant == "larc" else norm(update)
        scale = trust * norm(weight) / below
        if clip:
            scale = min(scale / rate, 1)
        inside = rate if variant == "simclr" else 1.0
        velocity = [momentum * v + inside * scale * u for v, u in zip(velocity, update, strict=True)]
        outside = 1.0 if variant == "simclr" else rate
        weight = [w - outside * v for w, v in zip(weight, velocity, strict=True)]
    return weight


@pytest.mark.parametrize(
    ("variant", "clip"), [("barlowtwins", False), ("simclr", False), ("larc", False), ("larc", True)]
)
def test_lars_equals_its_definition(variant, clip):
    start, rates = [0.5, -1.0, 2.0], [0.1, 0.05, 0.2]
    gradients = [[0.3, 0.1, -0.2], [-0.1, 0.4, 0.2], [0.2, 0.2, 0.1]]
    weight = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = LARS([weight], 1.0, 0.9, weight_decay=0.1, trust_coefficient=0.02, variant=variant, clip=clip)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    options = {"momentum": 0.9, "decay": 0.1, "trust": 0.02, "variant": variant, "clip": clip}
    assert weight.tolist() == pytest.approx(slow_lars(start, gradients, rates, **options), rel=1e-12)


def test_lars_without_adaptation_is_sgd_with_momentum():
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    lars = LARS([{"params": [ours], "adapt": False}], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(3):
        for weight, optimizer in ((ours, lars), (theirs, sgd)):
            weight.grad = torch.full((3,), float(step + 1))
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_lars_leaves_zero_weights_unscaled_and_refuses_unknown_variants():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    LARS([weight], lr=0.5, momentum=0.0).step()
    assert weight.tolist() == [-0.5, -0.5]
    with pytest.raises(ValueError, match="barlowtwins, simclr, larc, got 'lamb'"):
        LARS([weight], lr=0.1, variant="lamb")


class RuledModel(SimCLRForPreTraining):
    @property
    def parameter_rules(self):
        return (
            ParameterRule(r"projector\.", learning_rate_scale=2.0),
            ParameterRule(r"projector\.0\.", fixed_learning_rate=True, decay=False),
        )


def arguments(tmp_path, **given):
    return SSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)


def model():
    backbone = {
        "model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "depths": [1], "hidden_sizes": [8]
    }  # fmt: skip
    return RuledModel(SimCLRConfig(backbone_config=backbone))


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_groups_follow_rules_and_the_schedule_spares_fixed_rates(tmp_path, name):
    args = arguments(tmp_path, optimizer=name, learning_rate=0.4, weight_decay=0.01, warmup_epochs=0.5)
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    scheduler = build_scheduler(optimizer, args, total_steps=100, steps_per_epoch=20)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(seen) == len({id(p) for p in seen}) == sum(p.requires_grad for p in ruled.parameters())
    fixed = group_of(optimizer, ruled.projector[0].weight)
    moving = group_of(optimizer, ruled.projector[3].weight)
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    assert (fixed["weight_decay"], moving["weight_decay"]) == (0.0, 0.01)
    rates = []
    for _ in range(100):
        rates.append((fixed["lr"], moving["lr"], plain["lr"]))
        optimizer.step()
        scheduler.step()
    assert {rate for rate, _, _ in rates} == {0.8}
    assert rates[0][1:] == (0.0, 0.0)  # warm-up of half an epoch: 10 steps from 0
    assert rates[5][2] == pytest.approx(0.2)
    assert rates[10][2] == pytest.approx(0.4)
    assert rates[55][2] == pytest.approx(0.2)  # half of the cosine
    assert all(moving_rate == pytest.approx(2 * rate) for _, moving_rate, rate in rates)


def test_cosine_ends_at_its_floor(tmp_path):
    args = arguments(tmp_path, optimizer="sgd", learning_rate=1.0, minimum_learning_rate_ratio=0.1)
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    scheduler = build_scheduler(optimizer, args, total_steps=10, steps_per_epoch=10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    assert plain["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("rule", "rate"), [("none", 0.1), ("linear", 0.2), ("square_root", 0.1 * math.sqrt(512))]
)
def test_learning_rate_rules(tmp_path, rule, rate):
    args = arguments(tmp_path, base_learning_rate=0.1, learning_rate_rule=rule, batch_size=512)
    assert args.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam"}, "training.optimizer must be one of sgd, adamw, lars, got 'adam'"),
        (
            {"learning_rate_rule": "sqrt"},
            "training.learning_rate_rule must be one of none, linear, square_root",
        ),
        ({"on_collapse": "ignore"}, "training.on_collapse must be one of warn, stop"),
        ({"batch_size": 30, "gradient_accumulation_steps": 4}, "multiple of processes x .* = 1 x 4, got 30"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        arguments(tmp_path, **given)
