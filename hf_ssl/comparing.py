# SPDX-License-Identifier: Apache-2.0
"""Reads the results of runs from files, folders and the Hub, and writes their comparison (layer 5)."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from hf_ssl.cards.comparison import Comparison, compare
from hf_ssl.cards.comparison_text import csv_text, draw, latex, markdown
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.result_files import EXPECTED, read_results, result_files
from hf_ssl.errors import UserError
from hf_ssl.files import local_folder, replaced_file, write_text
from hf_ssl.hub.remote import hub_errors

logger = logging.getLogger(__name__)


def compare_runs(places: list[str], output: Path | None, baselines: bool = False) -> Comparison:
    """Compare runs, and write `comparison.md`, `.csv`, `.tex` and `.png`.

    Args:
        places: files and folders of `hf-ssl pretrain`, `hf-ssl evaluate --output` and `hf-ssl supervise`,
            folders of such folders, results files, and Hub ids.
        output: the folder of the files, which are replaced; None: nothing is written.
        baselines: see `compare`.

    Raises:
        UserError: a place contains no results, or no run was evaluated.
    """
    comparison = compare([entry for place in places for entry in entries_of(place)], baselines)
    if not comparison.columns:
        reasons = "; ".join(comparison.skipped) or "no run"
        raise UserError(f"compare: expected runs with an accuracy, got none ({reasons})")
    if output is not None:
        texts = {"md": markdown(comparison), "csv": csv_text(comparison), "tex": latex(comparison)}
        for suffix, text in texts.items():
            write_text(output / f"comparison.{suffix}", text)
        with replaced_file(output / "comparison.png") as staging:
            draw(comparison, staging)
    return comparison


def entries_of(place: str) -> list[dict[str, Any]]:
    """Return the entries of the runs in a file, in a folder or in a repository on the Hub ("user/name").

    Raises:
        UserError: there are no results.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return read_results(path)
    if folder := local_folder(place):
        return _entries_of_folder(folder)
    repo, _, revision = place.partition("@")
    if place.startswith((".", "/", "~")) or repo.count("/") != 1 or place.endswith(".json"):
        raise UserError(f"{place}: expected {EXPECTED}, a folder with one, or a Hub id, got none of these")
    with hub_errors(repo):
        try:
            return read_results(Path(hf_hub_download(repo, FACTS, revision=revision or None)))
        except EntryNotFoundError as error:
            raise UserError(f"{place}: expected a repository of hf-ssl with {FACTS}, got none") from error


def _entries_of_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the output folders in a folder, or, if there are none, of its results files."""
    if files := result_files(folder):
        return [entry for file in files for entry in read_results(file)]
    entries, problems = [], []
    for file in sorted(folder.glob("*.json")):
        try:
            entries += read_results(file)
        except UserError as error:
            problems.append(str(error))
    if not entries:
        raise UserError(
            f"{folder}: expected {EXPECTED} in it or in its folders, got none; finish the run, or use "
            "hf-ssl evaluate ENCODER --output FOLDER"
        )
    for problem in problems:
        logger.warning("not compared: %s", problem)
    return entries
