# SPDX-License-Identifier: Apache-2.0
"""Tests that a process without hf_ssl loads an exported encoder unchanged, and that others are errors."""

import json
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from example_facts import new_facts
from forks import Forks
from messages import mentions
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_ssl import SimCLRConfig, SimCLRForPreTraining
from hf_ssl.cards import write_card
from hf_ssl.errors import UserError
from hf_ssl.evaluation import pool
from hf_ssl.hub import export_encoder, image_processor
from hf_ssl.hub.export import export_model, same_bits
from hf_ssl.views import ViewPreset

SIDE = 32
TOKENS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
CONFIGS = {
    "resnet": (
        ResNetModel,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
    "vit": (ViTModel, ViTConfig(**TOKENS, pooler_act="linear")),
    "dinov2": (Dinov2Model, Dinov2Config(**TOKENS)),
    "convnextv2": (
        ConvNextV2Model,
        ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
    ),
    "swin": (
        SwinModel,
        SwinConfig(
            image_size=SIDE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
    ),
    "ijepa": (IJepaModel, IJepaConfig(**TOKENS)),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**TOKENS)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**TOKENS)),
}
POOLING = {"ijepa": "mean"}
# Largest difference by rounding, relative to the largest number. A pixel value takes three operations, and a
# feature takes sums of some thousand numbers.
FLOAT32 = 4 * torch.finfo(torch.float32).eps
FLOAT64 = 2000 * torch.finfo(torch.float64).eps

# This program cannot import hf_ssl, even if it is installed: the first import finder raises an error for it.
WITHOUT_HF_SSL = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ssl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
try:
    import hf_ssl
except ModuleNotFoundError:
    pass
else:
    sys.exit("hf_ssl was imported")

import json, os, re
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

os.chdir(sys.argv[1])

def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()

