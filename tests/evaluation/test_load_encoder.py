# SPDX-License-Identifier: Apache-2.0
"""Encoders are measured where that is fast, and with the weights that their files contain."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from messages import mentions, missing
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BitImageProcessor,
    DetrConfig,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_ssl import SimCLRForPreTraining, run
from hf_ssl.building import build_model
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, attention_maps, extract_features, fastest_device
from hf_ssl.evaluation.encoders import chosen_precision
from hf_ssl.modeling.image_encoders import image_encoder
from hf_ssl.modeling.loading import load_config, load_weights
from hf_ssl.modeling.pooling import pool, pooling_rule
from hf_ssl.recipe import load_recipe
from hf_ssl.space import build, build_space


class AskedFor(Exception):
    """Ends a command where it would begin to compute, with the device."""


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert fastest_device() == torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = torch.device("meta")  # every torch has it, and weights can lie there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    return device


def test_evaluate_computes_on_the_accelerator(
    finished_run: Path, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, device: torch.device, **options: object) -> None:
        raise AskedFor(device)

    monkeypatch.setattr(run, "evaluate_encoder", stop)
    for streaming in (False, True):  # the data of an evaluation are read without streaming
        data = DataConfig(path="digits", streaming=streaming)
        with pytest.raises(AskedFor, match="meta"):
            run.evaluate(str(finished_run), data, EvaluationConfig())


def test_a_gallery_is_embedded_on_the_accelerator(
    finished_run: Path, accelerator: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(encoder: torch.nn.Module, *arguments: object, **options: object) -> None:
        raise AskedFor({each.device for each in encoder.parameters()})

    monkeypatch.setattr(build, "embed_gallery", stop)
    with pytest.raises(AskedFor, match="meta"):
        build_space(str(finished_run), tmp_path / "space", DataConfig(path="digits"), images=5)


TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def new_vit(**options: Any) -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**TINY), **options).eval()


def loaded(place: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    return load_weights(str(place))


def features_of(encoder: Any, seed: int) -> torch.Tensor:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    with torch.inference_mode():
        return pool(encoder(images), "auto", encoder)


@pytest.mark.parametrize("kind", ["without pooler", "classifier"])
def test_a_vit_without_its_pooler_gives_the_class_token(kind: str, tmp_path: Path) -> None:
    """AutoModel makes a random pooler, so each process would have other features."""
    saved = new_vit(add_pooling_layer=False)
    if kind == "classifier":
        ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path)
        saved = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    else:
        saved.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = saved(images).last_hidden_state[:, 0]
    found = [features_of(loaded(tmp_path, seed), seed) for seed in (1, 2)]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], expected)
    # The saved files contain no pooler, so the card must not name `pooler_output`.
    assert pooling_rule(loaded(tmp_path, 1), {"pooler_output": found[0]}) == "cls"
    loaded(tmp_path, 1).save_pretrained(tmp_path / "again")
    torch.testing.assert_close(features_of(AutoModel.from_pretrained(tmp_path / "again"), 0), expected)


def test_a_pooler_that_was_saved_is_used(tmp_path: Path) -> None:
    new_vit().save_pretrained(tmp_path)
    torch.testing.assert_close(features_of(loaded(tmp_path, 1), 0), features_of(new_vit(), 0))


def test_other_missing_weights_are_an_error(tmp_path: Path) -> None:
    new_vit().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [name for name in weights if "layer.1." in name or "layers.1." in name]
    save_file(
        {name: each for name, each in weights.items() if name not in lost}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=mentions("ViTModel", f"{len(lost)} tensors", "new")):
        load_weights(str(tmp_path))


@pytest.mark.parametrize("is_classifier", [False, True])
def test_layers_that_the_config_leaves_out_are_an_error(is_classifier: bool, tmp_path: Path) -> None:
    """AutoModel ignores them, and the encoder is another one than the saved one."""
    saved = ViTForImageClassification(ViTConfig(**TINY)) if is_classifier else new_vit()
    saved.save_pretrained(tmp_path)
    load_weights(str(tmp_path))  # the weights of the classifier are not part of the encoder
    change_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(UserError, match=mentions("config.json", "tensors", "layers.")):
        load_weights(str(tmp_path))


def test_biases_that_the_config_leaves_out_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        load_weights(str(tmp_path))
        assert "tensors" not in caplog.text
        change_config(tmp_path, qkv_bias=False)
        load_weights(str(tmp_path))
    assert "6 tensors" in caplog.text and ".bias" in caplog.text


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_an_error(beside: bool, tmp_path: Path) -> None:
    """Without peft, transformers loads the weights beside an adapter, and ignores the adapter."""
    if beside:
        new_vit().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=mentions("adapter_config.json", "merge_and_unload")):
        load_weights(str(tmp_path))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """transformers loads the numbers of a quantized file if config.json does not describe them."""
    encoder = new_vit()
    encoder.save_pretrained(tmp_path)
    load_weights(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if weight.ndim == 2)
    weights[name] = (127 * weights[name] / weights[name].abs().max()).to(torch.int8)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=mentions("layers.0", "whole numbers", "quantized")):
        load_weights(str(tmp_path))


def test_a_model_whose_output_is_that_of_a_decoder_is_an_error(tmp_path: Path) -> None:
    """The feature of a DETR would be the mean of its object queries."""
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    config = DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions("detr", "decoder", "backbone")):
        load_weights(str(tmp_path))


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    """Files of old versions of torch lack them. They have no effect on features."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    encoder = ResNetModel(ResNetConfig(**sizes)).eval()
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: each for name, each in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors")
    torch.testing.assert_close(features_of(loaded(tmp_path, 1), 0), features_of(encoder, 0))


