# SPDX-License-Identifier: Apache-2.0
"""The attentive probe against layers of torch with `torch.optim.AdamW`, and its rule about the test set."""

import math

import pytest
import torch
from messages import mentions
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ssl.errors import UserError
from hf_ssl.evaluation.inputs import Inputs, Split
from hf_ssl.evaluation.protocols import attentive
from hf_ssl.evaluation.protocols.attentive import Config, Training, attention_heads, new_probes, schedule

QUICK = Config(learning_rates=[0.001, 0.01, 0.03], weight_decays=[0.0, 0.05], epochs=6, batch_size=64)


class Probe(nn.Module):
    """An independent version: keys and values of every token, and torch's attention."""

    def __init__(self, size: int, classes: int, values: attentive.Probes) -> None:
        super().__init__()
        self.query = nn.Parameter(values.query[0].clone())
        self.keys, self.values = nn.Linear(size, size), nn.Linear(size, size)
        self.classifier = nn.Linear(size, classes)
        with torch.no_grad():
            self.keys.weight.copy_(values.keys[0])
            self.values.weight.copy_(values.values[0])
            self.classifier.weight.copy_(values.weight[0].T)
            for layer in (self.keys, self.values, self.classifier):
                layer.bias.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        heads = attention_heads(tokens.shape[2])
        query = self.query.expand(len(tokens), 1, -1)
        split = (
            rows.unflatten(2, (heads, -1)).transpose(1, 2)
            for rows in (query, self.keys(tokens), self.values(tokens))
        )
        return self.classifier(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(1))


def some_tokens(images: int, seed: int, size: int = 128, patches: int = 9) -> tuple[Tensor, Tensor]:
    """One of nine patches, at a random place, shows the class; the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 4
    tokens = torch.randn(images, patches, size, generator=generator)
    place = torch.randint(patches, (images,), generator=generator)
    marks = torch.randn(4, size, generator=torch.Generator().manual_seed(99))
    tokens[torch.arange(images), place] += 1.5 * marks[labels]
    return tokens, labels


def inputs(tokens: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> Inputs:
    train = Split(tokens.float().mean(1), labels, "train", {"tokens": tokens})
    return Inputs(train, Split(test.float().mean(1), answers, "test", {"tokens": test}), torch.device("cpu"))


@pytest.mark.parametrize(
    ("size", "heads"), [(128, 2), (192, 3), (384, 6), (768, 12), (100, 1), (32, 1), (130, 2)]
)
def test_heads_have_at_least_64_features(size: int, heads: int) -> None:
    assert attention_heads(size) == heads


def test_many_probes_equal_one_at_a_time_with_layers_of_torch() -> None:
    tokens, labels = some_tokens(60, seed=0)
    pairs = [(0.001, 0.0), (0.01, 0.5), (0.03, 0.05)]
    training = Training(tokens, labels, 4, epochs=3, batch_size=25)
    rows = torch.arange(3, 60)
    probes = training.run(pairs, rows, torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = probes.logits(tokens)
    for number, (rate, decay) in enumerate(pairs):
        generator = torch.Generator().manual_seed(5)
        probe = Probe(128, 4, new_probes(1, 128, 4, torch.device("cpu"), seed=5))
        matrices = [each for name, each in probe.named_parameters() if "bias" not in name]
        biases = [each for name, each in probe.named_parameters() if "bias" in name]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, 9))
        for _ in range(3):
            for index in rows[torch.randperm(57, generator=generator)].split(25):
                optimizer.zero_grad()
                F.cross_entropy(probe(tokens[index]), labels[index]).backward()
                optimizer.step()
                scheduler.step()
        torch.testing.assert_close(found[:, number], probe(tokens).detach(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(probes.query[number], probe.query.detach(), atol=1e-3, rtol=1e-3)


def test_the_schedule_warms_up_over_a_tenth_and_ends_at_zero() -> None:
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert [schedule(0, 1), schedule(1, 2)] == [1.0, 0.5]


def test_it_finds_the_patch_that_shows_the_class() -> None:
    """The mean of the tokens hides it: a linear probe cannot reach this accuracy."""
    data = (*some_tokens(800, seed=1), *some_tokens(200, seed=2))
    (result,) = attentive.run(inputs(*data), QUICK)
    assert result["value"] > 0.8
    curves = result["details"]["epochs"]
    assert len(curves["train"]) == len(curves["test"]) == QUICK.epochs
    assert curves["test"][-1] == result["value"] and curves["train"][-1] > curves["train"][0]
    assert len(result["details"]["validation"]) == 6
    best = max(result["details"]["validation"], key=lambda cell: cell["accuracy"])
    assert result["selection"] == {key: best[key] for key in ("learning_rate", "weight_decay")}
    assert result["details"]["validation_accuracy"] == best["accuracy"]
    assert "9 frozen patch tokens (2 heads)" in result["text"]
    assert "200 images of split test" in result["text"] and "800 images of split train" in result["text"]
    assert attentive.run(inputs(*data), QUICK) == [result]
    # Half precision, in which many tokens are stored, changes nothing but the last digits.
    half = attentive.run(inputs(data[0].half(), data[1], data[2].half(), data[3]), QUICK)[0]
    assert half["value"] == pytest.approx(result["value"], abs=0.05)
    assert half["id"] == result["id"]


def test_nothing_is_selected_on_test_images() -> None:
    tokens, labels = some_tokens(120, seed=3)
    test, answers = some_tokens(60, seed=4)
    honest, wrong = (
        attentive.run(inputs(tokens, labels, test, given), QUICK)[0] for given in (answers, (answers + 1) % 4)
    )
    assert honest["selection"] == wrong["selection"] and honest["id"] == wrong["id"]
    assert honest["details"]["validation"] == wrong["details"]["validation"]
    assert honest["details"]["epochs"]["train"] == wrong["details"]["epochs"]["train"]
    assert honest["value"] > wrong["value"]


def test_an_encoder_without_tokens_is_left_out_and_broken_tokens_are_an_error() -> None:
    tokens, labels = some_tokens(20, seed=5)
    given = inputs(tokens, labels, tokens, labels)
    broken = tokens.clone()
    broken[7, 2, 5] = math.nan
    with pytest.raises(UserError, match=mentions("attentive probe", "train", "NaN")):
        attentive.run(inputs(broken, labels, tokens, labels), QUICK)
    given.train.further.clear()
    assert attentive.run(given, QUICK) == []
    assert given.skipped == ["attentive probe: the encoder returns no patch tokens"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"learning_rates": []}, ["learning_rates", "[]"]),
        ({"weight_decays": [-0.1]}, ["weight_decays", "-0.1"]),
        ({"epochs": 0}, ["epochs", 0]),
        ({"batch_size": 0}, ["batch_size", 0]),
    ],
)
def test_settings_are_checked(change: dict, parts: list) -> None:
    with pytest.raises(UserError, match=mentions("evaluation.settings.attentive", *parts)):
        Config(**change).check("evaluation.settings.attentive")
