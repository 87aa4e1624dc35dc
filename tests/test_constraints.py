# SPDX-License-Identifier: Apache-2.0
"""`constraints.txt` pins all dependencies within their bounds, and every installation command uses it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = sorted(
    {
        line
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for line in group
        if not line.startswith("hf_ssl[")
    }
)
INSTALLS = [
    "README.md",
    "CONTRIBUTING.md",
    "spaces/README.md",
    "training/README.md",
    *(name for name in (".ci/run", ".pre-commit-config.yaml") if (ROOT / name).exists()),  # not in an sdist
    "spaces/retrieval/README.md",
    "training/benchmarks/__main__.py",
    "hf_ssl/resources.py",
]


def pins() -> dict[str, Version]:
    """Return the versions by canonical name. Every line except comments is `name==version`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = []
    for line in lines:
        if not line.startswith("#"):
            found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!]+)", line)
            assert found, f"expected name==version, got {line!r}"
            pairs.append((canonicalize_name(found[1]), Version(found[2])))
    assert len(dict(pairs)) == len(pairs), "a package is pinned twice"
    return dict(pairs)


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_every_requirement_has_a_pin_within_its_bounds(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_pins_are_public_releases() -> None:
    assert len(pins()) > 100  # direct and indirect requirements
    assert [name for name, version in pins().items() if version.local or version.is_prerelease] == []
    platform = [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton", "pytorch-triton"))]
    assert platform == [], "torch determines these packages, and they differ between machines"


@pytest.mark.parametrize("name", INSTALLS)
def test_commands_to_install_use_them(name: str) -> None:
    """Without `constraints.txt`, a new release of a dependency may break a first installation."""
    text = (ROOT / name).read_text()
    commands = re.findall(r"pip install [^`\n]*(?:\"\.\[[\w{}]+\]\"|-r requirements\.txt)", text)
    assert commands
    assert [command for command in commands if "-c constraints.txt" not in command] == []


def test_every_file_that_names_a_command_to_install_is_checked() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for pattern in (
            "*.md",
            "*.yaml",
            "*.toml",
            ".ci/*",
            "hf_ssl/**/*.py",
            "training/**/*.py",
            "training/*.md",
            "spaces/**/*",
        )
        for path in ROOT.glob(pattern)
        if path.is_file() and re.search(r"pip install [^\n]*(\"\.\[|-r )", path.read_text(errors="ignore"))
    }
    assert found == set(INSTALLS)
