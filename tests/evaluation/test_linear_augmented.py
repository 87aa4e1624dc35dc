# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_ssl.evaluation.protocols.linear_augmented import MOMENTUM, RECIPES, Heads

RATES, WIDTH, CLASSES, STEPS = [0.5, 4.0], 6, 3, 9


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        features = 3 + 2 * torch.randn(12, WIDTH, generator=generator)
        yield features, torch.randint(CLASSES, (12,), generator=generator)


def published_step(recipe, name, weight, gradient, velocity, rate):
    """Update a tensor as the authors' optimizers do: SGD of torch, LARC of apex, LARS of MAE."""
    decay = recipe.weight_decay
    adapts = recipe.lars is not None and (name == "weight" or recipe.adapts_bias)
    if recipe.lars is None or adapts:
        if adapts and weight.norm() > 0:
            gradient = (gradient + decay * weight) * 0.001 * weight.norm() / (gradient.norm() + 1e-30)
        else:
            gradient = gradient + decay * weight
    velocity.mul_(MOMENTUM).add_(gradient)
    weight.sub_(rate * (gradient + MOMENTUM * velocity if recipe.nesterov else velocity))


@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_those_of_a_classifier_with_autograd(name):
    recipe = RECIPES[name]
    heads = Heads(WIDTH, CLASSES, RATES, recipe, torch.device("cpu"), seed=3)
    assert (heads.weights[:-1].std() > 0) == bool(recipe.start) and not heads.weights[-1].any()
    first = heads.weights.clone()
    for number, (features, labels) in enumerate(batches()):
        heads.step(features, labels, number / STEPS)
    for index, rate in enumerate(RATES):
        norm = nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False) if recipe.batch_norm else nn.Identity()
        model = nn.Sequential(norm, nn.Linear(WIDTH, CLASSES)).double()
        parameters = dict(model[1].named_parameters())
        parameters["weight"].data.copy_(first[:-1, index].T)
        nn.init.zeros_(model[1].bias)
        velocity = {key: torch.zeros_like(value) for key, value in parameters.items()}
        for number, (features, labels) in enumerate(batches()):
            model.zero_grad()
            cross_entropy(model(features.double()), labels).backward()
            current = rate * expected_scale(recipe, number / STEPS)
            with torch.no_grad():
                for key, value in parameters.items():
                    published_step(recipe, key, value, value.grad, velocity[key], current)
        features = next(batches())[0]
        expected = model.eval()(features.double())
        mine = heads.logits(features)[:, index].double()
        assert torch.allclose(mine, expected, atol=1e-3 * expected.abs().max().item()), (name, rate)


def expected_scale(recipe, progress):
    if recipe.drops:
        return recipe.drop ** len([each for each in recipe.drops if each <= progress])
    if progress < recipe.warmup:
        return progress / recipe.warmup
    after = (progress - recipe.warmup) / (1 - recipe.warmup)
    return (1 + math.cos(math.pi * after)) / 2


def test_recipes_have_the_published_rates_for_the_batches_of_the_authors():
    """https://github.com/facebookresearch: simsiam and mae README; VISSL's rate at each of 28 epochs."""
    assert 0.1 * RECIPES["simsiam"].batch_size / 256 == pytest.approx(1.6)
    mae = Heads(1, 2, [RECIPES["mae"].learning_rates[0] * 16384 / 256], RECIPES["mae"], torch.device("cpu"))
    scales = [mae.rate_scale(epoch / 90) for epoch in (0, 5, 10, 50, 90)]
    assert scales == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert mae.initial_rates == pytest.approx([6.4])
    vissl = Heads(1, 2, [0.01], RECIPES["vissl"], torch.device("cpu"))
    scales = [vissl.rate_scale(epoch / 28) for epoch in (0, 7.9, 8, 16, 24)]
    assert scales == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_a_batch_of_one_image_does_not_change_a_classifier_with_batch_norm():
    heads = Heads(WIDTH, CLASSES, RATES, RECIPES["mae"], torch.device("cpu"))
    before = heads.weights.clone()
    heads.step(torch.ones(1, WIDTH), torch.tensor([0]), 0.5)
    assert torch.equal(before, heads.weights)
