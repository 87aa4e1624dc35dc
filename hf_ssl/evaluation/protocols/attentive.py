# SPDX-License-Identifier: Apache-2.0
"""Attentive probe: one learned query attends to the frozen patch tokens, and a linear layer classifies.

It is the probe of CAPI (2502.08769, `eval_classification.py`). It consists of a query vector, one linear
layer for keys and values, heads of 64 dimensions, and a linear classifier. Unlike the probe of V-JEPA
(2404.08471), it has neither an output projection nor an MLP. The optimizer is CAPI's: AdamW with betas 0.9
and 0.95, a linear warmup over 10 % of the steps, then a cosine to zero. Learning rate and weight decay are
selected on 10 % of the training images. There are two differences. The tokens are cached, so there is no
augmentation. The learning rates are not scaled with the batch size.

Legend: N images, B images in a step, P patch tokens, D features, H attention heads, E = D / H features of a
head, A probes that are trained simultaneously, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ssl.errors import UserError, check_values, counted
from hf_ssl.evaluation.config import are_positive
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs, hold_out
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import EDGE, accuracy_result, is_at_edge, is_right
from hf_ssl.modeling.configuration import cosine_factor

VERSION = 1
BETAS, EPSILON = (0.9, 0.95), 1e-8
WARMUP = 0.1
HEAD_SIZE = 64
INITIAL_STD = 0.02


@dataclass
class Config:
    """Settings.

    Attributes:
        learning_rates, weight_decays: each pair is a probe. All probes are trained simultaneously.
        epochs, batch_size: of the training.
    """

    learning_rates: list[float] = field(default_factory=lambda: [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03])
    weight_decays: list[float] = field(default_factory=lambda: [0.0005, 0.05])
    epochs: int = 30
    batch_size: int = 256

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        rates, decays = list(self.learning_rates), list(self.weight_decays)
        are_decays = bool(decays) and all(0 <= decay < math.inf for decay in decays)
        check_values(
            where,
            ("learning_rates", rates, are_positive(rates), "one or more positive numbers"),
            ("weight_decays", decays, are_decays, "one or more numbers of at least 0"),
            ("epochs", self.epochs, self.epochs > 0, "a positive number"),
            ("batch_size", self.batch_size, self.batch_size > 0, "a positive number"),
        )


def features(config: Config) -> list[str]:
    """Return the further features that the probe needs."""
    return ["tokens"]


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of the probe with the selected learning rate and weight decay.

    All probes are trained on 90 % of the training images. The best one on the other 10 % is trained again on
    all training images. The test images are used for its accuracy only.

    Raises:
        UserError: the tokens are not finite.
    """
    train, test = inputs.train, inputs.test
    if "tokens" not in train.further:
        inputs.skipped.append("attentive probe: the encoder returns no patch tokens")
        return []
    tokens, test_tokens = (
        _on_device(split.further["tokens"], inputs.device, split.name) for split in (train, test)
    )
    labels, targets = (split.labels.to(inputs.device) for split in (train, test))
    pairs = [(rate, decay) for rate in sorted(set(config.learning_rates)) for decay in config.weight_decays]
    generator = torch.Generator().manual_seed(inputs.seed)
    kept, chosen = hold_out(len(train), inputs.seed)
    curves: dict[str, list[float]] = {"train": [], "test": []}

    def record(probes: Probes) -> None:
        curves["train"] += accuracies(probes, tokens, labels, torch.arange(len(train)), config.batch_size)
        curves["test"] += accuracies(probes, test_tokens, targets, torch.arange(len(test)), config.batch_size)

    with inputs.progress("attentive probe", 2 * config.epochs, "epoch") as bar:
        training = Training(tokens, labels, inputs.classes, config.epochs, config.batch_size, bar.update)
        probes = training.run(pairs, kept, generator)
        found = accuracies(probes, tokens, labels, chosen, config.batch_size)
        best = pairs[found.index(max(found))]
        probes = training.run([best], torch.arange(len(train)), generator, record)
        parts = test_tokens.split(config.batch_size)
        scores = torch.cat([probes.logits(rows.to(inputs.device, torch.float32))[:, 0] for rows in parts])
    result = _result(inputs, config, pairs, found, scores)
    result["details"]["epochs"] = curves
    return [result]


def _result(
    inputs: Inputs,
    config: Config,
    pairs: list[tuple[float, float]],
    validation: list[float],
    scores: Tensor,
) -> ProtocolResult:
    """Return the result of the best probe.

    Args:
        pairs, validation: learning rate and weight decay of each probe, and its accuracy on held-out images.
        scores: logits of the test images.
    """
    train, (_, patches, size) = inputs.train, inputs.train.further["tokens"].shape
    heads = attention_heads(size)
    accuracy = max(validation)
    rate, decay = pairs[validation.index(accuracy)]
    rates = [each for each, _ in pairs]
    at_edge = is_at_edge(rates, rate)
    return accuracy_result(
        "attentive",
        VERSION,
        asdict(config) | {"seed": inputs.seed},
        scores,
        inputs.test.labels.to(scores.device),
        key="attentive_probe",
        title="Attentive probe accuracy",
        column="attentive probe",
        text=f"cross-attention of one learned query over {patches} frozen patch tokens ("
        f"{counted(heads, 'head')}) and a linear classifier, without "
        f"augmentation. Optimizer: AdamW, {counted(config.epochs, 'epoch')}, batch size "
        f"{config.batch_size}, warmup and cosine schedule. The learning rate {rate:g}{EDGE * at_edge} and "
        f"the weight decay {decay:g} had the highest accuracy on a held-out {SELECTED_ON} "
        f"({counted(len(pairs), 'pair')} tested). The final probe was trained on all {train} and tested "
        f"on {inputs.test}",
        selection={"learning_rate": rate, "weight_decay": decay},
        selected_on=SELECTED_ON,
        details={
            "at_edge": at_edge,
            "validation_accuracy": accuracy,
            "validation": [
                {"learning_rate": pair[0], "weight_decay": pair[1], "accuracy": value}
                for pair, value in zip(pairs, validation, strict=True)
            ],
        },
    )


