# SPDX-License-Identifier: Apache-2.0
"""Folders of an encoder and an image processor that need the code beside them, as some on the Hub."""

import json
from pathlib import Path

from transformers import BitImageProcessor, ViTConfig, ViTModel

CODE = """
from pathlib import Path
from transformers import BitImageProcessor, ViTConfig, ViTModel
Path(r"{proof}").write_text("this code ran")
class ForeignConfig(ViTConfig):
    model_type = "foreign"
class ForeignModel(ViTModel):
    config_class = ForeignConfig
class ForeignProcessor(BitImageProcessor):
    pass
"""
VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def foreign(folder: Path, proof: Path, *, encoder: bool = True, processor: bool = True) -> Path:
    """A folder whose encoder, image processor or both need the code beside them."""
    ViTModel(ViTConfig(**VIT)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    (folder / "foreign.py").write_text(CODE.format(proof=proof))
    changes: dict[str, dict] = {}
    if encoder:
        names = {"AutoConfig": "ForeignConfig"}
        names |= {name: "ForeignModel" for name in ("AutoModel", "AutoModelForPreTraining")}
        changes["config.json"] = {
            "model_type": "foreign",
            "auto_map": {name: f"foreign.{value}" for name, value in names.items()},
        }
    if processor:
        changes["preprocessor_config.json"] = {
            "image_processor_type": "ForeignProcessor",
            "auto_map": {"AutoImageProcessor": "foreign.ForeignProcessor"},
        }
    for name, change in changes.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder
