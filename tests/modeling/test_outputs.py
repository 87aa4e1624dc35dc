# SPDX-License-Identifier: Apache-2.0
"""Entropy and share of the prototypes that images use, in closed form."""

import math

import pytest
import torch

from hf_ssl.modeling.outputs import prototype_usage


@pytest.mark.parametrize(
    ("nearest", "count", "entropy", "used"),
    [
        ([0, 1, 2, 3], 4, 1, 1),
        ([0, 0, 1, 1], 4, math.log(2) / math.log(4), 2 / 4),
        ([0, 0, 0, 1], 2, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2), 1),
        ([2, 2, 2, 2], 4, 0, 1 / 4),
        ([0, 1, 1], 100, -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)) / math.log(3), 2 / 3),
        ([0], 1, 0, 1),
    ],
)
def test_entropy_and_share(nearest, count, entropy, used):
    found = prototype_usage(torch.tensor(nearest), count)
    assert found == pytest.approx({"prototype_entropy": entropy, "prototypes_used": used}, abs=1e-6)
