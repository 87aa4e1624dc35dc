# SPDX-License-Identifier: Apache-2.0
"""The ResNet of torchvision, timm and VISSL: its architecture, and the names of its weights."""

import re
from collections.abc import Iterable
from itertools import pairwise

from transformers import ResNetConfig, ResNetModel

from hf_ssl.conversion.architecture import Architecture, unexpected, unsupported, weight
from hf_ssl.conversion.checkpoint import StateDict

FAMILY = "ResNet"
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Position in `nn.Sequential(*resnet.children())` -> name. The examples of lightly build such encoders."""
_BLOCK = re.compile(r"layer([1-9]\d*)\.(\d+)\.((?:conv|bn)(?=[1-3])|downsample\.(?=[01]))(\d)\.(\w+)")
_HEADS = ("fc", "head", "projection_head", "prototypes")
_LAYERS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
    ("bottleneck", (3, 24, 36, 3)): 200,
}


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of the names under which the weights of a ResNet stand."""
    known = set(names)
    ends = ("conv1.weight", "layer1.0.conv1.weight"), ("0.weight", "4.0.conv1.weight")
    return [
        name.removesuffix(first)
        for first, second in ends
        for name in sorted(known)
        if name.endswith(first) and name.removesuffix(first) + second in known
    ]


def read(weights: StateDict) -> Architecture:
    """Return the encoder in the weights of a ResNet.

    Args:
        weights: their names begin with "conv1", "bn1", "layer1" and so on, or with the position of the module
            in an `nn.Sequential`.

    Raises:
        UserError: the features of this network differ from those of every `ResNetModel` of transformers.
    """
    positions = {} if "conv1.weight" in weights else _SEQUENTIAL
    named = {}
    for name, value in weights.items():
        first, dot, rest = name.partition(".")
        named[f"{positions.get(first, first)}{dot}{rest}"] = value
    left_out = [name for name in named if name.partition(".")[0] in _HEADS]
    own = {name: value for name, value in named.items() if name not in left_out}
    renamed = {_renamed(name): value for name, value in own.items()}
    config = _config(own)
    return Architecture(_name(config), ResNetModel, config, renamed, left_out)


def _renamed(name: str) -> str:
    """Return the name of a weight in transformers."""
    if name == "conv1.weight":
        return "embedder.embedder.convolution.weight"
    if name.startswith("bn1."):
        return f"embedder.embedder.normalization.{name.removeprefix('bn1.')}"
    found = _BLOCK.fullmatch(name)
    if found is None:
        raise unexpected(FAMILY, name)
    stage, block, kind, number, end = found.groups()
    start = f"encoder.stages.{int(stage) - 1}.layers.{block}"
    if kind == "downsample.":
        return f"{start}.shortcut.{('convolution', 'normalization')[int(number)]}.{end}"
    layer = "convolution" if kind == "conv" else "normalization"
    return f"{start}.layer.{int(number) - 1}.{layer}.{end}"


def _config(weights: StateDict) -> ResNetConfig:
    """Return the configuration that the names and shapes of the weights describe."""
    stem = weight(weights, "conv1.weight", FAMILY, 4)
    if tuple(stem.shape[2:]) != (7, 7):
        got = " x ".join(map(str, stem.shape[2:]))
        raise unsupported(FAMILY, "a first convolution of 7 x 7", f"one of {got}")
    if not any(name.endswith("running_mean") for name in weights):
        raise unsupported(FAMILY, "BatchNorm", "weights without running means, such as those of GroupNorm")
    depths: dict[int, int] = {}
    for found in filter(None, map(_BLOCK.fullmatch, weights)):
        stage, block = int(found[1]), int(found[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    is_bottleneck = "layer1.0.conv3.weight" in weights
    sizes = []
    for stage in range(1, len(depths) + 1):
        last = weight(weights, f"layer{stage}.0.conv{3 if is_bottleneck else 2}.weight", FAMILY, 4)
        middle = weight(weights, f"layer{stage}.0.conv2.weight", FAMILY, 4)
        sizes.append(last.shape[0])
        expected = (last.shape[0] // 4,) * 2
        if is_bottleneck and tuple(middle.shape[:2]) != expected:
            raise unsupported(
                FAMILY,
                f"{expected[0]} channels in layer{stage}.0.conv2",
                f"{tuple(middle.shape[:2])}, as in ResNeXt and Wide ResNet",
            )
    return ResNetConfig(
        num_channels=stem.shape[1],
        embedding_size=stem.shape[0],
        hidden_sizes=sizes,
        depths=[depths[stage] for stage in range(1, len(depths) + 1)],
        layer_type="bottleneck" if is_bottleneck else "basic",
    )


def _name(config: ResNetConfig) -> str:
    depths = tuple(config.depths or ())
    number = _LAYERS.get((config.layer_type, depths))
    sizes = list(config.hidden_sizes or ())
    usual = sizes[:1] == [config.embedding_size * (4 if config.layer_type == "bottleneck" else 1)]
    if (
        number is None
        or config.embedding_size % 64
        or not usual
        or any(2 * a != b for a, b in pairwise(sizes))
    ):
        return f"ResNet with {'-'.join(map(str, depths))} blocks"
    width = config.embedding_size // 64
    return f"ResNet-{number}{f' (x{width})' if width > 1 else ''}"
