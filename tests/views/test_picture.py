# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from PIL import Image

from hf_ssl.views import ViewOverrides, ViewPreset, Views, apply, montage


def test_a_row_for_each_image_in_its_own_colours(tmp_path, make_images, draw_for):
    preset = ViewPreset(
        size=20, flip=0, jitter=0, gray=0, blur=0, scale=(1.0, 1.0), ratio=(1.0, 1.0),
        local=ViewOverrides(count=3, size=10),
    )  # fmt: skip
    images = make_images(5, 3, 20, 20)
    montage(apply(images, draw_for(images, preset)), preset, tmp_path / "views.png", max_images=4)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (4 * 22, 2 * 22 + 3 * 12, 3)
    for row in range(4):
        for column in (0, 22):
            tile = picture[row * 22 : row * 22 + 20, column : column + 20]
            assert (tile == images[row].permute(1, 2, 0).numpy()).all()
    assert (picture[20:22] == 255).all() and (picture[12:20, 44:] == 255).all()


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(channels, tmp_path):
    preset = ViewPreset(mean=(0.5,) * channels, std=(0.25,) * channels)
    views = Views(torch.full((2, 3, channels, 8, 8), 1.0))
    montage(views, preset, tmp_path / "views.png")
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (20, 30, 3) and (picture[:8, :8] == 191).all()
