# SPDX-License-Identifier: Apache-2.0
"""Reads the results of runs and evaluations from all files that contain them (layer 3).

`hf-ssl pretrain` writes `facts.json`, `hf-ssl evaluate --output` writes `results.json`, and
`hf-ssl supervise` writes `supervised.json`. A results file is a list of entries, one for each run. The
`results.json` of a suite names its jobs. Their files `ENTRY/GROUP.json` contain evaluations of one encoder on
several data sets.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_ssl.cards.facts import Facts
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.facts_files import facts_of_weights, read_entries, read_facts, result_entry
from hf_ssl.cards.suite_text import Summary
from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation.results import check_result
from hf_ssl.files import local_folder, read_json

logger = logging.getLogger(__name__)

EVALUATION = "results.json"
SUPERVISED = "supervised.json"
FILES = (FACTS, SUPERVISED, EVALUATION)
"""Names of the files with results in the folders that commands write."""
EVALUATED = "evaluated"
"""Key of the entry, without its results, in `results.json`, `supervised.json` and the results of jobs."""
EXPECTED = f"a results file, {FACTS}, {EVALUATION} of hf-ssl evaluate or {SUPERVISED}"
_ENTRY = ("date", "seed", "method", "backbone", "data", "training", "recipe", "overrides", "evaluation")
_TRAINING = (
    "recipe", "overrides", "settings", "seed", "method", "backbone", "data", "training", "collapse",
)  # fmt: skip
RESULTS = "results"
"""Folder of a run for results that its card shows and `hf-ssl publish` uploads."""
_DEPTH = 3
"""Depth of the search in folders. It finds `runs/supervised/NAME` in `runs`."""


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the entries (`hf_ssl.cards.facts_files.result_entry`) of a file with results.

    For an encoder that hf_ssl did not train, the entry also has the keys `model` and `weights` (a hash of the
    weights). Its `training`, `method`, `data`, `recipe` and `seed` are None.

    Raises:
        UserError: the file contains other data, or an older version wrote it without the name of the images.
    """
    stored = read_json(path)
    if not isinstance(stored, dict) or {"method", "training"} <= stored.keys():
        return read_entries(path)
    if _is_suite(stored):
        places = {
            f"{name}/{each['group']}.json": None for each in stored["columns"] for name in each["entries"]
        }
        return [entry for place in places for entry in read_results(path.parent / place)]
    if isinstance(stored.get(EVALUATED), dict):
        if "group" in stored:
            results = {"trained": stored.get("result")}
        elif "result" in stored:
            images, result, pooling = (stored.get(key) for key in ("images", "result", "pooling"))
            results = {"trained": {"protocols": [result], "images": images, "pooling": pooling}}
        else:
            results = {name: result for name, result in stored.items() if name not in ("encoder", EVALUATED)}
            results = {"trained": stored.get("encoder"), **results}
        for result in results.values():
            check_result(result, str(path))
        if missing := [key for key in _ENTRY if key not in stored[EVALUATED]]:
            raise UserError(f"{path}: expected results as hf_ssl wrote them, got none for {missing[0]}")
        return [stored[EVALUATED] | {"results": results}]
    if "encoder" in stored or {"recipe", "result", "seconds"} <= stored.keys():
        command = "hf-ssl evaluate --suite" if "suite" in stored else "hf-ssl evaluate --output"
        command = command if "encoder" in stored else "hf-ssl supervise"
        raise UserError(
            f"{path}: expected the name of the evaluated images, got a file of an older version without it; "
            f"run {command} again"
        )
    raise UserError(f"{path}: expected {EXPECTED}, got other data; give the output folder of a run")


def result_files(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Return the files with results in a folder. If there are none, search its subfolders down to a depth."""
    own = [folder / name for name in FILES if (folder / name).is_file()]
    if own or depth == 0:
        return own
    inner = [
        path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(("_", "."))
    ]
    return [file for path in inner for file in result_files(path, depth - 1)]


def suite_results(folder: Path, facts: Facts) -> list[Summary]:
    """Return the results of suites in the folder `results/` of a run, without those of other encoders.

    Args:
        folder: the output folder of the run.
        facts: its facts. Results belong to its encoder if they contain the same training.

    Raises:
        UserError: a file cannot be read, or the file of a job is missing.
    """
    training = facts_of_weights(facts["training"])
    found = []
    for path in sorted((folder / RESULTS).rglob(EVALUATION)):
        stored = read_json(path)
        if isinstance(stored, dict) and _is_suite(stored):
            entries = read_results(path)
            if all(each["training"] and facts_of_weights(each["training"]) == training for each in entries):
                found.append(Summary.from_dict(stored))
    return found


def _is_suite(stored: dict[str, Any]) -> bool:
    return {"suite", "columns"} <= stored.keys()


def with_trained_reading(data: DataConfig, model: str) -> DataConfig:
    """Return the settings with `max_broken_fraction` and `value_range` of the run that trained an encoder.

    A setting stays if it has another value than the default. Both stay if `model` is no output folder of a
    run. The values of `value_range` are numbers, also if the run found them with "auto". Without them, an
    encoder trained on 12-bit images in 16-bit files would be measured on almost black images.

    Args:
        data: the settings of the images that the encoder is used for.
        model: folder or Hub id of the encoder.
    """
    folder = local_folder(model)
    if folder is None or not (folder / FACTS).is_file():
        return data
    trained = read_facts(folder)["recipe"]["sections"].get("data", {})
    if data.max_broken_fraction == DataConfig.max_broken_fraction:
        share = trained.get("max_broken_fraction", data.max_broken_fraction)
        data = replace(data, max_broken_fraction=share)
    if data.value_range is None and trained.get("value_range") is not None:
        values = trained_value_range(model)
        if values is not None:
            logger.info("data.value_range: [%.10g, %.10g], as in the training of %s", *values, model)
            data = replace(data, value_range=list(values))
    return data


def trained_value_range(model: str) -> tuple[float, float] | None:
    """Return the values that became black and white in the training of an encoder.

    The result is None for images of 8 bits, and if `model` is not the output folder of a run.
    """
    folder = local_folder(model)
    if folder is None or not (folder / FACTS).is_file():
        return None
    found = read_facts(folder)["data"]["value_range"]
    return None if found is None else (found[0], found[1])


def recorded_training(folder: Path) -> dict[str, Any]:
    """Return the part of the entry of a run that describes its training; {} if the folder contains no run."""
    if (folder / FACTS).is_file():
        entry: dict[str, Any] = result_entry(read_facts(folder))
    elif (folder / SUPERVISED).is_file():
        (entry,) = read_results(folder / SUPERVISED)
    else:
        return {}
    return {key: entry[key] for key in _TRAINING if key in entry}
