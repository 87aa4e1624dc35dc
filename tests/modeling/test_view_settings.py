# SPDX-License-Identifier: Apache-2.0
"""A run from a local encoder uses the image size and normalization of its processor, but stores no path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_ssl import SimCLRForPreTraining
from hf_ssl.modeling.loading import view_settings

SQUARE, CROP = {"height": 24, "width": 24}, {"height": 32, "width": 32}
STD = [0.25, 0.5, 0.4]
PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bit": (BitImageProcessor, {"size": {"shortest_edge": 36}, "crop_size": CROP, "image_std": STD}),
    "vit": (ViTImageProcessor, {"size": SQUARE, "image_std": STD}),
    "convnext": (ConvNextImageProcessor, {"size": {"shortest_edge": 24}, "image_std": STD}),
    # By default, these processors have a `crop_size`, but do not crop.
    "beit": (BeitImageProcessor, {"size": SQUARE, "crop_size": CROP, "do_center_crop": False}),
    "efficientnet": (EfficientNetImageProcessor, {"size": SQUARE, "crop_size": CROP, "image_std": STD}),
    "efficientnet without head": (EfficientNetImageProcessor, {"size": SQUARE, "include_top": False}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_views_equal_the_images_of_the_processor(name: str, tmp_path: Path) -> None:
    processor_class, options = PROCESSORS[name]
    processor = processor_class(**options)
    processor.save_pretrained(tmp_path)
    photo = torch.full((3, 50, 50), 128, dtype=torch.uint8)
    expected = processor([photo], return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    views = view_settings(str(tmp_path), 3)
    assert expected.shape == (1, 3, views["size"], views["size"])
    mean, std = (torch.tensor(views[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close((photo[:, :1, :1] / 255 - mean) / std, expected[0, :, :1, :1])


@pytest.mark.parametrize(
    ("processor", "warns"),
    [
        (ViTImageProcessor(size=SQUARE), False),
        (ViTImageProcessor(size=SQUARE, do_rescale=False), True),
        (ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5), True),
        (MobileViTImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE), True),  # BGR
    ],
)
def test_other_values_of_pixels_are_reported(processor, warns, tmp_path, caplog) -> None:
    processor.save_pretrained(tmp_path)
    assert view_settings(str(tmp_path), 3)["size"] == 24
    assert [type(processor).__name__ in record.getMessage() for record in caplog.records] == [True] * warns


@pytest.mark.parametrize("model_class", [ViTModel, ViTMAEModel])
def test_no_file_of_a_run_contains_the_path_of_its_first_encoder(model_class: Any, tmp_path: Path) -> None:
    """transformers 5.24 removes the path only from the configuration of the whole model."""
    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8,
    )  # fmt: skip
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    start = model_class(config if model_class is ViTMAEModel else model_class.config_class(**fields))
    start.save_pretrained(tmp_path / "private" / "start")
    model = SimCLRForPreTraining.from_backbone(tmp_path / "private" / "start", views={"size": 32})
    for part, folder in ((model, "method"), (model.exported_encoder, "encoder")):
        part.save_pretrained(tmp_path / folder)
        assert "private" not in (tmp_path / folder / "config.json").read_text(encoding="utf-8")
