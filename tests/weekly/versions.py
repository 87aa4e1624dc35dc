# SPDX-License-Identifier: Apache-2.0
"""Runs the default tests in new environments, with the oldest and the newest versions that pyproject.toml
allows: `python tests/weekly/versions.py [oldest] [newest]`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LISTED = (
    "from importlib.metadata import distributions\n"
    "print(*sorted(f'{found.name}=={found.version}' for found in distributions()))"
)


def oldest() -> list[str]:
    """Return a constraint NAME==VERSION for each lower bound of the dependencies and of some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["demo"], *extras["timm"]]
    found = [re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)", requirement) for requirement in needed]
    without = [requirement for requirement, match in zip(needed, found, strict=True) if match is None]
    assert not without, f"without a lower bound: {without}"
    return [f"{match[1]}=={match[2]}" for match in found if match is not None]


def make(environment: Path, packages: list[str]) -> Path:
    """Make an environment with packages, and return its Python."""
    python = environment / "bin" / "python"
    uv = shutil.which("uv")
    create = [uv, "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    pip = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    subprocess.run([*create, str(environment)], check=True)
    subprocess.run([*pip, *packages], check=True)
    return python


def install(environment: Path, constraints: list[str]) -> Path:
    """Make an environment with the package as in the README; return the folder of its programs."""
    file = environment.parent / "constraints.txt"
    file.write_text("\n".join(constraints), encoding="utf-8")
    return make(environment, ["--constraint", str(file), f"{ROOT}[test]"]).parent


def run(which: str, arguments: list[str]) -> int:
    """Print the oldest or the newest versions, and return the status of the tests with them."""
    with tempfile.TemporaryDirectory() as folder:
        programs = install(Path(folder) / "environment", oldest() if which == "oldest" else [])
        subprocess.run([programs / "python", "-c", LISTED], check=True)
        return subprocess.run([programs / "pytest", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(max(run(which, []) for which in sys.argv[1:] or ["oldest", "newest"]))
