# SPDX-License-Identifier: Apache-2.0
"""Recipes and templates are found from a wheel and from a source tree, from any working directory."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_ssl.metrics import METRICS
from hf_ssl.resources import FOLDERS, recipe_files, resource

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json
import hf_ssl
from hf_ssl.resources import FOLDERS, recipe_files, resource
found = {}
for folder in FOLDERS:
    try:
        root = resource(folder)
    except FileNotFoundError:
        continue
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found[folder] = sorted(path.relative_to(root).as_posix() for path in files)
print(json.dumps({"package": hf_ssl.__file__, "recipes": list(recipe_files()), "found": found}))
"""


def ask(path: Path, folder: Path) -> dict:
    """What a process finds that runs in `folder` and imports hf_ssl from `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the source tree, unpacked: what an installer makes of it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_and_source_tree_find_the_same(wheel: Path, tmp_path: Path) -> None:
    packed, source = ask(wheel, tmp_path), ask(ROOT, tmp_path)
    assert Path(packed["package"]).is_relative_to(wheel)
    assert Path(source["package"]).is_relative_to(ROOT)
    assert packed["recipes"] == source["recipes"] != []
    assert packed["found"] == source["found"]
    present = {folder for folder, place in FOLDERS.items() if (ROOT / place).exists()}
    assert set(source["found"]) == present


def test_wheel_holds_the_package_and_its_data_alone(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"hf_ssl"}
    assert (wheel / "hf_ssl" / "py.typed").is_file()
    metrics = (wheel / "hf_ssl" / "metrics").glob("*/*.py")
    assert {path.stem for path in metrics} == {"__init__", *METRICS}, "evaluate.load reads these files"
    assert [path.name for path in wheel.rglob("LICENSE")] == ["LICENSE"]


def test_recipes_come_sorted_with_smoke_recipes_last() -> None:
    names = list(recipe_files())
    smoke = [name for name in names if name.startswith("smoke/")]
    assert names == sorted(set(names) - set(smoke)) + sorted(smoke)
    assert resource("recipes", "smoke", "simclr.yaml") == recipe_files()["smoke/simclr"]


def test_a_missing_resource_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"recipes/simcrl\.yaml"):
        resource("recipes", "simcrl.yaml")
