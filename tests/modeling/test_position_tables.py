# SPDX-License-Identifier: Apache-2.0
"""A trained encoder starts a training with images of another size."""

from typing import Any

import pytest
import torch
import transformers
from messages import mentions
from transformers.utils import logging

from hf_ssl import SimCLRForPreTraining
from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import check_image_sizes, encode
from hf_ssl.modeling.configuration import size_arguments
from hf_ssl.modeling.position_tables import config_at_size

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def new(name: str, **further: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | further)
    encoder = getattr(transformers, f"{name}Model")(config)
    for key, table in encoder.named_parameters():
        if "position_embedding" in key:  # new tables can be zero
            torch.nn.init.normal_(table)
    return encoder.eval()


@pytest.mark.parametrize("name", ["ViT", "DeiT", "IJepa", "SiglipVision", "CLIPVision", "ViTMSN"])
@pytest.mark.parametrize("side", [16, 48])
def test_the_start_has_the_features_of_the_encoder(name: str, side: int) -> None:
    """Without `interpolate_pos_encoding`, which users of the published encoder do not pass."""
    encoder = new(name)
    model = SimCLRForPreTraining.from_backbone(encoder, views={"size": side}).eval()
    assert (encoder.config.image_size, model.backbone.config.image_size) == (32, side)
    check_image_sizes(model.backbone, [side], 3, side)
    images = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        expected = encoder(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.backbone(images).last_hidden_state, expected)


def test_the_user_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    SimCLRForPreTraining.from_backbone(new("ViT"), views={"size": 16})
    assert "32 to 16 pixels" in caplog.text
    caplog.clear()
    SimCLRForPreTraining.from_backbone(new("ViT"), views={"size": 32})
    assert "interpolated" not in caplog.text


@pytest.mark.parametrize("name", ["ViT", "IJepa", "Dinov2"])
@pytest.mark.parametrize("size", [[16, 64], [16, 32]])
def test_the_table_of_a_rectangle_is_not_that_of_a_square(name: str, size: list[int]) -> None:
    """transformers 5.24 takes 2 x 8 patches for 4 x 4 patches without an error, as timm did (2737)."""
    encoder = new(name, image_size=size)
    assert size_arguments(encoder, torch.rand(2, 3, *size)).get("interpolate_pos_encoding", False) is False
    for run in (lambda images: size_arguments(encoder, images), lambda images: encode(encoder, images)):
        with pytest.raises(UserError, match=mentions("encoder", f"{size[0]} x {size[1]}", "32 x 32")):
            run(torch.rand(2, 3, 32, 32))
    model = SimCLRForPreTraining.from_backbone(encoder, views={"size": 32})
    with pytest.raises(UserError, match=mentions("backbone.image_size", f"{size[0]} x {size[1]}", 32)):
        check_image_sizes(model.backbone, [32], 3, 32)


def test_an_encoder_without_a_table_takes_all_sizes() -> None:
    encoder = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2]))
    encoder.config.image_size = [16, 64]
    assert size_arguments(encoder, torch.rand(2, 3, 32, 32)) == {"interpolate_pos_encoding": True}


@pytest.mark.parametrize("name", ["Dinov2", "ResNet", "ConvNextV2"])
def test_other_encoders_stay(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    assert config_at_size(config, 64) is config


def test_tables_of_relative_positions_are_not_interpolated() -> None:
    model = SimCLRForPreTraining.from_backbone(
        new("Beit", use_relative_position_bias=True), views={"size": 16}
    )
    with pytest.raises(UserError, match=mentions("views.size", 16, "views.enlarge=32")):
        check_image_sizes(model.backbone, [16], 3, 16)
