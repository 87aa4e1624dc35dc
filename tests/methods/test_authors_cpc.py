# SPDX-License-Identifier: Apache-2.0
"""Slow versions of CPC against results of public code (authors.py).

They are written from the description in authors.py, with loops over positions, images and negatives."""

import pytest
import torch
import torch.nn.functional as F
from methods.authors import BOLTS_FIRST, CPC_SHAPE, agree, layer, stored, wave

CASES = stored()


def prediction_losses(encoding, context, maps, indices, skip):
    """Return the loss of each step of CPC with drawn negatives."""
    losses = []
    for step, (matrix, drawn) in enumerate(zip(maps, indices, strict=True), start=1):
        places = [
            (row, column, image)
            for row in range(step + skip, encoding.shape[2])
            for column in range(encoding.shape[3])
            for image in range(len(encoding))
        ]
        mapped = [matrix @ encoding[image, :, row, column] for row, column, image in places]
        count, terms = len(drawn) // len(places), []
        for place, (row, column, image) in enumerate(places):
            candidates = [place, *drawn[place * count : (place + 1) * count]]
            anchor = context[image, :, row - step - skip, column]
            scores = torch.stack([anchor @ mapped[candidate] for candidate in candidates])
            terms.append(-torch.log(scores.exp()[0] / scores.exp().sum() + 1e-11))
        losses.append(sum(terms) / len(terms))
    return losses


def gated_context(encoding):
    """Return the context (B, C, H, W) of the gated network."""
    C = encoding.shape[1]

    def gate(x):
        return x[:, :C].tanh() * x[:, C:].sigmoid()

    vertical = horizontal = encoding
    number = 0
    for depth in range(4):
        kernel, bias = layer(number, 2 * C, C, 3, 3)
        above = F.conv2d(F.pad(vertical, (1, 1, 1, 0)), kernel[:, :, :2], bias)
        beside = F.conv2d(
            F.pad(horizontal, (1, 1)), *layer(number + 4, 2 * C, C, 1, 3)
        ) + F.conv2d(above, *layer(number + 2, 2 * C, 2 * C, 1, 1))  # fmt: skip
        number += 6
        if depth:
            above = above + F.conv2d(vertical, *layer(number, 2 * C, C, 1, 1))
            number += 2
        out = F.conv2d(gate(beside), *layer(number, C, C, 1, 1))
        vertical, horizontal = gate(above), horizontal + out if depth else out
        number += 2
    return F.conv2d(horizontal, *layer(number, C, C, 1, 1))


def bolts_context(encoding, hidden=4, first=BOLTS_FIRST):
    """Return the context (B, C, H, W) of the network of bolts, row by row and column by column."""
    B, C, H, W = encoding.shape
    for number in range(first, first + 40, 8):
        inner = F.conv2d(encoding, *layer(number, hidden, C, 1, 1)).relu()
        row_kernel, row_bias = layer(number + 2, hidden, hidden, 1, 3)
        column_kernel, column_bias = layer(number + 4, hidden, hidden, 2, 1)
        columns = []
        for column in range(W):
            column_rows = []
            for row in range(H):
                total = column_bias.expand(B, hidden)
                if 0 < column < W - 1:
                    for offset in (-1, 0):
                        seen = torch.ones(B, hidden, dtype=torch.float64)
                        if row + offset >= 0:
                            window = inner[:, :, row + offset, column - 1 : column + 2]
                            seen = torch.einsum("bcw,ocw->bo", window, row_kernel[:, :, 0]) + row_bias
                        total = total + seen @ column_kernel[:, :, offset + 1, 0].T
                column_rows.append(total)
            columns.append(torch.stack(column_rows, dim=2))
        middle = torch.stack(columns, dim=3).relu()
        encoding = encoding + F.conv2d(middle, *layer(number + 6, C, hidden, 1, 1))
    return encoding.relu()


def field(context, channels, size=13):
    """Return the offsets (row, column) that influence the context at the center."""
    encoding = wave(4, channels, size, size, phase=0.9).requires_grad_()
    context(encoding)[:, :, size // 2, size // 2].sum().backward()
    seen = encoding.grad.abs().sum((0, 1)).nonzero() - size // 2
    return sorted(seen.tolist())


@pytest.mark.parametrize(
    "case", CASES["cpc_loss"], ids=lambda case: f"skip{case['skip']}-scale{case['scale']}"
)
def test_cpc_loss(case):
    encoding, context = case["scale"] * wave(*CPC_SHAPE, phase=0.1), wave(*CPC_SHAPE, phase=0.2)
    leaves = [encoding, context, wave(3, 3, phase=0.3), wave(3, 3, phase=1.3)]
    for leaf in leaves:
        leaf.requires_grad_()
    losses = prediction_losses(encoding, context, leaves[2:], case["indices"], case["skip"])
    agree(torch.stack(losses), case["loss_per_step"])
    loss = sum(losses) / 2
    agree(loss, case["loss"])
    gradients = torch.autograd.grad(loss, leaves)
    for found, expected in zip(
        gradients, [case["gradient_z"], case["gradient_c"], *case["gradient_w"]], strict=True
    ):
        agree(found, expected)


def test_cpc_directions():
    case = CASES["cpc_directions"]
    B, C, H, W = CPC_SHAPE
    given = wave(B, H, W, C, phase=0.4).requires_grad_()
    encoding, losses = given.permute(0, 3, 1, 2), []
    for direction in range(4):
        if direction:
            rows, columns = encoding.shape[2:]
            turned = [[encoding[:, :, rows - 1 - j, i] for j in range(rows)] for i in range(columns)]
            encoding = torch.stack([torch.stack(row, dim=2) for row in turned], dim=2)
        maps = [wave(C, C, phase=0.5 + 2 * direction + step) for step in range(2)]
        drawn = case["indices"][2 * direction : 2 * direction + 2]
        losses.append(sum(prediction_losses(encoding, gated_context(encoding), maps, drawn, 1)) / 2)
    agree(torch.stack(losses), case["loss_per_direction"])
    loss = sum(losses) / 4
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, given)[0], case["gradient"])


@pytest.mark.parametrize("kind, context", [("gated", gated_context), ("bolts", bolts_context)])
def test_cpc_context(kind, context):
    case = CASES["cpc_context"]
    agree(context(wave(1, *CPC_SHAPE[1:], phase=0.6)), case[kind])
    assert field(context, 3) == case[f"{kind}_field"]
    assert max(row for row, _ in case[f"{kind}_field"]) == 0


def test_cpc_bolts():
    case = CASES["cpc_bolts"]
    B, C, H, W = CPC_SHAPE
    encoding = (3 * wave(*CPC_SHAPE, phase=0.6)).requires_grad_()
    targets = F.conv2d(encoding, *layer(0, 4, C, 1, 1))
    matrix, bias = layer(2, 4, C, 1, 1)
    predictions = 0.1 * F.conv2d(bolts_context(encoding), 20 * matrix, bias)
    everything = [targets[b, :, y, x] for b in range(B) for y in range(H) for x in range(W)]
    losses = []
    for offset in range(1, H - 1):
        terms = []
        for b in range(B):
            for y in range(H - 1 - offset):
                for x in range(W):
                    scores = torch.stack([predictions[b, :, y, x] @ target for target in everything])
                    positive = predictions[b, :, y, x] @ targets[b, :, y + offset + 1, x]
                    terms.append(scores.logsumexp(0) - positive)
        losses.append(sum(terms) / len(terms))
    agree(torch.stack(losses), case["loss_per_offset"])
    loss = sum(offset * loss for offset, loss in enumerate(losses, start=1))
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, encoding)[0], case["gradient"])
