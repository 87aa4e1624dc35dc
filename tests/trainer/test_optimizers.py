# SPDX-License-Identifier: Apache-2.0
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import mentions
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from hf_ssl.errors import UserError
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.lars import LARS, LARSConfig
from hf_ssl.modeling.parameter_groups import ParameterRule
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, train
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.callbacks import WeightDecaySchedule
from hf_ssl.trainer.optimizers import build_optimizer, transformers_optimizer
from hf_ssl.trainer.schedules import build_scheduler, largest_weight_decay, schedule_weight_decay


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
    with pytest.raises(ValueError, match=mentions("barlowtwins", "simclr", "larc", "lamb")):
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
    assert rates[0][1:] == (0.0, 0.0)  # warmup of half an epoch: 10 steps from 0
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


@pytest.mark.parametrize("has_fixed_rates", [True, False])
def test_the_rate_drops_after_each_of_the_epochs_but_where_it_is_fixed(tmp_path, has_fixed_rates):
    given = {"lr_scheduler_type": "constant", "learning_rate_drops": [2, 2.5]}
    args = arguments(tmp_path, optimizer="sgd", learning_rate=0.4, **given)
    ruled = model() if has_fixed_rates else SimCLRForPreTraining(model().config)
    optimizer = build_optimizer(ruled, args)
    scheduler = build_scheduler(optimizer, args, total_steps=30, steps_per_epoch=10)
    fixed = group_of(optimizer, ruled.projector[0].weight)
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    rates = []
    for _ in range(30):
        rates.append(plain["lr"])
        assert fixed["lr"] == (0.8 if has_fixed_rates else rates[-1])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.4] * 20 + [0.04] * 5 + [0.004] * 5)


def test_a_warm_up_may_begin_above_zero_and_the_cosine_end_there(tmp_path):
    """transformers' schedule that SwAV's recipes name: from 0.3 to 4.8 and down to 0.0048."""
    kwargs = {"warmup_lr_rate": 0.0625, "min_lr_rate": 0.001}
    args = arguments(
        tmp_path,
        optimizer="sgd",
        learning_rate=4.8,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs=kwargs,
        warmup_epochs=2,
    )
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    scheduler = build_scheduler(optimizer, args, total_steps=100, steps_per_epoch=10)
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    rates = []
    for _ in range(100):
        rates.append(plain["lr"])
        optimizer.step()
        scheduler.step()
    assert (rates[0], rates[19], rates[-1]) == pytest.approx((0.3, 4.8, 0.0048))
    assert max(rates) == pytest.approx(4.8)


@pytest.mark.parametrize("given", [{"warmup_epochs": 3.0}, {"warmup_steps": 21}])
def test_a_warmup_longer_than_the_run_is_reported(given, tmp_path, caplog):
    args = arguments(tmp_path, learning_rate=1.0, **given)
    for total, expected in ((20, True), (21, False)):
        caplog.clear()
        scheduler = build_scheduler(
            build_optimizer(model(), args), args, total_steps=total, steps_per_epoch=7
        )
        found = [record.getMessage() for record in caplog.records]
        assert (
            any(re.search(mentions(f"training.{next(iter(given))}", 20, 21), text) for text in found)
            is expected
        )
        assert scheduler.lr_lambdas[0](total) == pytest.approx(total / 21)


def swav_rates(start, base, final, warmup, total):
    """main_swav.py: `lr_schedule[iteration]` is the rate of an iteration, which counts from 0."""
    cosine = [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * t / (total - warmup)))
        for t in range(total - warmup)
    ]
    return [*np.linspace(start, base, warmup), *cosine]


def ijepa_rates(start, base, final, warmup, total):
    """`WarmupCosineSchedule` of I-JEPA: `train_step` calls `step()`, which counts first, before the batch."""
    rates = []
    for count in range(1, total + 1):
        if count < warmup:
            rates.append(start + count / warmup * (base - start))
        else:
            progress = (count - warmup) / (total - warmup)
            rates.append(final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 20])
@pytest.mark.parametrize(
    ("variant", "authors", "final"), [("swav", swav_rates, 0.0048), ("ijepa", ijepa_rates, 1e-3)]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_schedules_of_the_authors(tmp_path, variant, authors, final, warmup, absolute):
    end = {"min_lr": final} if absolute else {"min_lr_rate": final / 4.8}
    args = arguments(
        tmp_path,
        optimizer="sgd",
        learning_rate=4.8,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"warmup_lr_rate": 0.0625, **end},
        cosine_variant=variant,
        warmup_steps=warmup,
    )
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    scheduler = build_scheduler(optimizer, args, total_steps=100, steps_per_epoch=10)
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    fixed = group_of(optimizer, ruled.projector[0].weight)
    rates = []
    for _ in range(100):
        rates.append(plain["lr"])
        assert fixed["lr"] == 9.6
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(authors(0.3, 4.8, final, warmup, 100), rel=1e-12)


