# SPDX-License-Identifier: Apache-2.0
"""The layers of a head, by default and with its options."""

import pytest
from torch import nn

from hf_ssl.modeling.batch_norm import BatchNorm1dWithoutOffset
from hf_ssl.modeling.heads import MLPHead


def test_by_default_hidden_layers_are_normalized_and_no_layer_has_a_bias():
    first, norm, activation, last = MLPHead([4, 8, 3])
    assert (first.weight.shape, last.weight.shape) == ((8, 4), (3, 8))
    assert first.bias is None and last.bias is None
    assert type(norm) is nn.BatchNorm1d and norm.affine and norm.num_features == 8
    assert type(activation) is nn.ReLU


def test_a_bias_replaces_the_norm():
    first, activation, last = MLPHead([4, 8, 3], norm=False, last_bias=True, activation=nn.GELU)
    assert first.bias is not None and last.bias is not None and type(activation) is nn.GELU
    first, norm, _, _ = MLPHead([4, 8, 3], bias=True, affine=False)
    assert first.bias is not None and not norm.affine


def test_two_widths_make_one_layer():
    assert [type(layer) for layer in MLPHead([4, 3])] == [nn.Linear]


@pytest.mark.parametrize(
    ("last_norm", "layer", "affine"),
    [
        ("batch", nn.BatchNorm1d, True),
        ("batch_without_affine", nn.BatchNorm1d, False),
        ("batch_without_offset", BatchNorm1dWithoutOffset, None),
    ],
)
def test_the_last_norm(last_norm, layer, affine):
    last = MLPHead([4, 3], last_norm=last_norm)[-1]
    assert type(last) is layer and affine in (None, last.affine)
