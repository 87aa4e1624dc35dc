# SPDX-License-Identifier: Apache-2.0
"""Every recipe trains two steps with a narrow encoder, as `hf-ssl pretrain` does."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import ResNetConfig, ResNetModel

from hf_ssl.recipe import load_recipe
from hf_ssl.resources import recipe_files
from hf_ssl.run import train

TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
# The encoders of CMC have half of the channels. With 4 channels, a convolution of oneDNN (torch 2.14.1) does
# not end on a CPU with AVX2 alone.
STAGES = {"hidden_sizes": "[16,16,32,32]", "depths": "[1,1,1,1]"}
NARROW = {
    "resnet": {"embedding_size": 8, **STAGES},
    "convnextv2": STAGES,
    "vit": TRANSFORMER,
    "ijepa": TRANSFORMER,
}
"""Architecture -> settings of a narrow encoder with the recipe's images and patches."""
SMALL = {
    "negatives": 32, "prototypes": 8, "decoder_num_hidden_layers": 1, "predictor_depth": 1,
    "predictor_hidden_size": 48,
}  # fmt: skip
"""Sizes of parts besides the encoder, for recipes that have numbers there."""
TRAINING = [
    "data.path=digits", "data.split=train", "data.max_images=64", "training.max_steps=2",
    "training.batch_size=16", "training.monitor_steps=0", "training.use_cpu=true",
    "training.disable_tqdm=true",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_files() if not name.startswith("smoke/")])
def test_recipe_trains(name: str, tmp_path: Path) -> None:
    sections = yaml.safe_load(recipe_files()[name].read_text())
    settings = []
    for key, given in sections["method"].items():
        if isinstance(given, list) and key in SMALL:
            settings.append(f"method.{key}={[SMALL[key]] * len(given)}")
        elif isinstance(given, int) and key in SMALL:
            settings.append(f"method.{key}={SMALL[key]}")
    backbone = sections["backbone"]
    if "init_from" in backbone:
        start = tmp_path / "start"
        ResNetModel(
            ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1] * 4)
        ).save_pretrained(start)
        settings.append(f"backbone.init_from={start}")
    else:
        narrow = NARROW[backbone["model_type"]]
        settings += [f"backbone.{key}={value}" for key, value in narrow.items()]
    settings.append(f"training.output_dir={tmp_path / 'run'}")
    trainer = train(load_recipe(name, [*settings, *TRAINING]))
    assert trainer.state.global_step == 2
    weights = list(trainer.model.parameters())
    assert all(torch.isfinite(weight).all() for weight in weights)
