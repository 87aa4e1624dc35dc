# SPDX-License-Identifier: Apache-2.0
"""The example script and the notebook run as they are printed, with fewer steps."""

import json
import re
import runpy
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from test_architecture import ROOT
from transformers import AutoImageProcessor, AutoModel


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """24 training and 8 test pictures of two classes, bright and dark."""
    for row in range(32):
        place = (
            tmp_path
            / "photos"
            / ("test" if row % 4 == 3 else "train")
            / ("bright" if row % 8 > 3 else "dark")
        )
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(row).integers(0, 100, (40, 50, 3)) + (150 if row % 8 > 3 else 0)
        PIL.Image.fromarray(noise.astype(np.uint8)).save(place / f"{row}.png")
    return tmp_path / "photos"


def test_the_script_of_the_readme_runs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "training/example.py").read_text()
    printed = code[code.index("import sys") :].strip()
    assert f"```python\n{printed}\n```" in (ROOT / "README.md").read_text()
    assert len(code.splitlines()) <= 35
    changes = {
        "num_train_epochs=20": "num_train_epochs=2, use_cpu=True, disable_tqdm=True",
        "per_device_train_batch_size=64": "per_device_train_batch_size=8",
        "depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]": "depths=[1, 1], hidden_sizes=[8, 16]",
        '"size": 64': '"size": 32',
    }
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py", str(photos)])
    done = runpy.run_path(str(tmp_path / "example.py"))
    history = done["trainer"].state.log_history
    assert [record["epoch"] for record in history if "eval_knn" in record] == [0, 1, 2]
    assert done["trainer"].state.best_model_checkpoint is not None
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "resnet"
    assert AutoImageProcessor.from_pretrained(tmp_path / "out") is not None


def test_the_notebook_runs_and_shows_neighbors(photos: Path, tmp_path: Path, monkeypatch) -> None:
    notebook = json.loads((ROOT / "training/photos.ipynb").read_text())
    shown: list[PIL.Image.Image] = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]  # matplotlib reads it
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            code = "".join(cell["source"]).replace("my_photos", str(photos / "train"))
            code = re.sub(r"(STEPS|BATCH_SIZE) = \d+", r"\1 = 4", code)
            exec(compile(code, "photos.ipynb", "exec"), names)
    curves, row = shown
    assert curves.width > 500 and row.size == (7 * 132, 128)
    assert names["nearest"][0] == names["QUERY"]
    assert AutoModel.from_pretrained(tmp_path / "my_encoder").config.model_type == "resnet"


@pytest.mark.parametrize("name", ["pretrain.py", "example.py"])
def test_uv_reads_the_metadata_of_scripts(name: str) -> None:
    """The format of PEP 723. `-m weekly` runs `uv` itself."""
    text = (ROOT / "training" / name).read_text()
    block = re.search(r"^# /// script\n((?:#[^\n]*\n)+?)# ///\n", text, re.MULTILINE)
    assert block is not None
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata == {"requires-python": project["requires-python"]}
