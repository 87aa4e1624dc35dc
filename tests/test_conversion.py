# SPDX-License-Identifier: Apache-2.0
"""Conversion of released checkpoints: with the authors' names, features equal those of the source network.

The source networks are those of torchvision and timm, whose names the authors use. They are narrow and
shallow.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from huggingface_hub import ModelCard
from messages import mentions, missing
from PIL import Image
from safetensors.torch import save_file
from tiers import in_tiers
from timm.data import create_transform, resolve_data_config
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import get_weight
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import AutoImageProcessor, AutoModel

from hf_ssl.cards.conversion import FILE
from hf_ssl.cli import main
from hf_ssl.conversion import RELEASES, convert, converting
from hf_ssl.conversion.resnet import read as read_resnet
from hf_ssl.conversion.vit import read as read_vit
from hf_ssl.errors import UserError
from hf_ssl.hub.publish import publish
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.vit import sine_cosine_2d

Weights = dict[str, Tensor]


def resnet(block: Any = BasicBlock, depths: tuple[int, ...] = (1, 1, 1, 1), channels: int = 16) -> ResNet:
    """Return a narrow network of torchvision; `channels` is 64 in ResNet-50, and 128 in ResNet-50 (x2)."""
    network = ResNet(block, list(depths), num_classes=3)
    network.inplanes = channels
    network.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    network.bn1 = nn.BatchNorm2d(channels)
    for stage, depth in enumerate(depths):
        layer = network._make_layer(block, channels * 2**stage, depth, stride=1 if stage == 0 else 2)
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(network.inplanes, 3)
    return randomized(network)


def vit(width: int = 192, heads: int = 3, **options: Any) -> VisionTransformer:
    """Return a vision transformer of timm with two blocks, for images of 32 pixels."""
    settings = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0} | options
    return randomized(VisionTransformer(embed_dim=width, num_heads=heads, **settings))


def randomized(network: Any) -> Any:
    """Return the network in eval mode, with random values instead of ones and zeros."""
    if next(network.parameters()).is_meta:
        return network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("running_var", "norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim == 1 and value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return network.eval()


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def without(weights: Weights, *starts: str) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith(starts)}


def other(network: nn.Module) -> Weights:
    """Return weights of the same network that must not be converted."""
    return {name: torch.full_like(value, 7) for name, value in network.state_dict().items()}


LINEAR = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
MLP = {f"{n}.{name}": value for n in (0, 2) for name, value in LINEAR.items()}
OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the features before the head of a network of torchvision."""
    network.fc = nn.Identity()
    return network(images)


# One function per release: the source network, the content of the file as the authors' code saves it, and a
# function that computes the features in the way of the authors.


def moco() -> tuple[Any, Any, Any]:
    """moco/builder.py and main_moco.py; the heads of v2 have two layers."""
    network = resnet(Bottleneck)
    names = without(network.state_dict(), "fc.") | prefixed("fc.", MLP)
    content = {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": {
            **prefixed("module.encoder_q.", names),
            **prefixed("module.encoder_k.", other(network)),
            "module.queue": torch.ones(128, 4),
            "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
        "optimizer": OPTIMIZER,
    }
    return network, content, features


def moco_v3_resnet() -> tuple[Any, Any, Any]:
    """moco/builder.py of moco-v3."""
    network = resnet()
    names = without(network.state_dict(), "fc.") | prefixed("fc.", MLP)
    weights = {
        **prefixed("module.base_encoder.", names),
        **prefixed("module.momentum_encoder.", other(network)),
        **prefixed("module.predictor.", MLP),
    }
    return (
        network,
        {"epoch": 1, "state_dict": weights, "optimizer": OPTIMIZER, "scaler": {"scale": 1.0}},
        features,
    )


def moco_v3_vit() -> tuple[Any, Any, Any]:
    """vits.py: width 384 with 12 heads, and fixed sine-cosine positions."""
    network = vit(384, 12)
    positions = torch.cat([torch.zeros(1, 384), sine_cosine_2d(4, 4, 384, row_first=True).float()])
    network.pos_embed.data = positions[None]
    weights = {
        **prefixed("module.base_encoder.", network.state_dict() | prefixed("head.", MLP)),
        **prefixed("module.momentum_encoder.", other(network)),
        **prefixed("module.predictor.", MLP),
    }
    return network, {"epoch": 300, "arch": "vit_small", "state_dict": weights}, class_token


def class_token(network: VisionTransformer, images: Tensor) -> Tensor:
    return network.forward_features(images)[:, 0]


def mean_token(network: VisionTransformer, images: Tensor) -> Tensor:
    return network.forward_features(images).mean(1)


def simclr() -> tuple[Any, Any, Any]:
    """convert.py and resnet_wider.py of tonylins/simclr-converter."""
    network = resnet(Bottleneck, channels=32)
    return network, {"state_dict": network.state_dict()}, features


def vissl() -> tuple[Any, Any, Any]:
    """vissl/models/trunks/resnext.py and vissl/utils/checkpoint.py."""
    network = resnet(Bottleneck, depths=(1, 2, 1, 1))
    trunk = prefixed("_feature_blocks.", without(network.state_dict(), "fc."))
    model = {"trunk": trunk, "heads": prefixed("0.clf.0.", LINEAR)}
    classy = {"base_model": {"model": model, "meters": {}}, "optimizer": OPTIMIZER, "train": True}
    return network, {"phase_idx": 199, "iteration": 5, "classy_state_dict": classy}, features


