# SPDX-License-Identifier: Apache-2.0
"""Slow versions of CMC, PIRL and instance discrimination against results of public code (authors.py).

They are written from the description in authors.py, with loops over images and negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from methods.authors import (
    BANK_ROWS,
    MOMENTUM,
    NEGATIVES,
    TEMPERATURE,
    WIDTH,
    YCBCR,
    YDBDR,
    agree,
    embeddings,
    layer,
    stored,
    unit_rows,
    wave,
)
from torch import Tensor

CASES = stored()
STEPS = range(3)


def scores_of(anchors, bank, indices):
    """Return the dot products (B, 1 + K) divided by the temperature, one at a time."""
    return torch.stack(
        [
            torch.stack([anchor @ bank[index] for index in row]) / TEMPERATURE
            for anchor, row in zip(anchors, indices, strict=True)
        ]
    )


def softmax_loss(scores):
    return sum(row.logsumexp(0) - row[0] for row in scores) / len(scores)


def nce_loss(scores, z, epsilon):
    """Return the loss of noise-contrastive estimation with the constant z."""
    noise, total = NEGATIVES / BANK_ROWS, 0.0
    for row in scores.exp() / z:
        total = total - torch.log(row[0] / (row[0] + noise + epsilon))
        for negative in row[1:]:
            total = total - torch.log(noise / (negative + noise + epsilon))
    return total / len(scores)


def constant(scores):
    """Return Z of the first batch."""
    return BANK_ROWS * scores.detach().exp().mean().item()


def update(bank, rows, vectors):
    """Replace the rows of the bank by normalized moving averages."""
    for row, vector in zip(rows, vectors.detach(), strict=True):
        mixed = MOMENTUM * bank[row] + (1 - MOMENTUM) * vector
        bank[row] = mixed / mixed.norm()


def start(phase, normalized):
    """Return the first state of a bank."""
    bank = wave(BANK_ROWS, WIDTH, phase=phase)
    return unit_rows(bank) if normalized else bank / math.sqrt(WIDTH / 3)


def inputs(step):
    """Return the images' rows and the indices of one step."""
    return CASES["bank_inputs"]["rows"][step], CASES["bank_inputs"]["indices"][step]


@pytest.mark.parametrize("kind", ["nce", "softmax"])
def test_cmc(kind):
    case = CASES["cmc"][kind]
    banks, z = {"l": start(0.7, False), "ab": start(0.8, False)}, {"l": -1.0, "ab": -1.0}
    for step, expected in zip(STEPS, case["steps"], strict=True):
        rows, indices = inputs(step)
        views = {"l": embeddings(step, 1.0), "ab": embeddings(step, 2.0)}
        losses = []
        for view, other in (("l", "ab"), ("ab", "l")):
            scores = scores_of(views[view], banks[other], indices)
            if kind == "nce":
                z[view] = constant(scores) if step == 0 else z[view]
                losses.append(nce_loss(scores, z[view], 1e-7))
                scores = scores.exp() / z[view]
            else:
                losses.append(softmax_loss(scores))
            agree(losses[-1], expected[f"loss_{view}"])
            agree(z[view], expected[f"z_{view}"])
            agree(scores[:, 0].mean(), expected[f"score_{view}"])
        gradients = torch.autograd.grad(losses[0] + losses[1], list(views.values()))
        for view, gradient in zip(views, gradients, strict=True):
            agree(gradient, expected[f"gradient_{view}"])
            update(banks[view], rows, views[view])
    for view, bank in banks.items():
        agree(bank, case[f"bank_{view}"])


@pytest.mark.parametrize("jigsaw", [False, True], ids=["plain", "jigsaw"])
def test_cmc_of_pycontrast(jigsaw):
    case = CASES["cmc"]["pycontrast_jigsaw" if jigsaw else "pycontrast"]
    first, second = start(1.2, True), start(1.3, True)
    for step, expected in zip(STEPS, case["steps"], strict=True):
        rows, indices = inputs(step)
        vectors = [embeddings(step, phase) for phase in ((1.0, 2.0, 4.0, 5.0) if jigsaw else (1.0, 2.0))]
        pairs = [(vectors[0], second), (vectors[1], first)]
        if jigsaw:
            pairs += [(vectors[3], second), (vectors[2], first)]
        losses = [softmax_loss(scores_of(anchors, bank, indices)) for anchors, bank in pairs]
        loss = sum(losses) / (2 if jigsaw else 1)
        agree(torch.stack(losses), expected["losses"])
        agree(loss, expected["loss"])
        for found, gradient in zip(torch.autograd.grad(loss, vectors), expected["gradients"], strict=True):
            agree(found, gradient)
        update(first, rows, vectors[0])
        update(second, rows, vectors[1])
    agree(first, case["bank_1"])
    agree(second, case["bank_2"])


