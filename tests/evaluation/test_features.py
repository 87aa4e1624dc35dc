# SPDX-License-Identifier: Apache-2.0
"""Features of every encoder class, and that taking them leaves no trace in the encoder."""

import pytest
import torch
from messages import mentions
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation import extract_features, pool, raw_pixels
from hf_ssl.evaluation.encoders import pixel_values

TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"image_size": 32, "patch_size": 8}
# Class, config, and the features that are expected, written out.
ENCODERS = {
    "resnet": (
        ResNetModel,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        lambda out: out.last_hidden_state.mean(dim=(2, 3)),
    ),
    "convnextv2": (
        ConvNextV2Model,
        ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=32),
        lambda out: out.pooler_output,
    ),
    "swin": (
        SwinModel,
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        lambda out: out.last_hidden_state.mean(dim=1),
    ),
    "vit": (ViTModel, ViTConfig(**TOKENS, **SMALL), lambda out: out.pooler_output),
    "dinov2": (Dinov2Model, Dinov2Config(**TOKENS, **SMALL), lambda out: out.last_hidden_state[:, 0]),
    "ijepa": (IJepaModel, IJepaConfig(**TOKENS, **SMALL), lambda out: out.last_hidden_state.mean(dim=1)),
}


def encoder(name: str):
    kind, config, _ = ENCODERS[name]
    torch.manual_seed(0)
    return kind(config)


def processor(side: int = 32, channels: int = 3) -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, resample=2,
        image_mean=[0.5] * channels, image_std=[0.25] * channels, do_convert_rgb=channels == 3,
    )  # fmt: skip


def photos(count: int, *, side: int = 32, channels: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, side, side)
    return list(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


@pytest.mark.parametrize("name", ENCODERS)
def test_pooling_of_each_class(name: str) -> None:
    model, images = encoder(name), photos(6)
    features = extract_features(model, processor(), [images[:4], images[4:]])
    with torch.no_grad():
        outputs = model.eval()(pixel_values=processor()(images, return_tensors="pt")["pixel_values"])
    expected = ENCODERS[name][2](outputs)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_the_class_token_of_a_feature_map_is_an_error() -> None:
    """The extraction of features follows `pool`, also for the name "cls", which further features have too."""
    config = ResNetConfig(hidden_sizes=[4, 8], depths=[1, 1], embedding_size=4)
    with pytest.raises(UserError, match=mentions("pooling", "cls", "(B, T, D)")):
        extract_features(ResNetModel(config), processor(), [photos(2)], pooling="cls")


def test_timm_wrapper() -> None:
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    model = TimmWrapperModel(TimmWrapperConfig(architecture="resnet10t"))
    features = extract_features(model, processor(), [photos(3)])
    with torch.no_grad():
        expected = model.eval()(
            processor()(photos(3), return_tensors="pt")["pixel_values"]
        ).last_hidden_state.mean(dim=(2, 3))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_other_image_processors() -> None:
    """Encoders from elsewhere come with their own: of the PIL backend, or timm's."""
    from transformers import TimmWrapperImageProcessor, ViTImageProcessorPil

    pil = ViTImageProcessorPil(size={"height": 32, "width": 32})
    expected = torch.stack(photos(3)) / 255 * 2 - 1
    torch.testing.assert_close(pixel_values(pil, photos(3), torch.device("cpu")), expected, atol=1e-5, rtol=0)
    pytest.importorskip("timm")
    settings = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    timm = TimmWrapperImageProcessor(pretrained_cfg=settings | {"interpolation": "bicubic"})
    gray = TimmWrapperImageProcessor(
        pretrained_cfg={"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
    )
    torch.testing.assert_close(
        pixel_values(gray, photos(3, channels=1), torch.device("cpu")),
        torch.stack(photos(3, channels=1)) / 255 * 2 - 1,
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        pixel_values(timm, photos(3), torch.device("cpu")), expected, atol=1e-5, rtol=0
    )


def test_class_token_without_a_pooler() -> None:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**TOKENS, **SMALL), add_pooling_layer=False)
    features = extract_features(model, processor(), [photos(2)])
    with torch.no_grad():
        tokens = model.eval()(
            pixel_values=processor()(photos(2), return_tensors="pt")["pixel_values"]
        ).last_hidden_state
    torch.testing.assert_close(features, tokens[:, 0], atol=1e-6, rtol=0)
    asked = extract_features(model, processor(), [photos(2)], pooling="mean")
    torch.testing.assert_close(asked, tokens.mean(dim=1), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=mentions("pooler", "pooler_output")):
        extract_features(model, processor(), [photos(2)], pooling="pooler")