def byol() -> tuple[Any, Any, Any]:
    """The file of VISSL's model zoo: the names have no prefix, because it needs APPEND_PREFIX."""
    network = resnet(Bottleneck)
    names = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    return network, names, features


def swav() -> tuple[Any, Any, Any]:
    """src/resnet50.py: `padding` and `conv1` pad three pixels together, as torchvision does."""
    network = resnet(Bottleneck)
    names = {
        **without(network.state_dict(), "fc."),
        **prefixed("projection_head.", MLP),
        "prototypes.weight": torch.ones(3000, 128),
    }

    def padded(network: Any, images: Tensor) -> Tensor:
        network.conv1.padding = (2, 2)
        return features(network, nn.functional.pad(images, (1, 1, 1, 1)))

    return network, prefixed("module.", names), padded


def deepcluster_v2() -> tuple[Any, Any, Any]:
    """main_deepclusterv2.py: several prototypes, in a checkpoint of the training."""
    network, names, padded = swav()
    names = without(names, "module.prototypes.") | {
        "module.prototypes.prototypes0.weight": torch.ones(3000, 128)
    }
    return network, {"epoch": 800, "state_dict": names, "optimizer": OPTIMIZER}, padded


def simsiam() -> tuple[Any, Any, Any]:
    """simsiam/builder.py: the projector replaces `fc`."""
    network = resnet()
    names = prefixed("module.encoder.", without(network.state_dict(), "fc.") | prefixed("fc.", MLP))
    return network, {"arch": "resnet50", "state_dict": names | prefixed("module.predictor.", MLP)}, features


def barlow_twins() -> tuple[Any, Any, Any]:
    """main.py: the full checkpoint. Its ResNet has no `fc`."""
    network = resnet()
    names = prefixed("module.backbone.", without(network.state_dict(), "fc."))
    names |= prefixed("module.projector.", MLP) | {"module.bn.running_mean": torch.ones(3)}
    return network, {"epoch": 1000, "model": names, "optimizer": OPTIMIZER}, features


def vicreg() -> tuple[Any, Any, Any]:
    """resnet.py: the file of the encoder alone."""
    network = resnet(Bottleneck)
    return network, without(network.state_dict(), "fc."), features


def dino() -> tuple[Any, Any, Any]:
    """hubconf.py: the file of the encoder alone."""
    network = vit()
    return network, network.state_dict(), class_token


def dino_full() -> tuple[Any, Any, Any]:
    """main_dino.py: the full checkpoint. The teacher of a ViT is not a parallel model."""
    network = vit(384, 6)
    content = {
        "student": prefixed("module.backbone.", other(network)) | prefixed("module.head.", MLP),
        "teacher": prefixed("backbone.", network.state_dict()) | prefixed("head.", MLP),
        "optimizer": OPTIMIZER,
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    return network, content, class_token


def dino_resnet() -> tuple[Any, Any, Any]:
    """main_dino.py: the teacher of a network with BatchNorm is a parallel model."""
    network = resnet()
    names = without(network.state_dict(), "fc.")
    content = {
        "student": prefixed("module.backbone.", other(network)),
        "teacher": prefixed("module.backbone.", names) | prefixed("module.head.", MLP),
    }
    return network, content, features


def mae() -> tuple[Any, Any, Any]:
    """models_mae.py: the encoder of the model, and its decoder."""
    network = vit()
    decoder = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 17, 8),
        **prefixed("decoder_embed.", LINEAR),
        **prefixed("decoder_blocks.0.attn.qkv.", LINEAR),
        **prefixed("decoder_norm.", LINEAR),
        **prefixed("decoder_pred.", LINEAR),
    }
    return network, {"model": network.state_dict() | decoder}, mean_token


def ijepa() -> tuple[Any, Any, Any]:
    """src/models/vision_transformer.py and src/train.py: no class token; the target encoder is evaluated."""
    network = vit(class_token=False, global_pool="avg", fc_norm=False)
    content = {
        "encoder": prefixed("module.", other(network)),
        "predictor": prefixed("module.predictor_embed.", LINEAR),
        "target_encoder": prefixed("module.", network.state_dict()),
        "opt": OPTIMIZER,
        "scaler": {"scale": 1.0},
        "epoch": 300,
        "loss": 0.1,
    }
    return network, content, mean_token


def torchvision() -> tuple[Any, Any, Any]:
    network = resnet(depths=(2, 2, 2, 2))
    return network, network.state_dict(), features


def timm_layer_scale() -> tuple[Any, Any, Any]:
    """LayerScale, no bias of queries, keys and values, and no position for the class token."""
    network = vit(init_values=0.5, qkv_bias=False, no_embed_class=True, num_classes=3)
    return network, network.state_dict(), class_token


def lightly() -> tuple[Any, Any, Any]:
    """benchmarks/imagenet/vitb16/dino.py."""
    network = vit()
    names = {
        **prefixed("backbone.vit.", network.state_dict()),
        "backbone.mask_token": torch.ones(1, 1, 192),
        **prefixed("student_backbone.vit.", other(network)),
        **prefixed("online_classifier.", LINEAR),
    }
    return network, {"epoch": 99, "state_dict": names, "pytorch-lightning_version": "2.0"}, class_token


def lightly_sequential() -> tuple[Any, Any, Any]:
    """examples/pytorch/simclr.py: the modules have numbers."""
    network = resnet()
    backbone = nn.Sequential(*list(network.children())[:-1])
    names = prefixed("backbone.", backbone.state_dict()) | prefixed("projection_head.layers.", MLP)
    return network, names, features