def attention_heads(size: int) -> int:
    """Return H, the largest divisor of D whose heads have at least 64 features, or 1."""
    return next(heads for heads in range(max(1, size // HEAD_SIZE), 0, -1) if size % heads == 0)


class Probes(NamedTuple):
    """A probes with stacked parameters.

    Attributes:
        query: (A, D).
        keys, values: (A, D, D), rows are outputs. Keys have no bias, because it would add the same number to
            the scores of all tokens.
        value_bias: (A, D).
        weight, bias: of the classifiers, (A, D, K) and (A, K).
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    value_bias: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, A, K) for float32 tokens (B, P, D).

        The result equals attention with the keys and the values of all tokens. This method computes neither
        of them. With a single query, the score of a token x is q . (K x) = (K^T q) . x. The attention weights
        of a head sum to 1. Therefore, the weighted mean of the values V x + b is V times the weighted mean of
        the tokens, plus b. One product with a D x D matrix then replaces one product for each token. A probes
        thus cost less than one probe that computes all keys and values.
        """
        probes, size = self.query.shape
        heads = attention_heads(size)
        split = (probes, heads, size // heads)
        queries = torch.einsum("ahe,ahed->ahd", self.query.view(split), self.keys.view(*split, size))
        scores = tokens @ (queries.flatten(0, 1) * split[2] ** -0.5).T
        pooled = (scores.softmax(dim=1).transpose(1, 2) @ tokens).unflatten(1, split[:2])
        values = torch.einsum("bahd,ahed->bahe", pooled, self.values.view(*split, size)).flatten(2)
        return torch.einsum("bae,aek->bak", values + self.value_bias, self.weight) + self.bias


def new_probes(count: int, size: int, classes: int, device: torch.device, seed: int) -> Probes:
    """Return `count` probes with the same initial values: truncated normal weights, and zero biases."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        values = torch.empty(shape)
        torch.nn.init.trunc_normal_(values, std=INITIAL_STD, generator=generator)
        return values.expand(count, *shape).clone().to(device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(count, *shape, device=device)

    return Probes(
        weights(size), weights(size, size), weights(size, size), zeros(size), weights(size, classes),
        zeros(classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """Trains probes on cached tokens.

    Attributes:
        tokens: (N, P, D), float16 or float32, on the device of the labels or on the CPU.
        labels: (N,), on the device of the computation.
        classes: K.
        epochs, batch_size: settings of a training.
        advance: called with 1 after each epoch.
    """

    tokens: Tensor
    labels: Tensor
    classes: int
    epochs: int
    batch_size: int
    advance: Callable[[int], object] = lambda epochs: None

    def run(
        self,
        pairs: Sequence[tuple[float, float]],
        rows: Tensor,
        generator: torch.Generator,
        after_epoch: Callable[[Probes], object] = lambda probes: None,
    ) -> Probes:
        """Return a probe for each pair (learning rate, weight decay), trained on the same batches.

        Args:
            pairs: learning rate and weight decay of each probe.
            rows: row numbers of the training images.
            generator: generator for the order of the images.
            after_epoch: called with the probes after each epoch.
        """
        device = self.labels.device
        probes = new_probes(len(pairs), self.tokens.shape[2], self.classes, device, generator.initial_seed())
        optimizer = _AdamW(probes, pairs)
        steps = self.epochs * math.ceil(len(rows) / self.batch_size)
        step = 0
        for _ in range(self.epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for index in order.split(self.batch_size):
                batch, labels = _rows(self.tokens, index, device), self.labels[index.to(device)]
                with torch.enable_grad():
                    logits = probes.logits(batch).flatten(0, 1)
                    targets = labels.repeat_interleave(len(pairs))
                    loss = F.cross_entropy(logits, targets, reduction="sum") / len(index)
                gradients = torch.autograd.grad(loss, list(probes))
                optimizer.step(gradients, schedule(step, steps))
                step += 1
            after_epoch(probes)
            self.advance(1)
        for parameter in probes:
            parameter.requires_grad_(False)
        return probes


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warmup over 10 % of the steps, then cosine to zero."""
    warmup = round(WARMUP * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return cosine_factor(step, steps, warmup)


class _AdamW:
    """AdamW for stacked probes, each with its own learning rate and weight decay.

    `torch.optim.AdamW` has one learning rate for a tensor. Biases have no weight decay.
    """

    def __init__(self, probes: Probes, pairs: Sequence[tuple[float, float]]) -> None:
        self.probes = probes
        self.means = [torch.zeros_like(parameter) for parameter in probes]
        self.squares = [torch.zeros_like(parameter) for parameter in probes]
        self.rates, self.decays = torch.tensor(pairs, device=probes.query.device).T
        self.count = 0
        for parameter in probes:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Update the probes.

        Args:
            gradients: of the parameters.
            factor: factor of the learning rates.
        """
        self.count += 1
        first, second = (1 - beta**self.count for beta in BETAS)
        states = zip(Probes._fields, self.probes, gradients, self.means, self.squares, strict=True)
        for name, parameter, gradient, mean, square in states:
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            rate = (factor * self.rates).view(shape)
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient * gradient, 1 - BETAS[1])
            if "bias" not in name:
                parameter.mul_(1 - rate * self.decays.view(shape))
            parameter.sub_(rate / first * mean / ((square / second).sqrt_() + EPSILON))


@torch.no_grad()
def accuracies(probes: Probes, tokens: Tensor, labels: Tensor, rows: Tensor, batch_size: int) -> list[float]:
    """Return the accuracy of each probe on some images, A numbers in [0, 1]."""
    right = torch.zeros(len(probes.query), dtype=torch.long, device=labels.device)
    for index in rows.split(batch_size):
        scores = probes.logits(_rows(tokens, index, labels.device))
        right += is_right(scores, labels[index.to(labels.device)][:, None]).sum(dim=0)
    return (right.cpu().double() / len(rows)).tolist()


def _rows(tokens: Tensor, index: Tensor, device: torch.device) -> Tensor:
    return tokens[index.to(tokens.device)].to(device, torch.float32)


def _on_device(tokens: Tensor, device: torch.device, split: str) -> Tensor:
    """Return checked tokens, on the device if they take at most a third of the free memory of a GPU."""
    for rows in tokens.split(1024):
        if not torch.isfinite(rows.sum(dtype=torch.float32)):
            raise UserError(f"attentive probe, split {split}: expected finite tokens, got NaN or infinity")
    if device.type == "cuda" and tokens.nbytes > torch.cuda.mem_get_info(device)[0] // 3:
        return tokens
    return tokens.to(device)
