# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and cards use the same feature of an encoder, also without a pooler."""

import pytest
import torch
from messages import mentions
from transformers import (
    AutoModel,
    BitImageProcessor,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DetrImageProcessor,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation import extract_features
from hf_ssl.evaluation.classifiers import new_classifier
from hf_ssl.evaluation.dense import SquareProcessor
from hf_ssl.evaluation.features import extract_poolings
from hf_ssl.hub import image_processor
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.loading import normalization
from hf_ssl.modeling.pooling import declare_feature, pool, pooling_rule
from hf_ssl.views import ViewPreset

TOKENS = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
ENCODERS = {
    "resnet": (
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        "pooler",
    ),
    "vit": (lambda: ViTModel(ViTConfig(**TOKENS)), "pooler"),
    "msn": (lambda: ViTMSNModel(ViTMSNConfig(**TOKENS)), "cls"),
    "ijepa": (lambda: IJepaModel(IJepaConfig(**TOKENS)), "mean"),
    "data2vec": (lambda: Data2VecVisionModel(Data2VecVisionConfig(**TOKENS)), "mean"),
}


@pytest.mark.parametrize(("build", "rule"), ENCODERS.values(), ids=ENCODERS)
def test_training_and_evaluation_use_the_same_feature(build, rule):
    torch.manual_seed(0)
    encoder = build().eval()
    processor = image_processor(ViewPreset(size=32).to_dict(), 3)
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    pixels = processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    with torch.no_grad():
        outputs = encoder(pixel_values=pixels)
        assert pooling_rule(encoder, outputs) == rule
        trained = encode(encoder, pixels)
    torch.testing.assert_close(trained, pool(outputs, rule))
    torch.testing.assert_close(extract_features(encoder, processor, [images]), trained)


@pytest.mark.parametrize(
    "processor",
    [
        DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}),
        BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False),
    ],
    ids=["padded", "not cropped"],
)
def test_features_do_not_depend_on_the_other_images_of_a_batch(processor):
    """The processors of detectors pad images to the largest one of the batch, and features changed."""
    torch.manual_seed(0)
    encoder = ENCODERS["resnet"][0]().eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((24, 40), (40, 24))]
    with pytest.raises(UserError, match=mentions("processor", type(processor).__name__, "size")):
        extract_features(encoder, processor, [images])
    alone = extract_features(encoder, processor, [[images[0]], [images[0]]])
    torch.testing.assert_close(alone, extract_features(encoder, processor, [[images[0], images[0]]]))


@pytest.mark.parametrize(
    ("shape", "rule"), [((2, 8), "pooler"), ((2, 8, 1, 1), "pooler"), ((2, 5, 8), "cls")]
)
def test_an_output_that_is_not_pooled_is_no_feature(shape, rule):
    """With `global_pool=""`, timm returns all tokens, and their concatenation was the feature."""
    encoder = ViTModel(ViTConfig(**TOKENS))
    outputs = {"pooler_output": torch.randn(shape), "last_hidden_state": torch.randn(2, 5, 8)}
    assert pooling_rule(encoder, outputs) == rule
    assert pool(outputs, model=encoder).shape == (2, 8)


def test_an_encoder_without_a_class_token_has_none():
    """Before, the first patch, at the upper left corner, was the feature."""
    outputs = {"last_hidden_state": torch.randn(2, 16, 32)}
    with pytest.raises(UserError, match=mentions("pooling", "cls", "IJepaModel", "mean", "auto")):
        pool(outputs, "cls", IJepaModel(IJepaConfig(**TOKENS)))


def test_a_class_token_without_a_pooler_is_used_only_if_the_encoder_is_known():
    outputs = {"last_hidden_state": torch.randn(2, 5, 8)}
    with pytest.raises(UserError, match=mentions("pooling", "cls", "mean", "auto")):
        pool(outputs)
    torch.testing.assert_close(pool(outputs, "cls"), outputs["last_hidden_state"][:, 0])
    torch.testing.assert_close(pool(outputs, "mean"), outputs["last_hidden_state"].mean(1))


def test_the_declared_feature_is_stored_with_the_encoder(tmp_path):
    """It decides over the pooler after loading too, and leaves encoders without a declaration alone."""
    encoder = ViTModel(ViTConfig(**TOKENS))
    outputs = {"pooler_output": torch.ones(1, 32), "last_hidden_state": torch.zeros(1, 17, 32)}
    declare_feature(encoder, "auto")
    assert "published_feature" not in encoder.config.to_dict()
    assert pooling_rule(encoder, outputs) == "pooler"
    declare_feature(encoder, "mean")
    encoder.save_pretrained(tmp_path)
    loaded, problems = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert pooling_rule(loaded, outputs) == "mean"
    torch.testing.assert_close(pool(outputs, model=loaded), torch.zeros(1, 32))
    loaded.config.published_feature = "unknown"  # of another program
    assert pooling_rule(loaded, outputs) == "pooler"


def test_images_of_another_size_have_features_in_training_and_evaluation() -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = ViTModel(ViTConfig(image_size=16, patch_size=8, **size)).eval()
    larger = BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    pixels = larger([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = encode(encoder, pixels)
    features = extract_poolings(encoder, larger, [[image]], poolings=["auto", "tokens"])
    torch.testing.assert_close(features["auto"], expected)
    assert features["tokens"].shape == (1, 9, 8)
    head = new_classifier(encoder, 2, pixels, "auto").model
    assert head(pixel_values=pixels).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("given", "channels", "expected"),
    [
        ({"do_normalize": False, "image_mean": None, "image_std": None}, 1, ([0.0], [1.0])),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}, 1, ([0.0], [1.0])),
        ({"image_mean": [0.5], "image_std": [0.2]}, 3, ([0.5] * 3, [0.2] * 3)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2] * 3}, 3, ([0.1, 0.2, 0.3], [0.2] * 3)),
    ],
)
def test_the_normalization_of_a_processor_is_complete(given: dict, channels: int, expected: tuple) -> None:
    processor = ViTImageProcessor(**({"size": {"height": 4, "width": 4}, "do_normalize": True} | given))
    assert normalization(processor, channels) == expected
    images = [torch.full((channels, 4, 4), 255, dtype=torch.uint8)]
    (value,) = SquareProcessor(processor, 2)(images)["pixel_values"][:, 0, 0, 0]
    assert value == pytest.approx((1 - expected[0][0]) / expected[1][0])