def solo_learn() -> tuple[Any, Any, Any]:
    """solo/methods/base.py, and `main_linear.py` for the older name "encoder"."""
    network = resnet()
    names = prefixed("encoder.", without(network.state_dict(), "fc.")) | prefixed("projector.", MLP)
    names |= prefixed("momentum_encoder.", other(network))
    return network, {"state_dict": names, "hyper_parameters": {"lr": 0.3}}, features


SOURCES = {
    "moco": moco,
    "moco_v3": moco_v3_resnet,
    "moco_v3 ViT": moco_v3_vit,
    "simclr": simclr,
    "simclr_vissl": vissl,
    "pirl": vissl,
    "byol": byol,
    "swav": swav,
    "deepcluster_v2": deepcluster_v2,
    "simsiam": simsiam,
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "dino": dino,
    "dino full": dino_full,
    "dino ResNet": dino_resnet,
    "mae": mae,
    "ijepa": ijepa,
    "torchvision": torchvision,
    "timm": timm_layer_scale,
    "lightly": lightly,
    "lightly sequential": lightly_sequential,
    "solo_learn": solo_learn,
}


NORMALIZATION = {"timm": {"mean": [0.5, 0.5, 0.5], "std": [0.4, 0.5, 0.6]}}


def test_every_release_has_a_source() -> None:
    assert {name.partition(" ")[0] for name in SOURCES} == set(RELEASES)


@pytest.mark.parametrize("case", SOURCES)
def test_the_features_equal_those_of_the_source_network(case: str, tmp_path: Path) -> None:
    """The encoder passes through the file, the written folder and `AutoModel`."""
    name, file, output = case.partition(" ")[0], tmp_path / "checkpoint.pth.tar", tmp_path / "encoder"
    network, content, source_features = SOURCES[case]()
    torch.save(content, file, _use_new_zipfile_serialization=name not in ("moco", "swav"))  # files of 2020
    size = 32 if isinstance(network, VisionTransformer) else 48
    facts = convert(file, name, output, size=size, **NORMALIZATION.get(name, {}))
    encoder = AutoModel.from_pretrained(output).eval()
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = source_features(network, images), encode(encoder, images)
    assert expected.std() > 0.01 and (expected[0] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert facts["backbone"]["feature_size"] == expected.shape[1]
    processor = AutoImageProcessor.from_pretrained(output)
    expected = vars(RELEASES[name]) | NORMALIZATION.get(name, {})
    assert list(processor.image_mean) == list(expected["mean"])
    assert list(processor.image_std) == list(expected["std"])


def meta_vit(patch: int, width: int, depth: int, size: int = 224, **options: Any) -> Weights:
    """Return shapes of the weights of a vision transformer, without values."""
    # timm 1.0.20 reads numbers from tensors in the constructor, which the device "meta" does not allow.
    with init_empty_weights():
        network = VisionTransformer(
            img_size=size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=1,
            num_classes=0,
            **options,
        )
    return network.state_dict()


@pytest.mark.parametrize(
    ("release", "sizes", "name", "expected"),
    [
        ("dino", (8, 384, 12), "ViT-S/8", (384, 12, 6, 1536, 224)),
        ("dino", (16, 768, 12), "ViT-B/16", (768, 12, 12, 3072, 224)),
        ("moco_v3", (16, 384, 12), "ViT-S/16", (384, 12, 12, 1536, 224)),
        ("mae", (16, 1024, 24), "ViT-L/16", (1024, 24, 16, 4096, 224)),
        ("mae", (14, 1280, 32), "ViT-H/14", (1280, 32, 16, 5120, 224)),
        ("ijepa", (14, 1280, 32), "ViT-H/14", (1280, 32, 16, 5120, 224)),
        ("ijepa", (16, 1280, 32, 448), "ViT-H/16", (1280, 32, 16, 5120, 448)),
        ("ijepa", (16, 1408, 40), "ViT-g/16", (1408, 40, 16, 6144, 224)),
    ],
)
def test_the_architecture_of_a_released_vit(
    release: str, sizes: tuple[int, ...], name: str, expected: tuple[int, ...]
) -> None:
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False} if release == "ijepa" else {}
    weights = meta_vit(*sizes, mlp_ratio=expected[3] / sizes[1], **options)
    found = read_vit(weights, None, RELEASES[release].heads)
    config: Any = found.config
    fields = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size"
    assert (found.name, tuple(getattr(config, field) for field in fields)) == (name, expected)
    assert found.image_size == expected[-1] and config.layer_norm_eps == 1e-6
    assert config.model_type == ("ijepa" if release == "ijepa" else "vit")


@pytest.mark.parametrize(
    ("depths", "block", "channels", "name", "parameters"),
    [
        ((2, 2, 2, 2), BasicBlock, 64, "ResNet-18", 11_176_512),
        ((3, 4, 6, 3), BasicBlock, 64, "ResNet-34", 21_284_672),
        ((3, 4, 6, 3), Bottleneck, 64, "ResNet-50", 23_508_032),
        ((3, 4, 23, 3), Bottleneck, 64, "ResNet-101", 42_500_160),
        ((3, 8, 36, 3), Bottleneck, 64, "ResNet-152", 58_143_808),
        ((3, 4, 6, 3), Bottleneck, 128, "ResNet-50 (x2)", None),
        ((3, 4, 6, 3), Bottleneck, 320, "ResNet-50 (x5)", None),
        ((3, 24, 36, 3), Bottleneck, 128, "ResNet-200 (x2)", None),
    ],
)
def test_the_architecture_of_a_released_resnet(
    depths: tuple[int, ...], block: Any, channels: int, name: str, parameters: int | None
) -> None:
    """The numbers of parameters are those of torchvision without `fc`."""
    with torch.device("meta"):
        weights = resnet(block, depths, channels).state_dict()
        found = read_resnet(weights)
        encoder = found.model_class(found.config)
    assert found.name == name and found.left_out == ["fc.weight", "fc.bias"]
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in found.weights.items()
    }
    if parameters is not None:
        assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters


