# SPDX-License-Identifier: Apache-2.0
"""`training/results/<recipe>.json`: what each run of a recipe reached. Written by runs, never typed."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from hf_ssl.errors import UserError
from hf_ssl.files import read_json, write_json
from hf_ssl.hub.facts import Facts, public_facts


def append_result(results_dir: str | Path, recipe_name: str, facts: Facts) -> Path:
    """Add a run to its recipe's list, whole at any moment; two runs that end together both stay in it.

    Args:
        results_dir: holds one file a recipe.
        recipe_name: "simclr_resnet18_cifar10", or "smoke/simclr".
        facts: of the run; made fit for strangers here.

    Returns:
        The file.

    Raises:
        UserError: the file cannot be written, or is there and is no list of results (it is left as it is).
    """
    path = Path(results_dir) / f"{recipe_name}.json"
    entry = result_entry(public_facts(facts))
    # The lock lies elsewhere, so that nothing but results is left among the results.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with WeakFileLock(Path(tempfile.gettempdir()) / f"hf_ssl-{name}.lock"):
        entries = read_json(path) if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(
                f"expected a list of results in {path.name}, got something else: move it away first."
            )
        write_json(path, [*entries, entry])
    return path


def result_entry(facts: Facts) -> dict[str, Any]:
    """One run in a results file: what tells it from others, where it ran, and what it reached."""
    backbone = facts["backbone"]
    return {
        "date": facts["date"],
        "hf_ssl_version": facts["hf_ssl_version"],
        "recipe": facts["recipe"]["name"],
        "overrides": facts["recipe"]["overrides"],
        "seed": facts["training"]["seed"],
        "method": facts["method"]["name"],
        "backbone": {
            key: backbone[key] for key in ("class_name", "parameters", "feature_size", "image_size")
        },
        "data": facts["data"],
        "training": facts["training"],
        "collapse": facts["monitor"]["alarm"],
        "environment": facts["environment"],
        "evaluation": facts["evaluation"],
        "results": facts["results"],
    }
