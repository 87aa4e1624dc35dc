# SPDX-License-Identifier: Apache-2.0
"""Encoders of all families run through the protocols with frozen features, as `hf-ssl evaluate` runs them."""

import math

import pytest
import transformers
from tiers import in_tiers
from transformers import BitImageProcessor

from hf_ssl.data import DataConfig
from hf_ssl.evaluation import PROTOCOLS, EvaluationConfig
from hf_ssl.evaluation.results import find_results
from hf_ssl.run import evaluate

TOKENS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = TOKENS | {"image_size": 32, "patch_size": 8}
TIMM = {
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
    }
}
TIMM_VIT = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "depth": 2}}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "patch_size": 2, "window_size": 4}
# Model of a family and its settings.
FAMILIES = {
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "vit": ("ViT", VIT),
    "dinov2": ("Dinov2", VIT | {"mlp_ratio": 2}),
    "dinov2_with_registers": ("Dinov2WithRegisters", VIT | {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3": ("DINOv3ViT", VIT | {"num_register_tokens": 4}),
    "dinov3_convnext": ("DINOv3ConvNext", STAGES),
    "swin": ("Swin", WINDOWS | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}),
    "convnextv2": ("ConvNextV2", STAGES),
    "timm_resnet": ("TimmWrapper", TIMM | {"architecture": "resnet10t"}),
    "timm_vit": ("TimmWrapper", TIMM | TIMM_VIT),
    "ijepa": ("IJepa", VIT),
}
SETTINGS = {
    "linear": {"epochs": 2},
    "few_label_knn": {"draws": 2},
    "few_label_linear": {"fractions": [0.1], "draws": 2},
    "logistic_regression": {"strengths": [0.01, 1.0]},
    "mlp": {"epochs": 2, "hidden_size": 16},
    "attentive": {"epochs": 2},
}
# Protocols with frozen features for images of one class each.
FROZEN = [
    name for name, protocol in PROTOCOLS.items() if not protocol.takes_long and "one" in protocol.labels
]


@pytest.fixture(params=in_tiers([(name,) for name in FAMILIES], [("dinov3",), ("swin",)], as_one=True))
def folder(request, tmp_path):
    """The folder of an encoder of a family, with random weights."""
    (family,) = request.param
    name, settings = FAMILIES[family]
    if name == "TimmWrapper":
        pytest.importorskip("timm")
    transformers.set_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    if name != "TimmWrapper":  # its processor is in the config
        size = {"height": 32, "width": 32}
        BitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path)
    return tmp_path


def test_every_family_passes_the_protocols_with_frozen_features(folder, capsys):
    settings = EvaluationConfig(
        protocols=list(FROZEN), settings=SETTINGS, max_train_images=150, max_test_images=60, cache=False
    )
    results = evaluate(str(folder), DataConfig(path="digits"), settings)
    encoder, pixels = results["encoder"], results["raw_pixels"]
    (skipped,) = encoder["skipped"]  # nothing else
    assert "k-NN with k 200" in skipped
    for name in set(FROZEN) - {"quality"}:
        found = find_results(encoder, name)
        assert found and all(math.isfinite(result["value"]) for result in found)
    assert math.isfinite(encoder["quality"]["lidar"]) and math.isfinite(encoder["quality"]["alignment"])
    assert find_results(pixels, "knn")
    assert "linear probe" in capsys.readouterr().out