@pytest.mark.parametrize("kind", ["nce", "softmax", "pycontrast"])
def test_instance_discrimination(kind):
    case, z = CASES["instance_discrimination"][kind], -1.0
    bank = start(1.1, True) if kind == "pycontrast" else start(0.9, False)
    for step, expected in zip(STEPS, case["steps"], strict=True):
        rows, indices = inputs(step)
        vectors = embeddings(step, 3.0)
        scores = scores_of(vectors, bank, indices)
        if kind == "nce":
            z = constant(scores) if step == 0 else z
        loss = nce_loss(scores, z, 1e-7) if kind == "nce" else softmax_loss(scores)
        agree(loss, expected["loss"])
        agree(z, expected.get("z", -1.0))
        agree(torch.autograd.grad(loss, vectors)[0], expected["gradient"])
        update(bank, rows, vectors)
    agree(bank, case["bank"])


@pytest.mark.parametrize("kind", ["vissl_nce", "vissl_softmax", "pycontrast"])
def test_pirl_losses(kind):
    case, z, bank = CASES["pirl"][kind], -1.0, start(1.1, True)
    for step, expected in zip(STEPS, case["steps"], strict=True):
        rows, indices = inputs(step)
        if kind == "pycontrast":
            drawn = [indices, indices]
            leaves = [embeddings(step, 4.0), embeddings(step, 3.0)]
            vectors = leaves
        else:
            drawn = CASES["bank_inputs"]["indices_of_two_terms"][step]
            leaves = [(2 * wave(3, WIDTH, phase=phase + step)).requires_grad_() for phase in (4.0, 3.0)]
            vectors = [unit_rows(leaf) for leaf in leaves]
        scores = [scores_of(v, bank, d) for v, d in zip(vectors, drawn, strict=True)]
        if kind == "vissl_nce":
            z = constant(scores[0]) if step == 0 else z
            losses = [nce_loss(s, z, 2.0**-23) for s in scores]
        else:
            losses = [softmax_loss(s) for s in scores]
        loss = 0.5 * losses[0] + 0.5 * losses[1]
        agree(loss, expected["loss"])
        agree(z, expected.get("z", -1.0))
        gradients = torch.autograd.grad(loss, leaves)
        for name, term, gradient in zip(("jigsaw", "image"), losses, gradients, strict=True):
            agree(term, expected[f"loss_{name}"])
            agree(gradient, expected[f"gradient_{name}"])
        update(bank, rows, vectors[1])
    agree(bank, case["bank"])


@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize("source", ["pycontrast", "vissl"])
def test_pirl_heads(source, form):
    case, order = CASES["pirl_heads"][f"{source}_{form}"], list(range(9))

    def head(features: Tensor, last_relu: bool = False) -> tuple[Tensor, int]:
        number = 0
        if form == "mlp":
            features, number = F.linear(features, *layer(0, 5, 5)).relu(), 2
        out = F.linear(features, *layer(number, 4, 5))
        return (out.relu() if last_relu else out), number + 2

    def finish(rows: Tensor) -> Tensor:
        return unit_rows(rows) if source == "pycontrast" else rows

    agree(finish(head(wave(2, 5, phase=7.0))[0]), case["image"])
    patches, number = head(wave(18, 5, phase=6.0), last_relu=form == "mlp" and source == "vissl")
    joined = torch.stack(
        [
            torch.cat(
                [patches[9 * image + patch] for patch in case.get("permutations", [order, order])[image]]
            )
            for image in range(2)
        ]
    )
    agree(finish(F.linear(joined, *layer(number, 4, 36))), case["jigsaw"])


def test_pirl_layout():
    case = CASES["pirl_layout"]["pycontrast"]
    down, right = case["offsets_down"]["values"], case["offsets_right"]["values"]
    assert case["corners"] == [[85 * (n // 3) + down[n], 85 * (n % 3) + right[n]] for n in range(9)]
    assert case["offsets_down"]["high"] - 1 == 85 - case["patch"][0]
    case = CASES["pirl_layout"]["vissl"]
    right, down = case["offsets"]["values"]
    corners = [[85 * j + down[i][j], 85 * i + right[i][j]] for i in range(3) for j in range(3)]
    assert case["corners"] == [corners[patch] for patch in case["permutation"]]
    assert case["offsets"]["high"] == 85 - case["patch"][0]


def lab(rgb):
    """Return Lab of a color given as three bytes."""
    values = [byte / 255 for byte in rgb]
    r, g, b = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in values]
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883
    x, y, z = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def linear(matrix, shift):
    """Return a linear conversion of three bytes."""
    return lambda rgb: [
        sum(m * byte / 255 for m, byte in zip(row, rgb, strict=True)) + offset
        for row, offset in zip(matrix, shift, strict=True)
    ]


@pytest.mark.parametrize(
    "space, convert",
    [("lab", lab), ("ydbdr", linear(YDBDR, (0, 0, 0))), ("ycbcr", linear(YCBCR, (16, 128, 128)))],
    ids=["lab", "ydbdr", "ycbcr"],
)
def test_colors(space, convert):
    case = CASES["colors"][space]
    found = torch.tensor([convert(color) for color in CASES["colors"]["rgb"]], dtype=torch.float64)
    agree(found, case["values"])
    mean, std = (torch.tensor(case[key], dtype=torch.float64) for key in ("mean", "std"))
    agree((found - mean) / std, case["normalized"])