def test_pool_by_hand() -> None:
    tokens = torch.arange(12.0).view(1, 3, 4)
    assert pool({"last_hidden_state": tokens}, "mean").tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert pool({"last_hidden_state": tokens}, "cls").tolist() == [[0.0, 1.0, 2.0, 3.0]]
    places = torch.arange(8.0).view(1, 2, 2, 2)
    assert pool({"last_hidden_state": places, "pooler_output": None}, "mean").tolist() == [[1.5, 5.5]]
    assert pool({"last_hidden_state": tokens, "pooler_output": torch.ones(1, 5, 1, 1)}).shape == (1, 5)
    with pytest.raises(UserError, match=mentions("cls", tuple(places.shape))):
        pool({"last_hidden_state": places}, "cls")
    with pytest.raises(UserError, match=mentions("max", "cls", "mean")):
        pool({"last_hidden_state": tokens}, "max")  # type: ignore[arg-type]


def test_no_trace_is_left_in_the_encoder() -> None:
    model = encoder("resnet").train()
    model.embedder.eval()  # a frozen part of a training model
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [value.stride() for value in model.parameters()]
    state = torch.random.get_rng_state()
    extract_features(model, processor(), [photos(4)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [value.stride() for value in model.parameters()] == strides
    assert all(value.requires_grad for value in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)

    def broken_batches():
        yield photos(2)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        extract_features(model, processor(), broken_batches())
    assert [module.training for module in model.modules()] == modes


def test_batches_and_total_change_nothing() -> None:
    model, images = encoder("resnet"), photos(7)
    whole = extract_features(model, processor(), [images])
    for total in (None, 7, 9):
        parts = extract_features(
            model, processor(), [images[:3], [], images[3:]], total=total, description="test"
        )
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
        head = torch.nn.Linear(parts.shape[1], 2)
        head(parts).sum().backward()  # inference tensors would refuse
    with pytest.raises(UserError, match=mentions(6, 7)):
        extract_features(model, processor(), [images[:3], images[3:]], total=6)
    with pytest.raises(UserError, match="no image"):
        extract_features(model, processor(), [[]])


def test_images_of_many_sizes_and_two_channels() -> None:
    model = encoder("resnet")
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        for height, width in ((32, 32), (40, 64), (3, 3), (50, 20))
    ]
    together = extract_features(model, processor(), [images])
    alone = extract_features(model, processor(), [[image] for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    two = ResNetModel(ResNetConfig(num_channels=2, embedding_size=8, hidden_sizes=[8], depths=[1]))
    assert extract_features(two, processor(channels=2), [photos(2, channels=2)]).shape == (2, 8)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_bfloat16_is_close_and_only_where_asked_for(name: str) -> None:
    model, images = encoder(name), photos(8)
    exact = extract_features(model, processor(), [images])
    rounded = extract_features(model, processor(), [images], dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert F.cosine_similarity(exact, rounded).min() > 0.999


def test_raw_pixels_are_the_middle_of_the_image_without_its_mean() -> None:
    image = torch.zeros(1, 4, 6, dtype=torch.uint8)
    image[:, :, 0] = image[:, :, 5] = 77  # outside the middle square
    image[:, 0, 1] = 255
    features = raw_pixels([[image]], 4)
    expected = torch.zeros(16)
    expected[0] = 1.0
    torch.testing.assert_close(features, (expected - 1 / 16)[None])


def test_raw_pixels_are_resized_as_torchvision_does() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = photos(2, side=48) + photos(1, side=11)
    expected = torch.stack(
        [functional.resize(image.float(), [16, 16], antialias=True) / 255 for image in images]
    ).flatten(1)
    torch.testing.assert_close(
        raw_pixels([images], 16, total=3), expected - expected.mean(dim=1, keepdim=True), atol=1e-5, rtol=0
    )
