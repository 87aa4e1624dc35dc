# SPDX-License-Identifier: Apache-2.0
"""Finds files outside the package (layer 0): recipes, card templates, the Space, and `constraints.txt`.

A wheel contains them in a data folder inside the package. In a source tree, and so in an editable install,
they lie beside the package. The working directory has no influence.
"""

from pathlib import Path

PACKED = Path(__file__).parent / "_data"
SOURCE = Path(__file__).parent.parent

# Name in the data folder of a wheel -> place in the source tree.
FOLDERS = {
    "recipes": "training/recipes",
    "model_cards": "model_cards",
    "spaces": "spaces",
    "constraints.txt": "constraints.txt",
}


def resource(folder: str, *parts: str) -> Path:
    """The path of a file or folder that comes with hf_ssl: `resource("recipes", "smoke", "simclr.yaml")`.

    Args:
        folder: one of `FOLDERS`.
        parts: names below it.

    Raises:
        FileNotFoundError: the installation does not have it.
    """
    root = PACKED / folder if PACKED.is_dir() else SOURCE / FOLDERS[folder]
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(
            f"hf_ssl is installed without {'/'.join((folder, *parts))}: expected it at {path}"
        )
    return path


def recipe_files() -> dict[str, Path]:
    """Every recipe that comes with hf_ssl: its name (`smoke/simclr`) and its file, sorted, smoke recipes
    last."""
    root = resource("recipes")
    files = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}
    return dict(sorted(files.items(), key=lambda item: (item[0].count("/"), item[0])))
