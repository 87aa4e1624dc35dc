# SPDX-License-Identifier: Apache-2.0
"""Selects the files of a run that are published: an explicit list, without all other files of the folder."""

import json
import re
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard

from hf_ssl.cards.card import CARD, EVALUATION_RESULTS, card_texts
from hf_ssl.cards.facts import FILE as FACTS
from hf_ssl.cards.facts import Facts, read_facts
from hf_ssl.errors import UserError
from hf_ssl.files import json_text, read_json
from hf_ssl.hub.remote import Files

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICTURES = (".png", ".jpg", ".webp", ".svg")
_WEIGHT_FILES = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
# The files of the repository that a publication replaces, or deletes if the run no longer has them.
_OWNED = re.compile(
    "|".join(
        (
            r"config\.json", r"preprocessor_config\.json", r"README\.md", r"facts\.json", _WEIGHT_FILES,
            rf"pretraining/(config\.json|{_WEIGHT_FILES})", r"\.eval_results/hf_ssl\.yaml",
        )
    )
)  # fmt: skip


def is_owned(path: str) -> bool:
    """Return whether a publication may delete this file; files that users added to the repository stay."""
    return _OWNED.fullmatch(path) is not None


def run_files(folder: Path, repo_id: str) -> Files:
    """Return the files of a finished run for the repository `repo_id`.

    These are the encoder, image processor, card, facts, results, pictures, and the method model in
    `pretraining/`. Card, facts and results contain the name of the repository instead of that of the folder.
    A card that a user edited stays unchanged.

    Raises:
        UserError: the folder is not a finished run (the message names the missing files), or a file is
            damaged.
    """
    _check_finished(folder)
    facts = read_facts(folder)
    files = encoder_files(folder) | {FACTS: folder / FACTS, CARD: folder / CARD}
    if (folder / EVALUATION_RESULTS).is_file():
        files[EVALUATION_RESULTS] = folder / EVALUATION_RESULTS
    for path in sorted((folder / "results").rglob("*.json")):
        if not path.name.startswith("_"):
            files[path.relative_to(folder).as_posix()] = path
    for name in facts["pictures"]:
        if Path(name).name != name or not name.endswith(PICTURES) or not (folder / name).is_file():
            raise UserError(f"facts.pictures.{name}: expected a picture in {folder}, found none; restore it")
        files[name] = folder / name
    files |= _renamed(folder, facts, repo_id)
    _check_card(files[CARD])
    return dict(sorted(files.items()))


def encoder_files(folder: Path) -> Files:
    """Return the files of the encoder, its image processor, and the method model in `pretraining/` if any.

    Raises:
        UserError: weights are missing or incomplete.
    """
    names = [CONFIG, PROCESSOR, *weight_files(folder)]
    if (folder / "pretraining").is_dir():
        inner = folder / "pretraining"
        if not (inner / CONFIG).is_file():
            raise UserError(f"{inner}: expected a model with {CONFIG}, found no such file; export it again")
        names += [f"pretraining/{name}" for name in (CONFIG, *weight_files(inner))]
    return {name: folder / name for name in names}


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's weight files, after a check that each has the length that it states."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder}: expected a model with {name}, found no such file; export it again")
        _check_complete(folder / name)
    return names if names == [WEIGHTS] else [*names, INDEX]


def _check_finished(folder: Path) -> None:
    """Raise UserError if a file of a finished run is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a finished run, found no folder; check the path")
    weights = WEIGHTS if not (folder / INDEX).is_file() else INDEX
    missing = [name for name in (CONFIG, weights, PROCESSOR, CARD, FACTS) if not (folder / name).is_file()]
    if missing:
        is_interrupted = any(folder.glob("checkpoint-*"))
        advice = "run its command again to finish it" if is_interrupted else "use another folder"
        raise UserError(f"{folder}: expected a finished run, found no {', '.join(missing)}; {advice}")


def _check_complete(path: Path) -> None:
    """Raise UserError if the length of a safetensors file differs from the length in its header."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        size = path.stat().st_size
        try:
            header = json.loads(file.read(length) if 8 + length <= size else b"")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError):
            ends = [-1]
    if 8 + length + max(ends, default=0) != size:
        raise UserError(
            f"{path}: expected the length in its header, got {size} bytes; export the model again"
        )


def _renamed(folder: Path, facts: Facts, repo_id: str) -> Files:
    """Return card, facts and results with the name of the repository; {} if they contain it already."""
    if facts["repo_id"] == repo_id:
        return {}
    renamed = cast(Facts, {**facts, "repo_id": repo_id, "name": repo_id})
    has_pretraining = (folder / "pretraining").is_dir()
    before, after = (card_texts(each, has_pretraining=has_pretraining) for each in (facts, renamed))
    if (folder / CARD).read_text(encoding="utf-8") != before[CARD]:
        del after[CARD]  # a user edited the card
    texts = {FACTS: json_text(renamed), **after}
    return {name: text.encode() for name, text in texts.items()}


def _check_card(card: Path | bytes) -> None:
    """Raise UserError if the metadata of the card cannot be parsed."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
    except Exception as error:  # YAML and huggingface_hub raise many types for a text that a user edited
        reason = " ".join(str(error).split())
        raise UserError(f"{CARD}: expected valid metadata, got an error ({reason}); correct it") from error
