# SPDX-License-Identifier: Apache-2.0
"""Recognizes folders and files that hf_ssl or the Hugging Face libraries wrote. Their images are not used."""

import os
import re
from collections.abc import Collection
from functools import cache

from huggingface_hub import constants

RUN_MARK = "_run.json"
"""The file in the output folder of a run that contains its recipe."""
_ATTENTION = {"mean.png", "rollout.png"}
_MARKS = {
    "the output folder of a run": [{RUN_MARK}, {"supervised.json"}, {"facts.json", "config.json"}],
    "a Space": [{"space.json", "app.py"}],
    "the output folder of a sweep": [{"sweep.json", "sweep.csv"}],
    "the output folder of a comparison": [{"comparison.md", "comparison.csv"}],
    "the output folder of an evaluation": [
        {"suite.md", "suite.csv"},
        *({"results.json", picture} for picture in ("knn_curve.png", "probe_epochs.png", "detections.png")),
    ],
    "the output folder of hf-ssl plot": [{"points.html", "neighbors.png"}, {"points.html", "confusion.png"}],
    "attention maps": [_ATTENTION],
    "a cache of the Hub": [{"blobs", "refs", "snapshots"}],
}
"""What a folder is -> sets of names. A folder with all names of a set is such a folder."""
PLOTS = frozenset(
    "tsne_2d.png tsne_3d.png umap_2d.png umap_3d.png points.html confusion.png neighbors.png knn_curve.png "
    "loss_terms.png".split()
)
"""The names of all files of `hf-ssl plot`, which can write each of them alone."""


_CACHE = re.compile(r"cache-.+\.arrow")


def is_cache_of_datasets(name: str, names: Collection[str]) -> bool:
    """Return whether a file is a cached result of `datasets`, and not a part of a stored data set.

    `map`, `filter` and `shuffle` (datasets 5.2) write such files into the folder of `save_to_disk`. These
    files contain the same images again, or row numbers.

    Args:
        name: the name of the file.
        names: the names of all entries of its folder.
    """
    return "dataset_info.json" in names and _CACHE.fullmatch(name) is not None


def own_folder(path: str, names: Collection[str]) -> str | None:
    """Return what a folder is if hf_ssl or a library wrote it, else None.

    Args:
        path: the absolute path of the folder, links resolved.
        names: the names of its entries.
    """
    from datasets import config  # slow to import; `hf-ssl publish` does not need it

    caches = (constants.HF_HOME, str(config.HF_DATASETS_CACHE))
    if any(path == os.path.realpath(folder) for folder in caches):
        return "a cache of the Hugging Face libraries"
    found = {*names}
    known = next((what for what, marks in _MARKS.items() if any(mark <= found for mark in marks)), None)
    visible = {name for name in names if not name.startswith(".")}
    if known is None and visible and visible <= PLOTS:
        return "the output folder of hf-ssl plot"
    if known is None and "overview.png" in visible and _are_attention_maps(path, visible - {"overview.png"}):
        return "attention maps"
    return known


def _are_attention_maps(path: str, names: Collection[str]) -> bool:
    """Return whether all entries of a folder are folders of attention maps."""
    return bool(names) and all(
        os.path.exists(os.path.join(path, name, mark)) for name in names for mark in _ATTENTION
    )


def outside_own_folders(files: list[str], literal: str) -> tuple[list[str], dict[str, str]]:
    """Return the files that are in no own folder, and {folder: what it is} of the own folders.

    The function also omits cached results of `datasets`, unless there are no other files.

    Args:
        files: absolute paths.
        literal: the folder that a pattern names without wildcards. It and the folders above it do not count.
    """

    @cache
    def own(folder: str) -> str | None:
        """Return the own folder that contains `folder` or is it."""
        if len(folder) <= len(literal) or folder == os.path.dirname(folder):
            return None
        above = own(os.path.dirname(folder))
        if above is not None:
            return above
        found_kind = own_folder(os.path.realpath(folder), os.listdir(folder))
        if found_kind is not None:
            left_out[folder] = found_kind
        return None if found_kind is None else folder

    left_out: dict[str, str] = {}
    entries = cache(os.listdir)
    outside = [file for file in files if own(os.path.dirname(file)) is None]
    parts = ((file, *os.path.split(file)) for file in outside)
    kept = [file for file, folder, name in parts if not is_cache_of_datasets(name, entries(folder))]
    return kept or outside, left_out