def test_files_with_the_same_name_have_several_addresses() -> None:
    names = [url.rpartition("/")[2] for url in RELEASES["pirl"].files]
    assert [len(RELEASES["pirl"].addresses(name)) for name in names] == [2] * 6
    assert RELEASES["moco"].addresses("weights.pth") == []


def simsiam_file(folder: Path) -> Path:
    """Return a checkpoint of SimSiam."""
    file = folder / "checkpoint_0099.pth.tar"
    torch.save(simsiam()[1], file)
    return file


def test_card_and_facts_name_the_source(tmp_path: Path) -> None:
    file, output = simsiam_file(tmp_path), tmp_path / "encoder"
    facts = convert(file, "simsiam", output)
    assert json.loads((output / FILE).read_text()) == facts
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "config.json", FILE, "model.safetensors", "preprocessor_config.json"
    ]  # fmt: skip
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    release = RELEASES["simsiam"]
    assert facts["source"] == {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": digest,
        "urls": [release.files[0]],
        "place": "state_dict/module.encoder.",
    }
    assert facts["not_converted"] == {
        "state_dict/module.encoder.fc": 4,
        "state_dict/module.predictor": 4,
        "arch": 0,
    }
    text = (output / "README.md").read_text()
    card = ModelCard(text)
    assert card.data["license"] == "cc-by-nc-4.0" and "simsiam" in card.data["tags"]
    for part in (
        digest,
        file.name,
        release.files[0],
        release.page,
        release.paper,
        "module.encoder.fc` (4 tensors)",
    ):
        assert part in text
    assert "hf-ssl evaluate encoder" in text and str(tmp_path) not in text