@pytest.mark.parametrize("name", ["swav_resnet50_imagenet", "deepcluster_v2_resnet50_imagenet"])
def test_recipes_of_swav_have_the_rates_of_the_authors(name, tmp_path):
    args = load_recipe(
        name, [f"training.output_dir={tmp_path}", "training.batch_size=64"]
    ).training_arguments()
    optimizer = build_optimizer(model(), args)
    scheduler = build_scheduler(optimizer, args, total_steps=800, steps_per_epoch=1)
    expected = swav_rates(0.3, 4.8, 0.0048, 10, 800)
    for rate in expected:
        assert 4.8 * scheduler.lr_lambdas[-1](scheduler.last_epoch) == pytest.approx(rate, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_weight_decay_of_ijepa_advances_before_each_step(tmp_path):
    """`CosineWDSchedule`: `step()` counts first, so that the last step has the final weight decay."""
    args = arguments(
        tmp_path, weight_decay=0.04, weight_decay_end=0.4, cosine_variant="ijepa",
        lr_scheduler_type="cosine_warmup_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.0},
    )  # fmt: skip
    optimizer = build_optimizer(model(), args)
    found, expected = [], []
    for step in range(10):
        state = TrainerState(global_step=step, max_steps=10)
        WeightDecaySchedule().on_step_begin(args, state, None, optimizer=optimizer)
        found.append(largest_weight_decay(optimizer))
        expected.append(0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * (step + 1) / 10)))
    assert found == pytest.approx(expected, rel=1e-12) and found[-1] == pytest.approx(0.4)


def test_the_predictor_has_its_own_factor_on_the_learning_rate(tmp_path):
    args = arguments(tmp_path, optimizer="sgd", learning_rate=0.5, predictor_learning_rate_factor=3.0)
    byol = build_model(load_recipe("smoke/byol"), seed=0)
    optimizer = build_optimizer(byol, args)
    for name, parameter in byol.named_parameters():
        if parameter.requires_grad:
            factor = 3.0 if name.startswith("predictor.") else 1.0
            assert group_of(optimizer, parameter)["lr"] == 0.5 * factor, name
    simsiam = build_model(load_recipe("smoke/simsiam"), seed=0)  # its predictor keeps its learning rate
    optimizer = build_optimizer(simsiam, args)
    build_scheduler(optimizer, args, total_steps=10, steps_per_epoch=10)
    assert group_of(optimizer, simsiam.predictor[0].weight)["lr"] == 1.5


