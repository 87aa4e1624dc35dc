# SPDX-License-Identifier: Apache-2.0
"""Multi-crop: the backbone encodes each size of views separately, and the head receives all features at once.

Source: `forward` in facebookresearch/swav, src/resnet50.py, and `MultiCropWrapper` in facebookresearch/dino.
"""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, normalize, relu

from hf_ssl.methods.deepcluster_v2.configuration_deepcluster_v2 import DeepClusterV2Config
from hf_ssl.methods.deepcluster_v2.modeling_deepcluster_v2 import DeepClusterV2ForPreTraining
from hf_ssl.methods.dino.configuration_dino import DINOConfig
from hf_ssl.methods.dino.modeling_dino import DINOForPreTraining
from hf_ssl.methods.swav.configuration_swav import SwAVConfig
from hf_ssl.methods.swav.modeling_swav import SwAVForPreTraining
from hf_ssl.trainer.gradient_cache import cached_backward

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1], "hidden_sizes": [6]
}  # fmt: skip
BATCH = 6
SWAV = SwAVConfig(backbone_config=RESNET, prototypes=5, projection_size=4, projection_hidden_size=16)
CLUSTERS = DeepClusterV2Config(
    backbone_config=RESNET, prototypes=[3], projection_size=4, projection_hidden_size=16, num_samples=BATCH
)
DINO = DINOConfig(
    backbone_config=RESNET, output_size=7, projection_hidden_size=9, bottleneck_size=5, projection_layers=2,
    projection_batch_norm=True,
)  # fmt: skip
METHODS = [
    (SwAVForPreTraining, SWAV, "projections", relu),
    (DeepClusterV2ForPreTraining, CLUSTERS, "projections", relu),
    (DINOForPreTraining, DINO, "student", gelu),
]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    views = {"pixel_values": (BATCH, 2, 3, 16, 16), "local_pixel_values": (BATCH, 3, 3, 8, 8)}
    made = {
        # local views of another scale, which a separate normalization would hide
        name: (1 if name == "pixel_values" else 3) * torch.randn(shape, generator=generator).double()
        for name, shape in views.items()
    }
    return made | {"sample_index": torch.arange(BATCH)}


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(config).double().train()


def slow_head(head, rows, activation):
    """Outputs of Linear, BatchNorm, activation, Linear; mean and variance of the BatchNorm's inputs."""
    first, norm, _, last = head
    hidden = rows @ first.weight.T + (0 if first.bias is None else first.bias)
    mean = sum(hidden) / len(hidden)
    variance = sum((row - mean) ** 2 for row in hidden) / len(hidden)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    bias = 0 if last.bias is None else last.bias
    return activation(hidden) @ last.weight.T + bias, mean, variance * len(hidden) / (len(hidden) - 1)


@pytest.mark.parametrize(("model_class", "config", "name", "activation"), METHODS)
def test_the_head_normalizes_the_views_of_all_sizes_together(model_class, config, name, activation, inputs):
    model = build(model_class, config)
    backbone, head = copy.deepcopy(model.backbone), copy.deepcopy(model.projector)
    embeddings = model.embed(inputs)
    features = [
        backbone(pixel_values=inputs[kind].transpose(0, 1).flatten(0, 1)).pooler_output.flatten(1)
        for kind in ("pixel_values", "local_pixel_values")
    ]
    outputs, mean, variance = slow_head(head, torch.cat(features), activation)
    expected = normalize(outputs, dim=1).split([2 * BATCH, 3 * BATCH])  # one view after the other
    for key, rows in zip((name, f"local_{name}"), expected, strict=True):
        rows = rows.unflatten(0, (-1, BATCH)).transpose(0, 1)
        torch.testing.assert_close(embeddings[key], rows, rtol=1e-9, atol=1e-11)
    norm = model.projector[1]
    assert norm.num_batches_tracked == 1  # not once for each size
    torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-9, atol=1e-11)


def test_chunks_of_multi_crop_have_the_gradient_of_the_batch(inputs):
    """Without BatchNorm, which would use the statistics of a chunk."""
    config = copy.deepcopy(SWAV)
    models = [build(SwAVForPreTraining, config) for _ in range(2)]
    for model in models:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, nn.GroupNorm(1, child.num_features).double())
        model.prototypes.normalize()
    views = {name: value for name, value in inputs.items() if name != "sample_index"}
    expected = models[0](**views).loss
    expected.backward()
    parts = [{name: value[first : first + 4] for name, value in views.items()} for first in (0, 4)]
    chunks = [partial(dict, part) for part in parts]
    output = cached_backward(models[1], chunks, backward=torch.Tensor.backward, precision=nullcontext)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=0, atol=1e-12)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-11, msg=name)
