# SPDX-License-Identifier: Apache-2.0
"""Further features of eight families of encoders, against versions that are written with hidden states."""

import psutil
import pytest
import torch
from messages import mentions
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextV2Config,
    ConvNextV2Model,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation import features
from hf_ssl.evaluation.encoders import inspect_encoder
from hf_ssl.evaluation.features import extract_poolings
from hf_ssl.modeling.further_features import FurtherFeatures
from hf_ssl.modeling.pooling import FEATURES

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}


def timm(name: str, **settings):
    pytest.importorskip("timm")
    return TimmWrapperModel(TimmWrapperConfig(architecture=name, model_args=settings))


# Encoder; its features; the number of special tokens; the number of patches or positions.
FAMILIES = {
    "resnet": (
        lambda: ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        ["tokens"], 0, 16,
    ),
    "vit": (lambda: ViTModel(ViTConfig(**BLOCKS, **SMALL)), FEATURES, 1, 16),
    "short_vit": (
        lambda: ViTModel(ViTConfig(**(BLOCKS | {"num_hidden_layers": 3}), **SMALL)),
        ["cls", "cls_mean", "tokens"], 1, 16,
    ),
    "deit": (lambda: DeiTModel(DeiTConfig(**BLOCKS, **SMALL)), FEATURES, 2, 16),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**BLOCKS, **SMALL)), FEATURES, 1, 16),
    "dinov2_with_registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**BLOCKS, **SMALL, num_register_tokens=4)),
        FEATURES, 5, 16,
    ),
    "dinov3": (
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**BLOCKS, **SMALL, num_register_tokens=3)), FEATURES, 4, 16,
    ),
    "dinov3_convnext": (lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**STAGES)), ["tokens"], 1, 1),
    "ijepa": (lambda: IJepaModel(IJepaConfig(**BLOCKS, **SMALL)), ["tokens"], 0, 16),
    "swin": (
        lambda: SwinModel(
            SwinConfig(
                image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
            )
        ),
        ["tokens"], 0, 16,
    ),
    "convnextv2": (
        lambda: ConvNextV2Model(
            ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=32)
        ),
        ["tokens"], 0, 64,
    ),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**BLOCKS, **SMALL)), FEATURES, 1, 16),
    "timm_resnet": (lambda: timm("resnet10t"), ["tokens"], 0, 1),
    "timm_vit": (
        lambda: timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=5, reg_tokens=2),
        FEATURES, 3, 16,
    ),
    "timm_swin": (lambda: timm("swin_tiny_patch4_window7_224", img_size=32, window_size=2), ["tokens"], 0, 1),
}  # fmt: skip


def processor() -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2,
        image_mean=[0.5] * 3, image_std=[0.25] * 3,
    )  # fmt: skip


def photos(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8))


