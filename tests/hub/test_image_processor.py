# SPDX-License-Identifier: Apache-2.0
"""Tests that the processor prepares every kind of photo as in training."""

from importlib.metadata import version

import numpy as np
import pytest
import torch
from messages import mentions
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, BitImageProcessor, ResNetConfig, ResNetModel

from hf_ssl.errors import UserError
from hf_ssl.hub import image_processor
from hf_ssl.views import ViewPreset


def preset(channels: int = 3, **changes) -> dict:
    statistics = {"mean": (0.5, 0.4, 0.3)[:channels], "std": (0.25, 0.2, 0.3)[:channels]}
    return ViewPreset(**(statistics | changes)).to_dict()


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def processed(processor: BitImageProcessor, image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.25, 0.2, 0.3])[
        :, None, None
    ]


def test_an_image_of_native_size_is_only_normalized() -> None:
    image = photo(48, 48)
    expected = normalized(image / 255)
    torch.testing.assert_close(
        processed(image_processor(preset(size=48), 3), image), expected, atol=1e-5, rtol=0
    )


def test_small_images_are_enlarged_like_views() -> None:
    image = photo(32, 32)
    processor = image_processor(preset(size=32, enlarge=64, interpolation="bicubic"), 3)
    enlarged = F.interpolate((image / 255)[None], size=(64, 64), mode="bilinear", align_corners=False)[0]
    # The processor enlarges in 8 bits, the views in float: they differ by at most one of 255 levels.
    torch.testing.assert_close(
        processed(processor, image), normalized(enlarged), atol=1.01 / 255 / 0.2, rtol=0
    )


def test_large_photos_are_resized_with_the_filter_of_the_crops_and_center_cropped() -> None:
    image = photo(60, 90)
    by_filter = {}
    for mode in ("bilinear", "bicubic"):
        processor = image_processor(preset(size=30, interpolation=mode), 3)
        reduced = F.interpolate(
            image[None].float(), size=(30, 45), mode=mode, antialias=True, align_corners=False
        )[0]
        expected = normalized(reduced.round().clamp(0, 255)[:, :, 7:37] / 255)
        by_filter[mode] = processed(processor, image)
        torch.testing.assert_close(by_filter[mode], expected, atol=1.5 / 255 / 0.2, rtol=0)
    assert (by_filter["bilinear"] - by_filter["bicubic"]).abs().max() > 3 / 255 / 0.2, (
        "the filters must differ"
    )


def test_every_kind_of_photo_becomes_rgb(tmp_path) -> None:
    image_processor(preset(size=16), 3).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is BitImageProcessor
    pixels = photo(16, 16).permute(1, 2, 0).numpy()
    color = Image.fromarray(pixels)
    gray = color.convert("L")
    same = processed(processor, gray)
    torch.testing.assert_close(
        same, normalized(torch.tensor(np.array(gray)).expand(3, -1, -1) / 255), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        processed(processor, color), normalized(photo(16, 16) / 255), atol=1e-5, rtol=0
    )

    transparent = color.convert("RGBA")
    transparent.putalpha(0)
    both = gray.convert("LA")
    both.putalpha(0)
    # The card states that transformers places transparent photos on white from 5.21 on, unlike 5.20.
    drops = version("transformers").startswith("5.20.")
    white = normalized(torch.ones(3, 16, 16))
    for photograph, opaque in ((transparent, color), (both, gray)):
        expected = processed(processor, opaque) if drops else white
        torch.testing.assert_close(processed(processor, photograph), expected, atol=1e-5, rtol=0)
    palette = color.quantize(8)
    expected = normalized(torch.tensor(np.array(palette.convert("RGB"))).permute(2, 0, 1) / 255)
    torch.testing.assert_close(processed(processor, palette), expected, atol=1e-5, rtol=0)
    assert processed(processor, color.convert("CMYK")).shape == (3, 16, 16)


def test_one_channel_accepts_gray_photos_only() -> None:
    processor = image_processor(preset(1, size=16), 1)
    encoder = ResNetModel(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1]))
    gray = Image.fromarray(photo(16, 16)[0].numpy())
    torch.testing.assert_close(
        processed(processor, gray), (photo(16, 16)[:1] / 255 - 0.5) / 0.25, atol=1e-5, rtol=0
    )
    encoder(**processor(gray, return_tensors="pt"))
    with pytest.raises(ValueError, match="channel dimension"):
        encoder(**processor(gray.convert("RGB"), return_tensors="pt"))


def test_arrays_with_many_channels() -> None:
    values = preset(size=16) | {"mean": [0.5] * 5, "std": [0.5] * 5}
    array = np.full((5, 20, 20), 255, dtype=np.uint8)
    pixels = image_processor(values, 5)(array, return_tensors="pt", input_data_format="channels_first")[
        "pixel_values"
    ]
    assert pixels.shape == (1, 5, 16, 16)
    assert torch.all(pixels == 1)


def test_settings_that_do_not_match_are_errors() -> None:
    with pytest.raises(UserError, match=mentions("views.mean", 1)):
        image_processor(preset(), 1)
    with pytest.raises(UserError, match=mentions("views.interpolation", "nearest", "bilinear", "bicubic")):
        image_processor(preset() | {"interpolation": "nearest"}, 3)
