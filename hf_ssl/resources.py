# SPDX-License-Identifier: Apache-2.0
"""Finds the files outside the package, optional packages, and the processor and its cores (layer 0).

The files are recipes, suites, studies, card templates, the Space, and `constraints.txt`.

A wheel contains them in a data folder inside the package. In a source tree, and so in an editable install,
they lie beside the package. The working directory has no influence.
"""

import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from hf_ssl.errors import UserError, one_line

PACKED = Path(__file__).parent / "_data"
SOURCE = Path(__file__).parent.parent

PORT = 7860  # of a Space on this machine
MAX_IMAGES = 10_000  # of the gallery of a Space
MAP_IMAGES = 2_000  # the largest number of images in a map of `hf-ssl plot`

# Name in the data folder of a wheel -> place in the source tree.
FOLDERS = {
    "recipes": "training/recipes",
    "suites": "training/suites",
    "studies": "training/studies",
    "model_cards": "model_cards",
    "spaces": "spaces",
    "constraints.txt": "constraints.txt",
}


def install_advice(extra: str) -> str:
    """Return how to install the packages of an extra of hf_ssl, for messages."""
    return f'run pip install -c constraints.txt ".[{extra}]" in a checkout of hf_ssl'


def require(what: str, extra: str, packages: Mapping[str, str]) -> None:
    """Raise UserError if an optional package cannot be imported.

    Args:
        what: what needs the packages, for the message.
        extra: the extra of hf_ssl with the packages.
        packages: {name of a package: its module}.
    """
    try:
        for module in packages.values():
            import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what}: expected {' and '.join(packages)}, got {one_line(error)}; {install_advice(extra)}"
        ) from error


def resource(folder: str, *parts: str) -> Path:
    """Return the path of a file or folder of hf_ssl, e.g. `resource("recipes", "smoke", "simclr.yaml")`.

    Args:
        folder: one of `FOLDERS`.
        parts: names of sub-folders and of the file.

    Raises:
        FileNotFoundError: the installation does not contain the file.
    """
    root = PACKED / folder if PACKED.is_dir() else SOURCE / FOLDERS[folder]
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"hf_ssl is installed without {'/'.join((folder, *parts))}: expected it at {path}"
        )
    return path


def recipe_files() -> dict[str, Path]:
    """Return the file of each recipe by its name (`smoke/simclr`), sorted by name, smoke recipes last."""
    root = resource("recipes")
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: (item[0].count("/"), item[0])))


def suite_files() -> dict[str, Path]:
    """Return {name of a suite of data sets: its file}, sorted by name."""
    return {path.stem: path for path in sorted(resource("suites").glob("*.yaml"))}


def study_files() -> dict[str, Path]:
    """Return {name of a study: its file}, sorted by name."""
    return {path.stem: path for path in sorted(resource("studies").glob("*.yaml"))}


@cache
def processor_field(name: str) -> str:
    """Return a field of the first processor in Linux, for example "vendor_id", or "" if it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == name), "")


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS and Windows have none
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def processes_here() -> int:
    """Return the number of processes of this run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def own_cores() -> int:
    """Return the number of cores for each process of this run on this machine, at least 1."""
    return max(1, usable_cores() // processes_here())