def encoder(name: str):
    torch.manual_seed(0)
    model = FAMILIES[name][0]().eval()
    for module in model.modules():  # a LayerNorm that is not the identity after it
        if isinstance(module, torch.nn.LayerNorm) and module.elementwise_affine:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def expected(model, special: int) -> dict[str, torch.Tensor]:
    """The definitions, with the hidden states that transformers returns."""
    pixels = processor()(photos(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if model.config.model_type == "timm_wrapper":
            inner, states = model.timm_model, []
            tokens = inner._pos_embed(inner.patch_embed(pixels))
            for block in inner.blocks:
                states.append(tokens := block(tokens))
            norm, last = inner.norm, model(pixel_values=pixels).last_hidden_state
        else:
            outputs = model(pixel_values=pixels, output_hidden_states=True)
            states, last = outputs.hidden_states, outputs.last_hidden_state
            identity = torch.nn.Identity()  # the output of CLIP has no LayerNorm after the last block
            norm = getattr(model, "norm", getattr(model, "layernorm", identity))
        tokens_of_classes = [norm(state)[:, 0] for state in states[-4:]]
    mean = last[:, special:].mean(1)
    return {
        "cls": last[:, 0],
        "cls_mean": torch.cat([last[:, 0], mean], 1),
        "cls_last4": torch.cat(tokens_of_classes, 1),
        "cls_last4_mean": torch.cat([*tokens_of_classes, mean], 1),
        "tokens": last[:, special:],
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_the_features_that_it_can_have(name: str) -> None:
    _, wanted, special, patches = FAMILIES[name]
    model = encoder(name)
    found = inspect_encoder(model, processor(), [photos(1)], torch.device("cpu"))
    assert found.features == list(wanted) and found.size == 32
    read = extract_poolings(model, processor(), [photos(2), photos(3)[2:]], poolings=found.features, total=3)
    assert list(read) == list(wanted)
    assert read["tokens"].shape[:2] == (3, patches) and read["tokens"].dtype == torch.float32
    assert all(torch.isfinite(rows).all() for rows in read.values())
    assert not any(module._forward_hooks for module in model.modules()), "no trace is left"
    if "cls" in wanted:
        for feature, rows in read.items():
            if "last" not in feature:
                torch.testing.assert_close(rows, expected(model, special)[feature], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "cls_last4" in family[1]])
def test_the_last_blocks_are_those_of_dinov2(name: str) -> None:
    model, special = encoder(name), FAMILIES[name][2]
    definitions = expected(model, special)
    for wanted in (FEATURES, ["cls_last4"], ["cls_mean", "cls_last4"], ["cls_last4_mean", "cls_mean"]):
        read = extract_poolings(model, processor(), [photos(3)], poolings=wanted)
        assert list(read) == list(wanted)
        for feature, rows in read.items():
            torch.testing.assert_close(rows, definitions[feature], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "convnextv2", "timm_swin"])
def test_positions_of_a_feature_map_are_tokens(name: str) -> None:
    model = encoder(name)
    tokens = extract_poolings(model, processor(), [photos(2)], poolings=["tokens", "pooler", "mean"])
    torch.testing.assert_close(tokens["tokens"].mean(1), tokens["mean"], atol=1e-5, rtol=1e-4)
    assert tokens["tokens"].mean(1).shape == tokens["pooler"].shape
    if name != "convnextv2":  # which normalizes the mean
        torch.testing.assert_close(tokens["tokens"].mean(1), tokens["pooler"], atol=1e-5, rtol=1e-4)


def test_another_last_normalization_is_noticed() -> None:
    """Then the features of the last blocks would be wrong, so the encoder has none."""
    model = encoder("vit")
    model.register_forward_hook(lambda module, given, output: output | {"last_hidden_state": 2 * output[0]})
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), FurtherFeatures(model) as further:
        assert further.available(dict(model(pixel_values=pixels))) == ["cls", "cls_mean", "tokens"]


def test_half_precision_keeps_the_features_of_the_published_output() -> None:
    model = encoder("dinov2")
    wanted = [*FEATURES, "pooler"]
    exact, rounded = (
        extract_poolings(model, processor(), [photos(8)], poolings=wanted, dtype=dtype)
        for dtype in (None, torch.bfloat16)
    )
    for name in wanted:
        assert rounded[name].dtype == torch.float32
        assert F.cosine_similarity(exact[name].flatten(1), rounded[name].flatten(1)).min() > 0.99
    assert torch.equal(rounded["cls"], rounded["pooler"])


@pytest.mark.parametrize("total", [None, 6])
def test_many_tokens_are_stored_in_half_precision_and_too_many_are_an_error(total, monkeypatch) -> None:
    model = encoder("vit")
    arguments = (model, processor(), [photos(6)[:4], photos(6)[4:]])
    exact = extract_poolings(*arguments, poolings=["tokens", "cls"], total=total)
    monkeypatch.setattr(features, "FULL_TOKENS", 5 * 16 * 32 * 4)
    half = extract_poolings(*arguments, poolings=["tokens", "cls"], total=total)
    assert (half["tokens"].dtype, half["cls"].dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(half["tokens"].float(), exact["tokens"], rtol=1e-3, atol=1e-3)
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=mentions("evaluation", "16 x 32", "evaluation.max_train_images")):
        extract_poolings(*arguments, poolings=["tokens"], total=total)


def test_infinite_tokens_stay_infinite_in_half_precision(monkeypatch) -> None:
    """A protocol can then report them. Large numbers become the largest one of float16."""
    monkeypatch.setattr(features, "FULL_TOKENS", 1)
    rows = features._Rows(2)
    rows.append(torch.tensor([[[1.0, torch.inf]]]))
    rows.append(torch.tensor([[[-1e6, -torch.inf]]]))
    assert rows.tensor().tolist() == [[[1.0, torch.inf]], [[-65504.0, -torch.inf]]]