def test_a_vitmae_is_the_vit_that_it_contains(tmp_path: Path) -> None:
    """It hides three quarters of the patches in each call, also in evaluation mode."""
    torch.manual_seed(0)
    masked = ViTMAEModel(ViTMAEConfig(**TINY)).eval()
    masked.save_pretrained(tmp_path)
    found = [features_of(loaded(tmp_path, seed), seed) for seed in (1, 2)]
    assert torch.equal(found[0], found[1])
    masked.config.mask_ratio = 0.0
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens = masked(images, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(found[0], tokens.mean(dim=1))
    assert isinstance(loaded(tmp_path, 1), ViTModel) and load_config(str(tmp_path)).model_type == "vit"
    pixels = [[torch.full((3, 16, 16), 9 * number, dtype=torch.uint8) for number in range(6)]]
    processor = BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    masked.config.mask_ratio = 0.75
    whole = ViTMAEForPreTraining(masked.config).eval()
    for model in (masked, whole):
        first, second = (extract_features(model, processor, pixels) for _ in range(2))
        assert torch.equal(first, second)


def test_a_masking_encoder_is_not_trained(tmp_path: Path) -> None:
    section = (
        f"backbone={{model_type: vit_mae, {', '.join(f'{key}: {value}' for key, value in TINY.items())}}}"
    )
    with pytest.raises(UserError, match=mentions("backbone.model_type", "vit_mae", "method.name=mae")):
        run.pretrain(load_recipe("smoke/simclr", [section, f"training.output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        (["knn", "linear"], {"raw_pixels": ["knn", "linear"], "start": ["knn", "linear"]}),
        (["linear", "segmentation"], {"start": ["linear", "segmentation"]}),
        (["multi_label", "retrieval"], {"raw_pixels": ["multi_label", "retrieval"], "start": []}),
    ],
)
def test_raw_pixels_are_a_baseline_of_protocols_that_measure_them(
    protocols: list[str], expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a training, where they were measured without any protocol."""
    monkeypatch.setattr(run, "evaluate_encoder", lambda encoder, train, test, config: config.protocols)
    monkeypatch.setattr(run, "evaluate_pixels", lambda config, train, test: config.protocols)
    images: Any = SimpleNamespace(kinds={"one"})
    config, splits = EvaluationConfig(protocols=protocols), (images, images)
    names = expected["start"]
    found = run._baselines("start", lambda: None, names, config, splits)
    assert found == {key: value for key, value in expected.items() if value}
    config = EvaluationConfig(protocols=protocols, baselines=False)
    assert run._baselines("start", lambda: None, names, config, splits) == {}


def test_a_baseline_that_cannot_be_measured_keeps_the_other_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Raw pixels have only the numbers of `few_label_knn`, which is not possible here."""
    new_vit().save_pretrained(tmp_path)
    config = EvaluationConfig(
        protocols=["few_label_knn", "ridge"],
        settings={"few_label_knn": {"labels_per_class": [500]}},
        max_train_images=40,
        max_test_images=20,
        cache=False,
    )
    processor = BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False, do_convert_rgb=True)
    processor.save_pretrained(tmp_path)
    results = run.evaluate(str(tmp_path), DataConfig(path="digits"), config)
    assert [each["protocol"] for each in results["encoder"]["protocols"]] == ["ridge"]
    assert list(results) == ["encoder"]
    assert not missing(caplog.text, "raw pixels", "few_label_knn.labels_per_class", 500)


def test_places_without_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for load in (load_config, load_weights):
        with pytest.raises(UserError, match=mentions("model", tmp_path / "run", "export", "checkpoint-N")):
            load(str(tmp_path / "run"))
        with pytest.raises(
            UserError, match=mentions("model", tmp_path / "photos", "config.json", "save_pretrained")
        ):
            load(str(tmp_path / "photos"))
        with pytest.raises(UserError, match=mentions("model", "nowhere", "path")):
            load("nowhere")


TOWER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
TEXT = TOWER | {"vocab_size": 20, "max_position_embeddings": 8, "project_dim": 16}
PROCESSOR = BitImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False, do_convert_rgb=True)


GROUPS = {
    "depths": [1, 1], "num_hidden_layers": 2, "num_group_tokens": [4, 0], "num_output_groups": [4, 2],
    "patch_size": 4,
}  # fmt: skip


def two_towers(name: str) -> Any:
    torch.manual_seed(0)
    vision = TOWER | {"image_size": 16, "patch_size": 8} | (GROUPS if name == "GroupViT" else {})
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=TEXT, projection_dim=16)
    return getattr(transformers, f"{name}Model")(config).eval()