def test_a_method_without_a_learned_predictor_rejects_the_factor(tmp_path):
    factor = "training.predictor_learning_rate_factor"
    for method in ("simclr", "directpred"):
        recipe = load_recipe(f"smoke/{method}", [f"{factor}=2", f"training.output_dir={tmp_path / method}"])
        with pytest.raises(UserError, match=mentions(factor, 1, 2.0)):
            train(recipe)
        assert not any(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_weight_decay_follows_a_cosine_where_there_is_any(tmp_path, name):
    args = arguments(tmp_path, optimizer=name, weight_decay=0.04, weight_decay_end=0.4)
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    plain = group_of(optimizer, ruled.backbone.embedder.embedder.convolution.weight)
    spared = [
        group_of(optimizer, ruled.projector[0].weight),  # by a rule
        group_of(optimizer, ruled.backbone.embedder.embedder.normalization.weight),
    ]
    seen = []
    for step in range(100):
        schedule_weight_decay(optimizer, args, step / 100)
        seen.append(plain["weight_decay"])
        assert all(group["weight_decay"] == 0 for group in spared)
        assert largest_weight_decay(optimizer) == plain["weight_decay"]
    assert seen[0] == 0.04 and seen[50] == pytest.approx(0.22)
    assert seen == pytest.approx([0.4 - 0.18 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])
    args.weight_decay_end = None
    schedule_weight_decay(optimizer, args, 0.0)
    assert plain["weight_decay"] == seen[-1]


def test_a_run_takes_its_weight_decay_from_the_schedule_and_logs_it(tmp_path):
    """Without a gradient, plain SGD multiplies each decayed weight by 1 - rate * decay."""
    settings = [
        "max_steps=3", "logging_steps=1", "monitor_steps=0", "optimizer=sgd", "momentum=0",
        "learning_rate=0.5", "lr_scheduler_type=constant", "weight_decay=0.1", "weight_decay_end=0.5",
        f"output_dir={tmp_path}",
    ]  # fmt: skip
    recipe = load_recipe("smoke/simclr", [f"training.{setting}" for setting in settings])
    untrained, weight = build_model(recipe, seed=0), "projector.0.weight"
    trainer = train(recipe, [NoGradient(weight)])
    schedule = [0.3 - 0.2 * math.cos(math.pi * step / 3) for step in range(3)]
    logged = [record["weight_decay"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx(schedule)
    left = math.prod(1 - 0.5 * decay for decay in schedule)
    before, after = (each.get_parameter(weight) for each in (untrained, trainer.method))
    torch.testing.assert_close(after, before * left)


class NoGradient(TrainerCallback):
    """Makes the gradient of one parameter zero."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        model.get_parameter(self.name).grad.zero_()


@pytest.mark.parametrize("everything", [False, True])
def test_lars_adapts_vectors_only_if_told(tmp_path, everything):
    args = arguments(tmp_path, optimizer="lars", lars={"adapt_all_parameters": everything})
    ruled = model()
    optimizer = build_optimizer(ruled, args)
    embedder = ruled.backbone.embedder.embedder
    assert group_of(optimizer, embedder.convolution.weight)["adapt"]
    assert group_of(optimizer, embedder.normalization.weight)["adapt"] == everything
    assert group_of(optimizer, embedder.normalization.weight)["weight_decay"] == 0.0


OLD_LARS = {
    "lars_trust_coefficient": 0.02,
    "lars_variant": "larc",
    "lars_clip": True,
    "lars_adapt_all_parameters": True,
}


@pytest.mark.parametrize("name", OLD_LARS)
def test_old_arguments_of_lars_work_and_name_the_new_ones(tmp_path, name):
    field = name.removeprefix("lars_")
    with pytest.warns(FutureWarning, match=mentions(name, f"lars.{field}")):
        old = arguments(tmp_path, **{name: OLD_LARS[name]})
    assert old.lars == LARSConfig(**{field: OLD_LARS[name]})
    assert replace(old, seed=3).lars == old.lars


def test_the_settings_of_lars_reach_the_optimizer_and_json(tmp_path):
    group = {name.removeprefix("lars_"): value for name, value in OLD_LARS.items()}
    for given in (group, LARSConfig(**group)):
        args = arguments(tmp_path, optimizer="lars", lars=given)
        assert json.loads(args.to_json_string())["lars"] == group
        optimizer = build_optimizer(model(), args)
        for name in ("trust_coefficient", "variant", "clip"):
            assert {each[name] for each in optimizer.param_groups} == {group[name]}
        assert all(each["adapt"] for each in optimizer.param_groups)


def test_nesterov_is_deprecated_and_works(tmp_path):
    with pytest.warns(FutureWarning, match=mentions("training.nesterov")):
        args = arguments(tmp_path, optimizer="sgd", nesterov=True)
    assert all(group["nesterov"] for group in build_optimizer(model(), args).param_groups)


@pytest.mark.parametrize(
    ("rule", "rate"), [("none", 0.1), ("linear", 0.2), ("square_root", 0.1 * math.sqrt(512))]
)
def test_learning_rate_rules(tmp_path, rule, rate):
    args = arguments(tmp_path, base_learning_rate=0.1, learning_rate_rule=rule, batch_size=512)
    assert args.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"optimizer": "adam"}, ["training.optimizer", "sgd", "adamw", "lars", "adam"]),
        (
            {"learning_rate_rule": "sqrt"},
            ["training.learning_rate_rule", "none", "linear", "square_root", "sqrt"],
        ),
        ({"lars": {"variant": "lamb"}}, ["training.lars.variant", "barlowtwins", "simclr", "larc", "lamb"]),
        ({"lars": {"eta": 1}}, ["training.lars", "trust_coefficient", "eta"]),
        ({"learning_rate_drops": [120, 0]}, ["training.learning_rate_drops", "[120.0, 0.0]"]),
        ({"predictor_learning_rate_factor": 0.0}, ["training.predictor_learning_rate_factor", 0.0]),
        ({"cosine_variant": "mae"}, ["training.cosine_variant", "swav", "ijepa", "mae"]),
        (
            {"cosine_variant": "swav"},
            ["training.cosine_variant", "cosine_with_min_lr", "cosine_warmup_with_min_lr"],
        ),
        ({"weight_decay_end": -0.1}, ["training.weight_decay_end", 0, "-0.1"]),
        ({"on_collapse": "ignore"}, ["training.on_collapse", "warn", "stop", "ignore"]),
        (
            {"batch_size": 30, "gradient_accumulation_steps": 4},
            ["training.batch_size", "gradient_accumulation_steps", 4, 30],
        ),
    ],
)
def test_arguments_that_cannot_be(tmp_path, given, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        arguments(tmp_path, **given)


def test_an_optimizer_with_triton_does_not_use_it_on_a_cpu(tmp_path, monkeypatch):
    class WithTriton(torch.optim.SGD):
        def __init__(self, params, lr=0.1, triton=None):
            super().__init__(params, lr=lr)

    chosen = lambda given: (WithTriton, {"lr": 0.1})  # noqa: E731
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(chosen))
    args = arguments(tmp_path, optimizer="stable_adamw")
    assert transformers_optimizer(args)[1] == {"lr": 0.1, "triton": False}
