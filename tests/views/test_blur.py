# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from hf_ssl.views.blur import blur_, gaussian_shares


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    ("side", "kernel"), [(5, 9), (16, 1), (32, 3), (32, 23), (33, 9), (64, 5), (96, 9), (100, 41)]
)
def test_blur_equals_torchvision(side, kernel, channels):
    """One tile and several, the last one narrow; kernels that reach across tiles and from end to end."""
    images = torch.rand(6, channels, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.1, 2.0, 6.0])
    got = images.clone()
    blur_(got, sigma, kernel)
    for view, image, one in zip(got, images, sigma.tolist(), strict=True):
        expected = tv.gaussian_blur(image, [kernel, kernel], [one, one])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_shares_sum_to_one_and_are_never_denormal():
    shares = gaussian_shares(torch.linspace(0.1, 3, 500), 11)
    torch.testing.assert_close(2 * shares.sum(1) - shares[:, 0], torch.ones(500))
    assert shares[shares > 0].min() > 1e-21
    assert (shares.diff(dim=1) <= 0).all()