report = {}
for name in sys.argv[2:]:
    processor = AutoImageProcessor.from_pretrained(name)
    encoder, info = AutoModel.from_pretrained(name, output_loading_info=True)
    images = torch.load("images.pt")
    saved = torch.load(f"{name}.pt")
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    loaded = {key: value.clone() for key, value in encoder.state_dict().items()}
    with torch.inference_mode():
        outputs = encoder.double()(saved["pixel_values"].double())
    encoder.float()
    features = outputs.last_hidden_state.mean(dim=1) if name == "ijepa" else outputs.pooler_output.flatten(1)
    code = re.search(r"```python\\n(.*?)```", open(f"{name}/README.md").read(), re.S)[1]
    scope = {}
    exec(code, scope)
    report[name] = {
        "class": type(encoder).__name__,
        "keys": {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "pixels differ": difference(pixel_values, saved["pixel_values"]),
        "features differ": difference(features, saved["features"]),
        "weights": all(torch.equal(value, saved["weights"][key]) for key, value in loaded.items()),
        "card": list(scope["features"].shape),
        "photos": {
            photo: bool(torch.isfinite(encoder(**processor(Image.open(photo), return_tensors="pt"))[0]).all())
            for photo in sorted(os.listdir()) if photo.endswith((".png", ".jpg"))
        },
    }
print(json.dumps(report))
"""


def make(name: str) -> PreTrainedModel:
    kind, config = CONFIGS[name]
    torch.manual_seed(0)
    encoder = kind(config)
    if name == "vit":
        with torch.no_grad():
            torch.nn.init.eye_(encoder.pooler.dense.weight)
            torch.nn.init.zeros_(encoder.pooler.dense.bias)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)  # buffers must be exported too
    return encoder


def processor(side: int = SIDE):
    return image_processor(ViewPreset(size=side).to_dict(), 3)


def double_features(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the features (N, D) in float64, where rounding is far smaller than any other difference.

    Equal weights give equal features only up to rounding, because torch's choice of kernels depends on the
    memory address of a tensor, on the processor and on the number of threads.
    """
    with torch.inference_mode():
        return pool(encoder.eval().double()(pixel_values.double()), model=encoder)


def save_photos(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy()
    color = Image.fromarray(pixels)
    color.save(folder / "photo.jpg")
    for mode in ("L", "LA", "RGBA", "P", "1"):
        color.convert(mode).save(folder / f"{mode}.png")


@pytest.fixture(scope="module")
def loaded_without_hf_ssl(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> dict:
    """Return the report of one process without hf_ssl about the exports of all architectures."""
    folder = tmp_path_factory.mktemp("exports")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    torch.save(images, folder / "images.pt")
    save_photos(folder)
    for name, (kind, _) in CONFIGS.items():
        encoder = make(name).train()
        export_encoder(encoder, processor(), folder / name)
        assert encoder.training, "the encoder stays unchanged"
        saved = {
            "weights": {key: value.clone() for key, value in encoder.state_dict().items()},
            "pixel_values": processor()(list(images), return_tensors="pt")["pixel_values"],
        }
        saved["features"] = double_features(encoder, saved["pixel_values"])
        torch.save(saved, folder / f"{name}.pt")
        facts = new_facts()
        facts["name"] = name
        facts["backbone"] |= {"class_name": kind.__name__, "pooling": POOLING.get(name, "pooler")}
        write_card(folder / name, facts)
    finished = forks.run("transformers", WITHOUT_HF_SSL, str(folder), *CONFIGS)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_user_without_hf_ssl_loads_the_same_encoder(loaded_without_hf_ssl: dict, name: str) -> None:
    report = loaded_without_hf_ssl[name]
    assert report["class"] == CONFIGS[name][0].__name__
    assert not any(report["keys"].values()), report["keys"]
    assert report["weights"]
    assert report["pixels differ"] <= FLOAT32
    assert report["features differ"] <= FLOAT64


@pytest.mark.parametrize("name", CONFIGS)
def test_any_photo_and_the_code_of_the_card(loaded_without_hf_ssl: dict, name: str) -> None:
    width = 16 if name in ("resnet", "convnextv2") else 32
    assert loaded_without_hf_ssl[name]["card"] == [1, width]
    photos = ["1.png", "L.png", "LA.png", "P.png", "RGBA.png", "photo.jpg"]
    assert loaded_without_hf_ssl[name]["photos"] == dict.fromkeys(photos, True)


def test_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    torch.manual_seed(0)
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture="resnet10t", do_pooling=True))
    export_encoder(encoder, processor(), tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is TimmWrapperModel
    weights = encoder.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(same_bits(value, weights[name]) for name, value in loaded.state_dict().items())
    pixel_values = torch.randn(2, 3, SIDE, SIDE)
    before, after = (double_features(model, pixel_values) for model in (encoder, loaded))
    torch.testing.assert_close(after, before, rtol=0, atol=FLOAT64 * float(before.abs().max()))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def vit_with(act: str = "linear", **change: float) -> ViTModel:
    encoder = ViTModel(ViTConfig(**TOKENS, pooler_act=act))
    with torch.no_grad():
        torch.nn.init.eye_(encoder.pooler.dense.weight)
        torch.nn.init.zeros_(encoder.pooler.dense.bias)
        for name, value in change.items():
            getattr(encoder.pooler.dense, name)[0] = value
    return encoder


POOLER = ["ViTModel", "class token", "pooler_act='linear'"]


class OwnResNet(ResNetModel):
    """A class that transformers does not contain."""


@pytest.mark.parametrize(
    ("encoder", "parts"),
    [
        (
            lambda: ViTModel(ViTConfig(**TOKENS), add_pooling_layer=False),
            ["ViTModel", "pooler", "pooler_act='linear'"],
        ),
        (lambda: ViTModel(ViTConfig(**TOKENS)), POOLER),
        (lambda: vit_with("tanh"), [*POOLER, "tanh"]),
        (lambda: vit_with(bias=0.5), POOLER),
        (lambda: vit_with(weight=0.5), POOLER),
        (lambda: ViTMAEModel(ViTMAEConfig(**TOKENS)), ["ViTMAEModel", "ViTModel"]),
        (lambda: OwnResNet(CONFIGS["resnet"][1]), ["OwnResNet"]),
    ],
)
def test_encoders_with_other_outputs_after_loading_are_errors(tmp_path: Path, encoder, parts: list) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        export_encoder(encoder(), processor(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_processor_of_another_size_is_an_error(tmp_path: Path) -> None:
    export_encoder(make("vit"), processor(), tmp_path)
    before = listing(tmp_path)
    with pytest.raises(UserError, match=mentions("ViTModel", "(1, 3, 64, 64)")):
        export_encoder(make("vit"), processor(64), tmp_path)
    assert listing(tmp_path) == before


def test_weights_that_differ_after_loading_are_an_error(tmp_path: Path) -> None:
    encoder, other = make("resnet"), make("resnet")
    with torch.no_grad():
        other.embedder.embedder.normalization.running_mean[0] = -0.0
        encoder.embedder.embedder.normalization.running_mean[0] = 0.0
    encoder.save_pretrained = other.save_pretrained  # differs in the sign of a zero in a buffer
    changed = mentions("ResNetModel", "embedder.embedder.normalization.running_mean")
    with pytest.raises(UserError, match=changed):
        export_encoder(encoder, processor(), tmp_path)
    assert listing(tmp_path) == {}


def test_missing_keys_are_an_error(tmp_path: Path) -> None:
    encoder = make("resnet")
    kept = {name: value for name, value in encoder.state_dict().items() if "running_var" not in name}
    save = encoder.save_pretrained
    encoder.save_pretrained = lambda folder: save(folder, state_dict=kept)
    with pytest.raises(UserError, match=r"missing.*running_var"):
        export_encoder(encoder, processor(), tmp_path)


def test_a_second_export_replaces_only_the_encoder(tmp_path: Path) -> None:
    export_encoder(make("vit"), processor(), tmp_path)
    others = ("README.md", "pretraining/model.safetensors")
    for name in (
        *others,
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "_writing-export-old/config.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    export_encoder(make("resnet"), processor(), tmp_path)
    files = listing(tmp_path)
    assert set(files) == {"config.json", "model.safetensors", "preprocessor_config.json", *others}
    assert all(files[name] == b"old" for name in others)
    assert type(AutoModel.from_pretrained(tmp_path)) is ResNetModel


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_an_interrupted_export_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    export_encoder(make("vit"), processor(), tmp_path)
    replace, done = os.replace, []

    def killed(source, target) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr("hf_ssl.hub.export.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_encoder(make("resnet"), processor(), tmp_path)
    monkeypatch.undo()
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path)
    export_encoder(make("resnet"), processor(), tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is ResNetModel


def test_a_full_disk_leaves_the_old_encoder(tmp_path: Path) -> None:
    export_encoder(make("resnet"), processor(), tmp_path)
    before = listing(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond 2,000 bytes
    try:
        with pytest.raises(UserError, match=mentions(tmp_path.name)) as caught:
            export_encoder(make("vit"), processor(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=mentions("out", "Not a directory")):
        export_encoder(make("resnet"), processor(), tmp_path / "file" / "out")


def test_exported_files_contain_no_local_path(tmp_path: Path) -> None:
    export_encoder(make("vit"), processor(), tmp_path / "first")
    export_encoder(AutoModel.from_pretrained(tmp_path / "first"), processor(), tmp_path / "second")
    for name in ("config.json", "preprocessor_config.json"):
        assert str(tmp_path) not in (tmp_path / "second" / name).read_text()


def test_same_bits() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2, 1))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    assert same_bits(torch.ones(2, 3).T, torch.ones(3, 2))


@pytest.mark.parametrize("views", [None, {"size": 16}])
def test_a_model_with_some_settings_of_the_views_is_exported(views: dict | None, tmp_path: Path) -> None:
    tiny = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    export_model(SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny, views=views)), tmp_path / "encoder")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    assert processor.crop_size["height"] == (16 if views else 224)


def test_weights_of_the_user_in_the_same_folder_stay(tmp_path: Path) -> None:
    tiny = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny))
    for name in ("model_best.safetensors", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"old")
    export_model(model, tmp_path)
    assert (tmp_path / "model_best.safetensors").read_bytes() == b"old"
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_names_of_weights_are_those_of_old_releases(name: str, tmp_path: Path) -> None:
    """transformers 4.57 would use random weights. `tests/weekly/test_old_release.py` runs it."""
    export_encoder(make(name), processor(), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert all(key.startswith("vision_model.") for key in load_file(file))
    export_encoder(AutoModel.from_pretrained(tmp_path), processor(), tmp_path)  # has the prefix already
    assert not any(key.startswith("vision_model.vision_model.") for key in load_file(file))


def test_names_in_several_files_are_those_of_old_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, save = make("siglip"), SiglipVisionModel.save_pretrained
    monkeypatch.setattr(
        SiglipVisionModel, "save_pretrained", lambda self, folder: save(self, folder, max_shard_size="20KB")
    )
    export_encoder(encoder, processor(), tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {key: file.name for file in files for key in load_file(file)} == index
    assert all(key.startswith("vision_model.") for key in index)


@pytest.mark.parametrize("name", ["resnet", "siglip"])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_exported_files_follow_the_umask(name: str, mask: int, tmp_path: Path) -> None:
    """safetensors 0.8 creates files that only their owner can read, also with the umask 022."""
    before = os.umask(mask)
    try:
        export_encoder(make(name), processor(), tmp_path / "encoder")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "encoder").iterdir()}
    assert modes == {0o666 & ~mask}