def test_the_code_of_the_card_computes_the_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "encoder"
    network, content, source_features = ijepa()
    torch.save(content, tmp_path / "IN1K.pth.tar")
    convert(tmp_path / "IN1K.pth.tar", "ijepa", output)
    Image.new("RGB", (50, 40), (200, 100, 50)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
    values: dict[str, Any] = {}
    exec(code[1], values)
    processor = AutoImageProcessor.from_pretrained(output)
    pixels = processor(Image.open("photo.jpg"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(values["features"], source_features(network, pixels), atol=1e-5, rtol=1e-5)


def test_the_processor_resizes_and_crops_as_the_authors_do(tmp_path: Path) -> None:
    """256 and 224 pixels; each value against torchvision, on an image without fine structure."""
    convert(simsiam_file(tmp_path), "simsiam", tmp_path / "encoder")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    ramp = torch.linspace(0, 255, 320).expand(3, 300, 320).to(torch.uint8)
    image = transforms.ToPILImage()(ramp)
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    normalize = transforms.Normalize(RELEASES["simsiam"].mean, RELEASES["simsiam"].std)
    expected = transforms.Compose([*steps, normalize])(image)
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("number", [50, 101, 152])
@pytest.mark.parametrize("version", [1, 2])
def test_weights_of_torchvision_have_the_size_of_their_evaluation(
    number: int, version: int, tmp_path: Path
) -> None:
    weights = get_weight(f"ResNet{number}_Weights.IMAGENET1K_V{version}")
    file = weights.url.rpartition("/")[2]
    assert RELEASES["torchvision"].addresses(file) == [weights.url]
    torch.save(resnet().state_dict(), tmp_path / file)
    facts = convert(tmp_path / file, "torchvision", tmp_path / "encoder")
    evaluated = weights.transforms()
    assert [facts["processor"]["resize"]] == evaluated.resize_size
    assert [facts["processor"]["crop"]] == evaluated.crop_size


def test_options_replace_the_values_of_the_release(tmp_path: Path) -> None:
    network = vit(48, 4, num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    half = [0.5, 0.5, 0.5]
    facts = convert(
        tmp_path / "model.safetensors", "timm", tmp_path / "encoder", heads=4, mean=half, std=half
    )
    assert facts["processor"]["mean"] == facts["processor"]["std"] == half
    assert facts["source"]["urls"] == [] and facts["license"] is None
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = encode(AutoModel.from_pretrained(tmp_path / "encoder").eval(), images)
        torch.testing.assert_close(found, class_token(network, images), atol=1e-5, rtol=1e-5)


def test_an_encoder_with_one_channel(tmp_path: Path) -> None:
    weights = without(resnet().state_dict(), "fc.")
    weights["conv1.weight"] = weights["conv1.weight"].sum(1, keepdim=True)
    refused(tmp_path, weights, "vicreg", "--mean", "1 number", "0.5")
    facts = convert(tmp_path / "checkpoint.pth", "vicreg", tmp_path / "encoder", mean=[0.4], std=[0.2])
    assert facts["backbone"]["channels"] == 1
    assert '.convert("L")' in (tmp_path / "encoder/README.md").read_text()


def test_a_place_replaces_those_of_the_release(tmp_path: Path) -> None:
    network = resnet()
    content = {"ema": {"net": prefixed("model.", without(network.state_dict(), "fc."))}}
    torch.save(content, tmp_path / "own.pt")
    with pytest.raises(
        UserError, match=mentions("state_dict/module.encoder_q.", '--prefix "ema/net/model."')
    ):
        convert(tmp_path / "own.pt", "moco", tmp_path / "encoder")
    facts = convert(tmp_path / "own.pt", "moco", tmp_path / "encoder", place="ema/net/model.")
    assert facts["source"]["place"] == "ema/net/model." and facts["not_converted"] == {}
    facts = convert(tmp_path / "own.pt", "moco", tmp_path / "again", place="ema/net/model")  # without the dot
    assert facts["source"]["place"] == "ema/net/model."


def test_a_file_with_only_the_weights_fits(tmp_path: Path) -> None:
    """As the message about an object that `weights_only` rejects advises."""
    torch.save(simsiam()[1]["state_dict"], tmp_path / "weights.pth")
    facts = convert(tmp_path / "weights.pth", "simsiam", tmp_path / "encoder")
    assert facts["source"]["place"] == "module.encoder."


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    weights = without(resnet().state_dict(), "fc.")
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "resnet50.pth")
    convert(tmp_path / "resnet50.pth", "vicreg", tmp_path / "encoder")
    assert AutoModel.from_pretrained(tmp_path / "encoder").dtype == torch.float32


def refused(tmp_path: Path, content: Any, release: str, *parts: object, **options: Any) -> None:
    """Check the message for a checkpoint that cannot be converted, and that nothing is written or changed."""
    file, output = tmp_path / "checkpoint.pth", tmp_path / "encoder"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError) as raised:
        convert(file, release, output, **options)
    message = str(raised.value)
    assert missing(message, *parts) == [] and "\n" not in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class Harmful:
    """An object whose loading would create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, zipped: bool) -> None:
    created = tmp_path / "created"
    content = simsiam()[1] | {"epoch": Harmful(created)}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    assert missing(message_of(tmp_path / "bad.pth", tmp_path), "mkdir", "torch.save(", "['state_dict']") == []
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    message_of(tmp_path / "bad.pkl", tmp_path)
    assert not created.exists() and not (tmp_path / "encoder").exists()


def test_objects_beside_the_weights_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer in the full checkpoints of VICReg and Barlow Twins contains a function of their code."""
    code = ModuleType("code_of_the_authors")
    exec("def exclude_bias_and_norm(p): ...", code.__dict__)
    monkeypatch.setitem(sys.modules, code.__name__, code)
    network, content, source_features = barlow_twins()
    arguments = argparse.Namespace(folder=Path("runs"), rate=np.float64(0.1))
    content |= {"optimizer": {"param_groups": [{"filter": code.exclude_bias_and_norm}]}, "args": arguments}
    for zipped, folder in ((True, "new"), (False, "old")):
        torch.save(content, tmp_path / folder, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, code.__name__)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    for folder in ("new", "old"):
        facts = convert(tmp_path / folder, "barlow_twins", tmp_path / f"{folder}-encoder")
        assert {"optimizer", "args"} <= facts["not_converted"].keys()
        encoder = AutoModel.from_pretrained(tmp_path / f"{folder}-encoder").eval()
        with torch.inference_mode():
            expected = source_features(network, images)
            torch.testing.assert_close(encode(encoder, images), expected, atol=1e-5, rtol=1e-5)
    assert code.__name__ not in sys.modules


def message_of(file: Path, folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        convert(file, "simsiam", folder / "encoder")
    return str(raised.value)


def test_a_whole_model_is_not_loaded(tmp_path: Path) -> None:
    name = "torch.nn.modules.linear.Linear"
    refused(tmp_path, nn.Linear(2, 2), "simsiam", name, "weights_only=False).state_dict()")
    whole = {"epoch": 3, "model": nn.Linear(2, 2), "optimizer": OPTIMIZER}
    refused(tmp_path, whole, "simsiam", name, "weights_only=False)['model'].state_dict()")


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    """Return the bytes that a function writes."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tar_with_a_file(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("resnet50.pth"))


def zip_with_a_file(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("resnet50.pth", b"weights")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, None, "simsiam", "no such file", RELEASES["simsiam"].files[0])
    refused(tmp_path, None, "lightly", "no such file", RELEASES["lightly"].page)
    refused(tmp_path, b"", "simsiam", "an empty file")
    refused(tmp_path, b"<!doctype html><html></html>", "simsiam", "web page", "download")
    refused(tmp_path, pickle.dumps({"a": 1}, protocol=4), "simsiam", "pickle", "state dict")
    refused(tmp_path, torch.ones(3), "simsiam", "Tensor", "state dict")
    refused(tmp_path, {"epoch": 3, "args": {"lr": 0.1}}, "simsiam", "got none", "torch.save")
    for name, data, parts in (
        ("model.ckpt-9.index", b"\0" * 300, ("TensorFlow", "torch.save")),
        ("model.ckpt-9.data-00000-of-00001", b"\0" * 300, ("TensorFlow", "torch.save")),
        ("weights.h5", b"\x89HDF\r\n\x1a\n", ("HDF5", "torch.save")),
        ("weights.msgpack", b"\x82\xa3", ("Flax", "torch.save")),
        ("weights.pth", b"version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
        ("model.safetensors.index.json", b'{"weight_map": {}}', ("JSON",)),
        ("weights.pth.gz", b"\x1f\x8b\x08", ("gzip", "unpack")),
        ("weights.npy", saved(lambda file: np.save(file, np.ones(3))), ("NumPy", "torch.save")),
        ("weights.npz", saved(lambda file: np.savez(file, a=np.ones(3))), ("NumPy", "torch.save")),
        ("weights.pth.tar", saved(tar_with_a_file), ("a tar archive", "unpack")),
        ("weights.zip", saved(zip_with_a_file), ("a zip archive", "unpack")),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=mentions(name, *parts)):
            convert(tmp_path / name, "simclr", tmp_path / "encoder")
    with pytest.raises(UserError, match=mentions("got a folder", "hf-ssl evaluate")):
        convert(tmp_path, "simsiam", tmp_path / "encoder")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint(tmp_path: Path, zipped: bool, part: float) -> None:
    file = tmp_path / "whole"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, file, _use_new_zipfile_serialization=zipped)
    data = file.read_bytes()
    refused(tmp_path, data[: int(part * len(data))], "simsiam", "damaged", "download it again")


def test_safetensors_files(tmp_path: Path) -> None:
    """Those of transformers need no conversion; those of timm are converted (another test)."""
    convert(simsiam_file(tmp_path), "simsiam", tmp_path / "native")
    native = tmp_path / "native/model.safetensors"
    with pytest.raises(UserError, match=mentions("no conversion", f"hf-ssl evaluate {tmp_path / 'native'}")):
        convert(native, "simsiam", tmp_path / "encoder")
    (tmp_path / "part.safetensors").write_bytes(native.read_bytes()[:1000])
    with pytest.raises(UserError, match=mentions("part.safetensors", "download it again")):
        convert(tmp_path / "part.safetensors", "simsiam", tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_an_output_folder_with_files_stays(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/notes.txt").write_text("mine")
    refused(tmp_path, simsiam()[1], "simsiam", "--output", "notes.txt", "another folder")
    (tmp_path / "encoder/notes.txt").unlink()
    convert(tmp_path / "checkpoint.pth", "simsiam", tmp_path / "encoder")  # an empty folder is possible


def test_the_current_folder_as_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = simsiam_file(tmp_path)
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path / "encoder")
    assert convert(file, "simsiam", ".")["name"] == "encoder"
    assert (tmp_path / "encoder/config.json").exists()


def test_files_that_appear_during_the_conversion_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = simsiam_file(tmp_path), tmp_path / "encoder"

    def another_program(*arguments: Any) -> None:
        output.mkdir()
        (output / "notes.txt").write_text("mine")

    monkeypatch.setattr(converting, "write_conversion", another_program)
    with pytest.raises(UserError, match=mentions("--output", "notes.txt")):
        convert(file, "simsiam", output)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "checkpoint_0099.pth.tar",
        "encoder",
        "notes.txt",
    ]


def test_publish_names_the_command_for_a_converted_encoder(tmp_path: Path) -> None:
    convert(simsiam_file(tmp_path), "simsiam", tmp_path / "encoder")
    with pytest.raises(UserError, match=mentions("facts.json", "hf upload")):
        publish(tmp_path / "encoder", "user/name", dry_run=True)


def test_an_interruption_leaves_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "write_conversion", interrupted)
    file = simsiam_file(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        convert(file, "simsiam", tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("release", "kept", "left"),
    [
        ("timm", "state_dict_ema/", "state_dict/"),
        ("timm", "model_ema/", "model/"),
        ("torchvision", "model_ema/module.", "model/"),
    ],
)
def test_the_moving_average_is_preferred(tmp_path: Path, release: str, kept: str, left: str) -> None:
    """As `load_checkpoint` of timm does, and the training recipe of torchvision."""
    network = resnet()
    entry, _, prefix = kept.rpartition("/")
    content = {left.strip("/"): other(network), entry: prefixed(prefix, network.state_dict())}
    torch.save(content, tmp_path / "last.pth")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    facts = convert(tmp_path / "last.pth", release, tmp_path / "encoder", **half)
    assert facts["source"]["place"] == kept and facts["not_converted"][left.strip("/")] > 0
    torch.save({left.strip("/"): network.state_dict()}, tmp_path / "plain.pth")
    assert convert(tmp_path / "plain.pth", release, tmp_path / "plain", **half)["source"]["place"] == left


def test_the_configuration_of_timm_beside_the_file(tmp_path: Path) -> None:
    """It replaces --mean and --std. The images equal those of timm, up to one gray level of rounding.

    If the number of pixels around the crop is odd, torchvision rounds half of it to an even number, and
    transformers (5.24) rounds it down.
    """
    network = vit(img_size=64)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    own = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9, "interpolation": "bilinear"}
    config = {"architecture": "vit_tiny", "pretrained_cfg": {"input_size": [3, 64, 64]} | own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = convert(tmp_path / "model.safetensors", "timm", tmp_path / "encoder")
    assert facts["processor"] == {"resize": 71, "crop": 64, "interpolation": "bilinear"} | {
        key: own[key] for key in ("mean", "std")
    }
    ramp = torch.linspace(0, 255, 130).expand(3, 90, 130).to(torch.uint8)
    image = transforms.ToPILImage()(ramp)
    expected = create_transform(**resolve_data_config(config["pretrained_cfg"]))(image)
    found = AutoImageProcessor.from_pretrained(tmp_path / "encoder")(image, return_tensors="pt")
    assert (found["pixel_values"][0] - expected).abs().max() < 1.01 / 255 / 0.2
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    facts = convert(tmp_path / "model.safetensors", "timm", tmp_path / "again", **half)
    assert facts["processor"]["mean"] == [0.5] * 3 and facts["processor"]["resize"] == 71
    for broken in (own | {"crop_pct": None}, own | {"mean": 0.5}, own | {"crop_pct": 0}):
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=mentions("config.json", "crop_pct", "mean")):
            convert(tmp_path / "model.safetensors", "timm", tmp_path / "broken")
    (tmp_path / "config.json").write_text("{}")
    facts = convert(tmp_path / "model.safetensors", "timm", tmp_path / "without", **half)
    assert "crop" in facts["notes"][-1] and "bicubic" in facts["notes"][-1]


def test_the_release_of_another_checkpoint_is_named(tmp_path: Path) -> None:
    refused(tmp_path, simsiam()[1], "moco", "--from simsiam", '--prefix "state_dict/module.encoder."')
    refused(tmp_path, moco()[1], "simsiam", "--from moco")
    refused(tmp_path, vissl()[1], "simclr", "--from simclr_vissl or pirl")
    refused(tmp_path, ijepa()[1], "dino", "--from ijepa")
    refused(tmp_path, mae()[1], "moco", "--from mae", "timm")
    refused(tmp_path, dino()[1], "vicreg", "expected a ResNet", "--from dino", "timm")
    refused(tmp_path, barlow_twins()[1], "mae", "--from barlow_twins")
    refused(tmp_path, dino_full()[1], "mae", "--from dino", '--prefix "teacher/backbone."')
    vision = {"state_dict": prefixed("module.encoder.", vit().state_dict())}
    refused(tmp_path, vision, "simsiam", "expected a ResNet", '--prefix "state_dict/module.encoder."')
    refused(tmp_path, {"target_encoder": prefixed("module.", vit().state_dict())}, "ijepa", "class token")
    scaled = vit(384, 6, init_values=1.0).state_dict() | {"mask_token": torch.ones(1, 384)}
    refused(tmp_path, scaled, "dino", "blocks.0.ls1.gamma", "facebook/dinov2-small", "--from timm")
    with pytest.raises(UserError, match=mentions("--from", "simsaim", "simsiam")):
        convert(tmp_path / "checkpoint.pth", "simsaim", tmp_path / "encoder")


def changed(weights: Weights, **values: Tensor | None) -> Weights:
    """Return the weights with other values; "__" stands for a dot, and None removes a weight."""
    values = {name.replace("__", "."): value for name, value in values.items()}
    return {name: value for name, value in (weights | values).items() if value is not None}


def test_networks_without_an_equal_encoder(tmp_path: Path) -> None:
    half: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    plain = without(resnet(Bottleneck).state_dict(), "fc.")
    refused(tmp_path, {"features.0.weight": torch.ones(3)}, "torchvision", "features.0.weight", "timm/NAME")
    refused(tmp_path, changed(plain, conv1__weight=torch.ones(16, 3, 3, 3)), "vicreg", "7 x 7", "3 x 3")
    wide = torch.ones(64, 64, 3, 3)
    refused(tmp_path, changed(plain, layer2__0__conv2__weight=wide), "vicreg", "layer2.0.conv2", "(64, 64)")
    refused(tmp_path, changed(plain, layer1__0__se__fc1__weight=wide), "vicreg", "layer1.0.se.fc1.weight")
    refused(tmp_path, changed(plain, attnpool__weight=wide), "vicreg", "attnpool.weight")
    without_means = {name: plain[name] for name in plain if "running" not in name}  # resnet50_gn of timm
    refused(tmp_path, without_means, "vicreg", "GroupNorm", "timm/NAME")
    gates = vit(mlp_layer=SwiGLUPacked).state_dict()  # vit_giant_patch14_dinov2 of timm
    refused(tmp_path, gates, "timm", "blocks.0.mlp.fc2.weight", "SwiGLU", "timm/NAME", **half)
    renamed = {name.replace("mlp.fc1", "mlp.w12"): gates[name] for name in gates}  # of the authors
    refused(tmp_path, renamed, "timm", "blocks.0.mlp.w12.weight", "SwiGLU", **half)
    refused(tmp_path, vit(norm_layer=RmsNorm).state_dict(), "timm", "RMSNorm", "timm/NAME", **half)
    whole = vit().state_dict()
    for extra in ("reg_token", "dist_token", "norm_pre.weight", "blocks.0.attn.q_norm.weight"):
        refused(tmp_path, whole | {extra: torch.ones(1, 1, 192)}, "timm", extra, "timm/NAME")
    refused(tmp_path, whole, "timm", "--mean", "0.5,0.5,0.5")
    refused(tmp_path, whole, "timm", "--std", "0.5,0.5,0.5", mean=[0.5] * 3)
    tuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: whole[name] for name in whole
    }
    refused(tmp_path, {"model": tuned}, "mae", "fine-tuned")
    refused(tmp_path, changed(whole, pos_embed=torch.ones(1, 13, 192)), "dino", "13 positions")


def test_encoders_that_were_trained_with_labels(tmp_path: Path) -> None:
    """The names of these weights do not show their method, but a classifier does."""
    labeled = vit(num_classes=3).state_dict()
    refused(tmp_path, {"model": labeled}, "mae", "head.weight", "--from timm")
    refused(tmp_path, resnet().state_dict(), "vicreg", "fc.weight", "--from torchvision")
    refused(tmp_path, resnet().state_dict(), "dino", "fc.weight", "--from torchvision")


def test_weights_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    plain = without(resnet().state_dict(), "fc.")
    refused(
        tmp_path,
        changed(plain, layer3__0__bn1__bias=None),
        "vicreg",
        "stages.2.layers.0.layer.0.normalization",
    )
    refused(tmp_path, changed(plain, bn1__bias=torch.ones(5)), "vicreg", "(16,)", "(5,)")
    refused(tmp_path, changed(plain, bn1__bias=torch.full((16,), torch.nan)), "vicreg", "NaN")
    refused(tmp_path, changed(vit().state_dict(), norm__weight=None), "dino", "layernorm.weight")


def test_weights_that_cannot_be_copied(tmp_path: Path) -> None:
    """Integers would become weights without their scale, and a negative variance makes features NaN."""
    plain = without(resnet().state_dict(), "fc.")
    refused(tmp_path, changed(plain, bn1__bias=torch.ones(16, dtype=torch.int8)), "vicreg", "torch.int8")
    refused(tmp_path, changed(plain, bn1__bias=torch.ones(16, dtype=torch.cfloat)), "vicreg", "complex64")
    refused(tmp_path, changed(plain, bn1__bias=torch.ones(16).to_sparse()), "vicreg", "torch.sparse_coo")
    refused(tmp_path, changed(plain, bn1__bias=torch.ones(16, device="meta")), "vicreg", "no values")
    variances = torch.full((16,), -1.0)
    refused(tmp_path, changed(plain, bn1__running_var=variances), "vicreg", "running_var", -1)


def test_weights_with_other_names_or_shapes(tmp_path: Path) -> None:
    plain, whole = without(resnet().state_dict(), "fc."), vit().state_dict()
    for name in ("layer2.0.downsample.2.weight", "layer2.0.conv4.weight", "layer0.0.bn1.weight"):
        refused(tmp_path, plain | {name: torch.ones(3)}, "vicreg", name, "timm/NAME")
    without_bias = changed(whole, blocks__0__attn__qkv__bias=None)
    refused(tmp_path, without_bias, "dino", "layers.1.attention.q_proj.bias")
    two = changed(whole, blocks__0__attn__qkv__weight=torch.ones(2, 192))
    refused(tmp_path, two, "dino", "blocks.0.attn.qkv.weight", "(2, 192)")
    half: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    scales = changed(whole, blocks__0__ls1__gamma=torch.ones(100))
    refused(tmp_path, scales, "timm", "blocks.0.ls1.gamma", "(100,)", 192, **half)
    scales["blocks.0.ls1.gamma"] = torch.ones(192)
    one = changed(scales, blocks__0__attn__proj__bias=torch.ones(1))
    refused(tmp_path, one, "timm", "layers.0.attention.o_proj.bias", "(192,)", "(1,)", **half)
    without_layer = changed(scales, blocks__0__attn__proj__weight=None)
    refused(tmp_path, without_layer, "timm", "blocks.0.attn.proj.weight", **half)


def test_heads_and_other_options_are_checked(tmp_path: Path) -> None:
    narrow = vit(48, 4).state_dict()
    refused(tmp_path, narrow, "dino", "--heads", 48)
    refused(tmp_path, narrow, "dino", "--heads", 5, heads=5)
    refused(
        tmp_path,
        {"state_dict": prefixed("backbone.", vit(384, 6).state_dict())},
        "solo_learn",
        "--heads",
        384,
    )
    refused(tmp_path, narrow, "dino", "--size", 32, 64, heads=4, size=64)
    refused(tmp_path, resnet().state_dict(), "torchvision", "--heads", 4, heads=4)
    refused(tmp_path, resnet().state_dict(), "torchvision", "--mean", 3, mean=[0.5])
    refused(tmp_path, resnet().state_dict(), "torchvision", "--std", "positive", std=[0.5, 0.5, 0.0])
    refused(tmp_path, resnet().state_dict(), "torchvision", "--mean", "nan", mean=[0.5, 0.5, float("nan")])
    pixels = [123.675, 116.28, 103.53]
    refused(tmp_path, resnet().state_dict(), "torchvision", "--mean", 116.28, 255, mean=pixels)
    with pytest.raises(UserError, match=mentions("https:/host/moco.pth", "download")):
        convert(Path("https://host/moco.pth"), "moco", tmp_path / "encoder")


def test_the_command_converts_and_says_what_it_left_out(tmp_path: Path, capsys) -> None:
    file, output = simsiam_file(tmp_path), tmp_path / "encoder"
    assert main(["convert", str(file), "--from", "simsiam", "--output", str(output), "--size", "64"]) == 0
    printed = capsys.readouterr().out
    assert (
        missing(printed, "ResNetModel", "state_dict/module.encoder.fc (4 tensors)", "hf-ssl evaluate") == []
    )
    assert main(["convert", str(file), "--from", "moco", "--output", str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "--from simsiam" in captured.err.splitlines()[-1]


WHOLE_SUITE = ("simsiam", "mae", "ijepa")  # one for each class of transformers


@pytest.mark.parametrize("case", in_tiers([(case,) for case in SOURCES], [("simsiam",)]))
def test_the_evaluation_suite_accepts_a_converted_encoder(case: str, tmp_path: Path) -> None:
    """With few images. All quick protocols for one encoder of each class, and three for the others."""
    name, encoder = case.partition(" ")[0], tmp_path / "encoder"
    torch.save(SOURCES[case]()[1], tmp_path / "checkpoint.pth")
    convert(tmp_path / "checkpoint.pth", name, encoder, size=32, **NORMALIZATION.get(name, {}))
    protocols = "all" if case in WHOLE_SUITE else "knn,linear,ridge"
    arguments = ["evaluate", str(encoder), "data.path=digits", "--protocols", protocols]
    limits = ["evaluation.max_train_images=60", "evaluation.max_test_images=30"]
    assert main([*arguments, *limits, "--output", str(tmp_path / "results")]) == 0
    results = json.loads((tmp_path / "results/results.json").read_text())["encoder"]["protocols"]
    assert {"knn", "linear", "ridge"} <= {each["key"].partition("_")[0] for each in results}
