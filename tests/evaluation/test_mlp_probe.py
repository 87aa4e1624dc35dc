# SPDX-License-Identifier: Apache-2.0
"""The simultaneous training of the MLP probe equals modules of torch that are trained one by one."""

import math

import pytest
import torch
from torch import nn

from hf_ssl.evaluation import evaluate_features
from hf_ssl.evaluation.protocols.mlp import MOMENTUM, Probes, train_probes


def rings(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that no linear classifier can distinguish: small and large vectors."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    directions = nn.functional.normalize(torch.randn(rows, 2, generator=generator), dim=1)
    return directions * (1 + labels[:, None]), labels


def as_module(probes: Probes, number: int) -> nn.Sequential:
    first, gain, bias, last, last_bias = (each[number].detach().clone() for each in probes.parameters)
    hidden = first.shape[1]
    module = nn.Sequential(
        nn.Linear(len(first), hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, last.shape[1]),
    )
    with torch.no_grad():
        module[0].weight.copy_(first.T)
        module[1].weight.copy_(gain[0])
        module[1].bias.copy_(bias[0])
        module[1].running_mean.copy_(probes.mean[number, 0])
        module[1].running_var.copy_(probes.variance[number, 0])
        module[3].weight.copy_(last.T)
        module[3].bias.copy_(last_bias[0])
    return module


def test_each_learning_rate_is_trained_like_a_module_of_torch() -> None:
    rates, epochs, batch_size = [0.01, 0.3], 3, 16
    features, labels = rings(41, 0)  # 16 + 16 + 9 rows
    found = train_probes(features, labels, 2, rates, 5, epochs, batch_size, torch.Generator().manual_seed(4))
    for number, rate in enumerate(rates):
        generator = torch.Generator().manual_seed(4)
        module = as_module(Probes(1, (2, 5, 2), generator), 0)
        optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / (3 * epochs)))
        )
        for _ in range(epochs):
            for index in torch.randperm(41, generator=generator).split(batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(features[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
        expected, trained = module.eval(), as_module(found, number).eval()
        for name, value in expected.state_dict().items():
            if name != "1.num_batches_tracked":
                torch.testing.assert_close(trained.state_dict()[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits(features)[number], expected(features), atol=1e-4, rtol=1e-4)


def test_the_first_weights_are_those_of_linear_layers() -> None:
    probes = Probes(2, (400, 50, 3), torch.Generator().manual_seed(0))
    first, _, _, last, _ = probes.parameters
    assert torch.equal(first[0], first[1])
    for weights, inputs in ((first, 400), (last, 50)):
        assert weights.abs().max() <= inputs**-0.5
        assert weights.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)


def test_a_last_batch_of_one_image_is_omitted() -> None:
    features, labels = rings(17, 0)
    probes = train_probes(features, labels, 2, [0.1], 4, 1, 16, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(probes.logits(features)).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_learns_what_a_linear_classifier_cannot_at_any_scale(scale: float) -> None:
    (train, labels), (test, test_labels) = rings(400, 1), rings(200, 2)
    settings = {"mlp": {"hidden_size": 32, "epochs": 20, "batch_size": 32}, "logistic_regression": {}}
    settings["logistic_regression"] = {"strengths": [1.0]}
    config = {"protocols": list(settings), "settings": settings}
    results = evaluate_features(config, train * scale, labels, test * scale, test_labels)["protocols"]
    values = {result["protocol"]: result["value"] for result in results}
    assert values["mlp"] > 0.9 > 0.7 > values["logistic_regression"]