TOWERS = ("CLIP", "Siglip", "AltCLIP", "Blip", "OwlViT", "Owlv2", "Aimv2", "GroupViT")


@pytest.mark.parametrize("name", TOWERS)
def test_the_encoder_of_images_of_a_model_of_images_and_texts_is_used(name: str, tmp_path: Path) -> None:
    """The whole model needs a text, and raised an error."""
    whole = two_towers(name)
    whole.save_pretrained(tmp_path)
    found = loaded(tmp_path, 1)
    assert type(found) is type(whole.vision_model) and found.name_or_path == str(tmp_path)
    assert load_config(str(tmp_path)).model_type == found.config.model_type
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole.vision_model(images).pooler_output
    torch.testing.assert_close(features_of(found, 0), expected)
    pixels = [[torch.full((3, 16, 16), 9 * number, dtype=torch.uint8) for number in range(6)]]
    features = [extract_features(model, PROCESSOR, pixels) for model in (found, whole)]
    torch.testing.assert_close(features[0], features[1])
    if name != "GroupViT":  # its blocks merge patches
        assert attention_maps(whole, images).heads.shape == (3, 2, 2, 2)


@pytest.mark.parametrize("name", ["CLIP", "ViTMAE"])
def test_a_training_starts_from_the_encoder_of_images_in_a_loaded_model(name: str) -> None:
    """Before, CLIP asked for a text, and a ViTMAE hid patches."""
    whole = two_towers(name) if name == "CLIP" else ViTMAEModel(ViTMAEConfig(**TINY)).eval()
    found = SimCLRForPreTraining.from_backbone(whole, views={"size": 16}).eval().backbone
    assert type(found) is type(image_encoder(whole))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = image_encoder(whole)(images).last_hidden_state
        torch.testing.assert_close(found(images).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["Blip", "OwlViT"])
def test_an_encoder_that_loads_only_in_its_model_is_not_trained(name: str, tmp_path: Path) -> None:
    """Before, the run ended with "got ValueError Unrecognized configuration class"."""
    whole = two_towers(name)
    whole.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    kind = whole.config.vision_config.model_type
    for start in (whole, tmp_path):
        with pytest.raises(UserError, match=mentions("encoder", kind, "CLIP")):
            SimCLRForPreTraining.from_backbone(start, views={"size": 16})
    with pytest.raises(UserError, match=mentions("backbone.init_from", kind, "CLIP")):
        load_recipe("smoke/simclr", [f"backbone.init_from={tmp_path}", "data.channels=3"])


@pytest.mark.parametrize("name", ["Siglip2Model", "Siglip2VisionModel"])
def test_an_encoder_without_a_fixed_image_size_is_an_error(name: str, tmp_path: Path) -> None:
    vision = transformers.Siglip2VisionConfig(**TOWER, num_patches=4, patch_size=8)
    config = (
        vision if "Vision" in name else transformers.Siglip2Config(vision_config=vision, text_config=TEXT)
    )
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    for load in (load_config, load_weights):
        with pytest.raises(UserError, match=mentions("model", "siglip2", "google/siglip2-base-patch16-224")):
            load(str(tmp_path))


def test_missing_weights_of_the_texts_have_no_effect(tmp_path: Path) -> None:
    two_towers("CLIP").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: each for name, each in weights.items() if not name.startswith("text_model.")}, file)
    loaded(tmp_path, 1)
    save_file({name: each for name, each in weights.items() if "vision_model.encoder" not in name}, file)
    with pytest.raises(UserError, match=mentions("CLIPVisionModel", "new")):
        load_weights(str(tmp_path))


SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(("kind", "dtype"), [("resnet", torch.float16), ("vit", torch.bfloat16)])
def test_weights_of_16_bits_are_loaded_in_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers 5 keeps the type of the file, which is too coarse for training."""
    saved: Any = new_vit() if kind == "vit" else ResNetModel(ResNetConfig(**SMALL_RESNET))
    saved.to(dtype).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == dtype  # the reason for this test
    found = loaded(tmp_path, 1)
    assert {each.dtype for each in found.state_dict().values()} <= {torch.float32, torch.int64}
    for name, value in saved.state_dict().items():
        assert torch.equal(value.float(), found.state_dict()[name].float()), name
    options = ["data.channels=3", "views.mean=[0.5, 0.5, 0.5]", "views.std=[0.5, 0.5, 0.5]"]
    recipe = load_recipe("smoke/simclr", [f"backbone.init_from={tmp_path}", *options])
    model = build_model(recipe, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.backbone.config.dtype in (None, torch.float32)
    assert chosen_precision(EvaluationConfig(precision="float32"), found, torch.device("cpu")) == "float32"
