# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the facts of runs: `facts.json`, and the results file of a recipe (layer 3)."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from hf_ssl.cards.facts import Facts, check_facts
from hf_ssl.cards.privacy import public_facts
from hf_ssl.effects import WEIGHTS, effect
from hf_ssl.errors import UserError
from hf_ssl.evaluation.results import with_current_layout
from hf_ssl.files import read_json, write_json
from hf_ssl.names import with_current_keys

FILE = "facts.json"
_BACKBONE_CARD_ONLY = ("model_type", "config", "channels", "pooling", "base_model", "parts")
_OF_A_CALL = ("seconds", "images_per_second", "resumed", "choices", "peak_memory_gib")
"""Facts of a training that change if a finished run is started again."""
LEFT_OUT = ("training.seed", "data.path")
"""Settings that do not distinguish runs. Seeds share one row, and the revision identifies the data."""


def write_facts(directory: str | Path, facts: Facts) -> None:
    """Write `facts.json` completely or not at all.

    Raises:
        UserError: the same errors as `public_facts`, or the file cannot be written.
    """
    write_json(Path(directory) / FILE, public_facts(facts))


def read_facts(directory: str | Path) -> Facts:
    """Return the facts in `facts.json`, also those of an older version.

    Raises:
        UserError: the file is missing, is not JSON, or lacks a fact.
    """
    return check_facts(_current(read_json(Path(directory) / FILE)))


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries (`result_entry`) of a results file or of a facts file, also of an older version.

    Raises:
        UserError: the file is neither of them.
    """
    stored = read_json(path)
    if isinstance(stored, dict):
        return [result_entry(check_facts(_current(stored)))]
    entries = [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []
    if not entries or any({"recipe", "evaluation", "results"} - entry.keys() for entry in entries):
        raise UserError(f"{path}: expected a results file or {FILE} of hf-ssl pretrain, got other data")
    return [_current(entry) for entry in entries]


def _current(record: Any) -> Any:
    """Return facts, or an entry of a results file, with the current names and layouts."""
    record = with_current_keys(record)
    if isinstance(record, dict) and isinstance(record.get("results"), dict):
        results = {name: with_current_layout(result) for name, result in record["results"].items()}
        return record | {"results": results}
    return record


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
        entries = read_json(path) if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path.name}: expected a list of results, got other data; move the file away")
        write_json(path, [*map(_current, entries), entry])
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
        "settings": settings_of_weights(facts["recipe"]["differences"]),
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


def settings_of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings {"section.key": value} that change the weights and distinguish runs."""
    return {key: value for key, value in settings.items() if effect(key) == WEIGHTS and key not in LEFT_OUT}


def facts_of_weights(training: Any) -> dict[str, Any]:
    """Return the facts of a training that determine its weights."""
    return {key: value for key, value in training.items() if key not in _OF_A_CALL}
