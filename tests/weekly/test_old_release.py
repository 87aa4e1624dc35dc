# SPDX-License-Identifier: Apache-2.0
"""An old release of transformers, in its own environment, loads the exported encoders of each family."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from hub.test_export import CONFIGS, SIDE, double_features, make, processor
from transformers import (
    BeitConfig,
    BeitModel,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from weekly import versions

from hf_ssl.hub import export_encoder
from hf_ssl.modeling.backbones import set_identity_pooler

PACKAGES = ["transformers==4.57.1", "torch==2.6.0", "torchvision==0.21.0", "timm==1.0.20"]
TOKENS = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
FURTHER = {
    "beit": (BeitModel, BeitConfig(**TOKENS)),
    "deit": (DeiTModel, DeiTConfig(**TOKENS, pooler_act="linear")),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**TOKENS)),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**TOKENS)),
    "timm": (
        TimmWrapperModel,
        TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            model_args={"img_size": SIDE, "depth": 2},
            pretrained_cfg={"input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3},
        ),
    ),
}
LOAD = """
import json, sys
import torch, transformers

report = {"version": transformers.__version__}
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    encoder, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    transformers.AutoImageProcessor.from_pretrained(folder)
    saved = torch.load(f"{folder}.pt")
    with torch.inference_mode():
        found = encoder.eval().double()(pixel_values=saved["images"]).last_hidden_state
    # transformers 4.57 stored this table of Swin, which it computes from the config.
    missing = [key for key in info["missing_keys"] if not key.endswith("relative_position_index")]
    report[name] = [missing, info["unexpected_keys"], (found - saved["tokens"]).abs().max().item()]
print(json.dumps(report))
"""


def write_encoders(folder: Path) -> list[str]:
    """Export one encoder of each family, and save its output; return the names."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double()
    for name in (*CONFIGS, *FURTHER):
        torch.manual_seed(0)
        kind, config = FURTHER.get(name, (None, None))
        encoder = make(name) if kind is None else kind(config)
        set_identity_pooler(encoder)
        export_encoder(encoder, processor(), folder / name)
        double_features(encoder, images)
        with torch.inference_mode():
            tokens = encoder(pixel_values=images).last_hidden_state
        torch.save({"images": images, "tokens": tokens}, folder / f"{name}.pt")
    return [*CONFIGS, *FURTHER]


def loaded(python: Path, folder: Path, names: list[str]) -> dict:
    """Return the report of a Python that does not have hf_ssl."""
    command = [str(python), "-c", LOAD, str(folder), *names]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.weekly
def test_an_old_release_loads_the_encoder_of_each_family(tmp_path: Path) -> None:
    python = versions.make(tmp_path / "environment", PACKAGES)
    names = write_encoders(tmp_path)
    report = loaded(python, tmp_path, names)
    assert report["version"] == "4.57.1"
    for name in names:
        missing, unexpected, difference = report[name]
        assert (missing, unexpected) == ([], []), name
        assert difference < 1e-9, name
