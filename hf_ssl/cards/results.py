# SPDX-License-Identifier: Apache-2.0
"""Appends the results of a run to `<results_dir>/<recipe>.json`, the list of results of a recipe."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from hf_ssl.cards.facts import Facts, public_facts
from hf_ssl.errors import UserError
from hf_ssl.files import read_json, write_json
from hf_ssl.names import with_current_keys

_BACKBONE_CARD_ONLY = ("model_type", "config", "channels", "pooling", "base_model")


def append_result(results_dir: str | Path, recipe_name: str, facts: Facts) -> Path:
    """Append a run to the results file of its recipe and return the file.

    The file is complete at every moment. Two runs that end at the same time are both appended.

    Args:
        results_dir: folder with one file per recipe.
        recipe_name: "simclr_resnet18_cifar10", or "smoke/simclr".
        facts: the facts of the run. This function removes private information from them.

    Raises:
        UserError: the file cannot be written, or it exists and is not a list of results. It stays unchanged.
    """
    path = Path(results_dir) / f"{recipe_name}.json"
    entry = result_entry(public_facts(facts))
    # The lock file is in the temporary folder, so that the results folder contains only results.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with WeakFileLock(Path(tempfile.gettempdir()) / f"hf_ssl-{name}.lock"):
        entries = with_current_keys(read_json(path)) if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path.name}: expected a list of results, got other data; move the file away")
        write_json(path, [*entries, entry])
    return path


def result_entry(facts: Facts) -> dict[str, Any]:
    """Return the entry of a run: its settings, its environment and its results.

    Sections are copied as a whole, so that a new fact needs no change here.
    """
    return {
        "date": facts["date"],
        "hf_ssl_version": facts["hf_ssl_version"],
        "recipe": facts["recipe"]["name"],
        "overrides": facts["recipe"]["overrides"],
        "seed": facts["training"]["seed"],
        "method": facts["method"]["name"],
        "backbone": {
            key: value for key, value in facts["backbone"].items() if key not in _BACKBONE_CARD_ONLY
        },
        "data": facts["data"],
        "training": facts["training"],
        "collapse": facts["monitor"]["alarm"],
        "environment": facts["environment"],
        "evaluation": facts["evaluation"],
        "results": facts["results"],
    }
