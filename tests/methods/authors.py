# SPDX-License-Identifier: Apache-2.0
"""Inputs and stored results of public implementations of CPC, CMC, PIRL and instance discrimination.

`authors_cpc_cmc_pirl.json` contains numbers that the public code returned. This module computes the inputs
of that code and describes each algorithm. `test_authors.py` and `test_authors_cpc.py` repeat each algorithm
in a slow version.

Sources. The code was run, not copied. The license of PyContrast is in its folder `pycontrast`. The license
of PyContrast is in its folder `pycontrast`. The license of PyContrast is in its folder `pycontrast`.

| name | repository and commit | license |
|---|---|---|
| CMC | HobbitLong/CMC 7b227be0b10ef4e526c72af07664f5079ed9ee09 | BSD-2-Clause |
| PyContrast | HobbitLong/PyContrast 84f94eabec4f031194c543579476ae52ea647b90 | BSD-2-Clause |
| VISSL | facebookresearch/vissl 09270ed25a6c2cf71263d955b64cbe076d34ac45 | MIT |
| Greedy InfoMax | loeweX/Greedy_InfoMax 22d17e44c5f05d77c02f20f6ac2949a99cfabd87 | MIT |
| CPCV2 | rschwarz15/CPCV2-PyTorch c39c85a66c2d7e21805c86edc1fc36daea10d2cf | MIT |
| bolts | Lightning-Universe/lightning-bolts 34958a8892d42714edf02ba896fd5861ebb3cb7e | Apache-2.0 |

Environment: torch 2.14.1 on a CPU, numpy 2.4.6, scikit-image 0.26.0. The default type was float64, one
thread was used, and `Tensor.cuda` returned its tensor. The default type also applies to the `params` buffers
of the banks. In the original float32 code these buffers round T and Z to float32. Random draws were replaced
by the stored indices. Gradients are with respect to the leaves named in each case. The registration
decorators of VISSL and `under_review` of bolts were replaced by identities.

Notation: B images, C or D channels, H rows and W columns of the grid, K negatives, N rows of a bank, T =
0.07. All weights come from `weights(shape, number)`. The number counts the parameters in the order of
construction. A weight precedes its bias. All embeddings and banks come from `wave`, as stated for each case.

## cpc_loss
Greedy InfoMax `vision/models/InfoNCE_Loss.py`, `InfoNCE_Loss.forward(z, c, skip_step)`; CPCV2
`cpc_models/InfoNCE_Loss.py`. Both returned identical numbers. z = scale * wave(2, 3, 5, 4, phase=0.1) is the
encoding (B, C, H, W), c = wave(2, 3, 5, 4, phase=0.2) is the context. There are 2 steps, 3 negatives, and
skip 1 (the default) or 0. The scale 8 gives probabilities below the epsilon.
1. For step k = 1, 2, ..., the context at (y, x) predicts the encoding at (y + k + skip, x). Row y runs from
   0 to H - k - skip - 1.
2. The linear map W_k = wave(C, C, phase=0.3 + k - 1) has no bias. It multiplies the *encoding*: W_k z. The
   score is the dot product c . W_k z, without scale or temperature.
3. The mapped encodings of the step form a list in the order (target row, column, image). The image varies
   fastest. The first target row k + skip has index 0.
4. Each position draws its own negatives from this list, with replacement. A negative can be the
   positive. `indices[k - 1]` has the order (row, column, image, negative).
5. loss_k = mean over positions of -log(p + 1e-11). p is the softmax probability of the positive among 1 + K
   scores. The loss is the mean over k. Stored: `loss_per_step`, `loss`, gradients with respect to z, c and
   each W_k (rows are outputs).

## cpc_directions
CPCV2 `cpc_models/CPC.py`, `CPC.forward`: 4 directions, 2 steps, 2 negatives, skip 1. The encodings (B, H, W,
C) are wave(2, 5, 4, 3, phase=0.4). The context network is the gated one below, with numbers from 0.
1. Direction 0 uses the encodings. Each further direction first turns the result of the previous direction
   clockwise by 90 degrees: new[i, j] = old[H - 1 - j, i].
2. All directions share the context network. Direction d has its own W_k = wave(C, C, phase=0.5 + 2 * d + k -
   1).
3. The loss is the mean over directions. `indices` holds the draws of direction 0, step 1, then step 2, and
   so on.

## cpc_context
`gated`: CPCV2 `cpc_models/PixelCNN_GIM.py`, `PixelCNN(3)`, equal to Greedy InfoMax
`vision/models/PixelCNN_Autoregressor.py`. It has four layers with two streams v and h that both start as z.
1. Each layer owns, in this order: a vertical 3 x 3 convolution C -> 2C, a 1 x 1 convolution 2C -> 2C from v
   to h, a horizontal 1 x 3 convolution C -> 2C, a 1 x 1 residual C -> 2C of v (not in the first layer), and
   a 1 x 1 output C -> C. All have biases. A last 1 x 1 convolution C -> C follows the four layers.
2. The mask "only_vert" sets the last kernel row of the vertical convolution to zero, so position (i, j) sees
   rows i - 1 and i. It masks no column: the horizontal convolution sees (i, j - 1), (i, j) and (i, j + 1).
   Mask A of the first layer has no effect. Zeros pad the borders.
3. a = vertical(v); b = horizontal(h) + v_to_h(a). Then a += residual(v), except in the first layer.
4. v = gate(a), h = output(gate(b)). From the second layer on, h = h + output(gate(b)). gate(x) = tanh(first
   C channels) * sigmoid(last C channels).
`bolts`: CPCV2 `cpc_models/PixelCNN_PL.py` and bolts `models/vision/pixel_cnn.py`, hidden width 4, five
blocks.
1. A block is a 1 x 1 convolution C -> 4, ReLU, a 1 x 3 convolution without padding, padding with one row of
   *ones* above, a 2 x 1 convolution with one zero column on each side, ReLU, and a 1 x 1 convolution 4 -> C.
2. z = z + block(z), five times, then ReLU. The 2 x 1 convolution sees rows i - 1 and i. A block adds a
   constant to the first and the last column, because they receive only the zero columns.
Inputs: wave(1, 3, 5, 4, phase=0.6); numbers start at 0 (gated) and 95 (bolts). `gated_field` and
`bolts_field` list the offsets (row, column) that influence a position: rows -4..0 and columns -4..4; rows
-5..0 and columns -5..5. No offset has a positive row. The own position and the positions to its right are
included.

## cpc_bolts
bolts `losses/self_supervised_learning.py`, `CPCTask`: negatives are all vectors of the batch. The encoding
is 3 * wave(2, 3, 5, 4, phase=0.6), the target width is 4. The context network is the one of `bolts` above.
1. targets = 1 x 1 convolution of the encoding (numbers 0, 1). predictions = 1 x 1 convolution of the context
   (numbers 2, 3; the weight, not the bias, is multiplied by 20 to vary the scores). Both have biases. All
   offsets share one prediction.
2. For i = 1 to H - 2, the prediction at row y is compared with the target at row y + i + 1. Its logits are
   the dot products of 0.1 * prediction with *all* B * H * W targets. loss_i is the mean cross entropy.
3. The double loop of the code adds loss_i i times, so loss = sum of i * loss_i. i = H - 1 has no rows and is
   left out as NaN.

## cmc
CMC `NCE/NCEAverage.py`, `NCEAverage.forward(l, ab, y, idx)`; `NCE/NCECriterion.py`, `NCECriterion` and
`NCESoftmaxLoss`; `train_CMC.py`, lines 223 to 231. The step s = 0, 1, 2 has l = unit_rows(wave(3, 4, phase=1
+ s)) and ab = unit_rows(wave(3, 4, phase=2 + s)), both (B, D). The banks start as wave(10, 4, phase=0.7) (l)
and wave(10, 4, phase=0.8) (ab) divided by sqrt(D / 3). They are not normalized. The authors draw them
uniformly from -1 to 1, divided by sqrt(D / 3). `bank_inputs` has the rows of the images and the indices (B,
1 + K). Column 0 is the row of the image. Both views share the indices. Negatives are drawn with replacement
from all N rows, so they can contain the positive row.
1. score_l[b, k] = l[b] . bank_ab[index]; score_ab[b, k] = ab[b] . bank_l[index]. Both use the old banks.
2. nce: P = exp(score / T) / Z. In the first batch, Z = N * mean over (B, 1 + K) of exp(score / T), for each
   view. Z then stays constant. It gets no gradient.
3. nce loss = -(1 / B) * sum over b of [log(P_0 / (P_0 + K / N + 1e-7)) + sum over negatives of log((K / N) /
   (P_k + K / N + 1e-7))].
4. softmax loss = mean cross entropy of score / T with label 0. Z stays -1.
5. loss = loss_l + loss_ab. `score_l` and `score_ab` are the means of column 0 of the inputs to the loss.
6. Then both banks change: row = 0.5 * row + 0.5 * embedding, divided by its norm (without epsilon).
`pycontrast` is `memory/mem_bank.py`, `CMCMem`, and `learning/contrast_trainer.py`, lines 359 to 449: the
softmax form. The banks start as unit_rows(wave(10, 4, phase=1.2)) and unit_rows(wave(10, 4, phase=1.3)). The
norm has the epsilon 1e-12 of `torch.nn.functional.normalize`. x1 = l and x2 = ab.
`pycontrast_jigsaw` adds j1 = unit_rows(wave(3, 4, phase=4 + s)) and j2 = unit_rows(wave(3, 4, phase=5 + s)).
The trainer passes them in exchanged order. So j2 is compared with bank 2 (third loss) and j1 with bank 1
(fourth). loss = 0.5 * (first + second) + 0.5 * (third + fourth). Gradients are those of x1, x2, j1, j2. No
public code with more than two views was found. L_C and L_F therefore have no stored case.

## instance_discrimination
`nce` and `softmax`: CMC `NCE/NCEAverage.py`, `MemoryInsDis`. They equal `cmc` with one bank, which starts as
wave(10, 4, phase=0.9) / sqrt(D / 3), and x = unit_rows(wave(3, 4, phase=3 + s)). The positive is the row of
the image itself. `pycontrast`: `memory/mem_bank.py`, `RGBMem`, softmax, bank unit_rows(wave(10, 4,
phase=1.1)).

## pirl
`vissl_nce` and `vissl_softmax`: VISSL `losses/nce_loss.py`, `NCELossWithMemory`. The outputs are jigsaw = 2
* wave(3, 4, phase=4 + s) and image = 2 * wave(3, 4, phase=3 + s). The bank starts as unit_rows(wave(10, 4,
phase=1.1)).
1. Both outputs are normalized (epsilon 1e-12). The gradients are those of the outputs before this.
2. The jigsaw term comes first, then the image term. Each draws its own negatives
   (`indices_of_two_terms[s][0]` and `[1]`). The positive of both is the bank row of the image.
3. nce as in `cmc`, with the epsilon of float32 (2 ** -23) for 1e-7. Both terms share one Z. The first jigsaw
   term sets it.
4. loss = 0.5 * jigsaw + 0.5 * image. After its scores, the image term updates the bank with the normalized
   image vector: 0.5 * row + 0.5 * vector, normalized with epsilon 1e-12. The jigsaw vector never enters the
   bank.
`pycontrast`: `RGBMem` with `x_jig`, and the trainer with beta 0.5. The image is unit_rows(wave(3, 4, phase=3
+ s)), jigsaw is unit_rows(wave(3, 4, phase=4 + s)). Both terms share the indices of `bank_inputs` and use
softmax. loss = (1 - beta) * image + beta * jigsaw. The bank is updated with the image vector after both.

## pirl_heads
Patch features wave(18, 5, phase=6.0) of two images, nine each; image features wave(2, 5, phase=7.0). Numbers
start at 0 in each head, also in the head of the images.
`pycontrast_linear` and `pycontrast_mlp`: `networks/util.py`, `JigsawHead(5, 4, 9, head)`, and
`networks/build_backbone.py`, `RGBSingleHead`. Linear 5 -> 4 per patch (mlp: 5 -> 5, ReLU, 5 -> 4, no ReLU at
the end); slot s of an image then holds patch `permutations[image][s]`; concatenation to 36; Linear 36 -> 4;
norm 1. Image: Linear 5 -> 4 (mlp: 5 -> 5, ReLU, 5 -> 4); norm 1.
`vissl_linear` and `vissl_mlp`: `models/heads/mlp.py` and `siamese_concat_view.py` with the configuration
files `pirl_jigsaw_4node_resnet50.yaml` and `models/resnet50_mlphead.yaml`. The same without permutation (the
data transform permutes the patches) and without normalization (the loss normalizes). In the mlp form, the
second layer of the patches is followed by ReLU, and the one of the image is not.

## pirl_layout
`pycontrast`: `datasets/util.py`, `JigsawCrop` (255 px, 3 x 3 cells of 85 px, patches of 64 px). Patch 3 * r
+ c is from cell row r and column c. Its corner is (85 r + down, 85 c + right). The offsets are uniform from
0 to 21, both included. The head permutes.
`vissl`: `data/ssl_transforms/img_patches_tensor.py` and `img_pil_to_patches_and_image.py`. Before the
permutation the patches are in column order: patch 3 * i + j is from cell *column* i and row j. Its corner is
(85 j + values[1][i][j], 85 i + values[0][i][j]). Offsets are uniform from 0 to 20: the last possible one is
never drawn. Output slot s holds patch permutation[s]. Any of the 9! permutations can be drawn. Corners are
(row, column) of the first pixel. `patch` holds the height and the width of a patch.

## colors
`lab` and `ycbcr`: CMC `dataset.py`, `RGB2Lab` and `RGB2YCbCr`; `ydbdr`: PyContrast `datasets/util.py`,
`RGB2YDbDr`. Each calls scikit-image on uint8, and `ToTensor` keeps the float values. `normalized` = (value -
mean) / std. The means and standard deviations are in `train_CMC.py`, lines 131 to 138, and
`datasets/util.py`, lines 233 to 240.
1. v = byte / 255. Lab: linear = ((v + 0.055) / 1.055) ** 2.4 if v > 0.04045, otherwise v / 12.92.
2. X = .412453 r + .35758 g + .180423 b, Y = .212671 r + .71516 g + .072169 b, Z = .019334 r + .119193 g +
   .950227 b. They are divided by (0.95047, 1, 1.08883).
3. f(t) = cube root of t if t > 0.008856, otherwise 7.787 t + 16 / 116. L = 116 f(Y) - 16, a = 500 (f(X) -
   f(Y)), b = 200 (f(Y) - f(Z)). No value is clipped.
4. YDbDr and YCbCr are linear in v. See `YDBDR` and `YCBCR`; YCbCr adds (16, 128, 128).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPC_SHAPE = (2, 3, 5, 4)  # images, channels, rows, columns
BOLTS_FIRST = 95  # number of the first parameter of the context network of bolts
BANK_ROWS, WIDTH, NEGATIVES, TEMPERATURE, MOMENTUM = 10, 4, 5, 0.07, 0.5
YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))


def stored() -> dict[str, Any]:
    """Return the results of the public code by case."""
    return json.loads(Path(__file__).with_name("authors_cpc_cmc_pirl.json").read_text())


def wave(*shape: int, phase: float) -> Tensor:
    """Return sin(0.37 i + 0.013 i**2 + phase) in float64 for i = 0, 1, ... in row-major order."""
    position = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.37 * position + 0.013 * position * position + phase).reshape(shape)


def unit_rows(rows: Tensor) -> Tensor:
    """Return the rows (N, D) divided by their Euclidean norms."""
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def weights(shape: Iterable[int], number: int) -> Tensor:
    """Return the values of parameter `number` of a module, counted from 0 in the order of construction."""
    return 0.4 * wave(*shape, phase=8 + 0.1 * number)


def embeddings(step: int, phase: float) -> Tensor:
    """Return three unit vectors (3, 4) of step 0, 1 or 2, as leaves of the graph."""
    return unit_rows(wave(3, WIDTH, phase=phase + step)).requires_grad_()


def agree(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Raise if numbers or tensors differ by more than `tolerance`, absolute plus relative."""
    expected = torch.tensor(expected, dtype=torch.float64)
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=tolerance, atol=tolerance)


def layer(number: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Return weight `number` and bias `number + 1` of a linear or convolution layer."""
    return weights(shape, number), weights(shape[:1], number + 1)
