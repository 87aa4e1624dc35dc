# SPDX-License-Identifier: Apache-2.0
"""Which files of a run's folder are its published repo: an explicit list, and nothing beside it."""

import json
import re
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard

from hf_ssl.errors import UserError
from hf_ssl.files import json_text, read_json
from hf_ssl.hub.card import CARD, EVALUATION_RESULTS, card_texts
from hf_ssl.hub.facts import FILE as FACTS
from hf_ssl.hub.facts import Facts, read_facts

Files = dict[str, Path | bytes]  # by path in the repo; bytes where the repo has it otherwise than the folder

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICTURES = (".png", ".jpg", ".webp", ".svg")
_WEIGHT_FILES = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
# What a publication owns in the repo: it takes the place of these, and removes those that it no longer has.
_OWNED = re.compile(
    "|".join(
        (
            r"config\.json", r"preprocessor_config\.json", r"README\.md", r"facts\.json", _WEIGHT_FILES,
            rf"pretraining/(config\.json|{_WEIGHT_FILES})", r"\.eval_results/hf_ssl\.yaml",
        )
    )
)  # fmt: skip


def is_owned(path: str) -> bool:
    """Whether a file of the repo is ours to remove; what a person added there is not."""
    return _OWNED.fullmatch(path) is not None


def run_files(folder: Path, repo_id: str) -> Files:
    """What a finished run publishes as `repo_id`: encoder, image processor, card, facts, results, pictures,
    and the method model in `pretraining/`.

    The card, the facts and the results speak of the repo by its name, whatever the folder is called. A card
    that was edited by hand is left as it is.

    Raises:
        UserError: the folder is no finished run (what is missing is named), or a file in it is damaged.
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
            raise UserError(f"{folder} is no finished run: the picture {name} that its facts name is missing")
        files[name] = folder / name
    files |= _named(folder, facts, repo_id)
    _check_card(files[CARD])
    return dict(sorted(files.items()))


def encoder_files(folder: Path) -> Files:
    """The encoder with its image processor, and the method model in `pretraining/` if it is there.

    Raises:
        UserError: weights are missing or cut off.
    """
    names = [CONFIG, PROCESSOR, *weight_files(folder)]
    if (folder / "pretraining").is_dir():
        inner = folder / "pretraining"
        if not (inner / CONFIG).is_file():
            raise UserError(f"{inner} is no model: {CONFIG} is missing")
        names += [f"pretraining/{name}" for name in (CONFIG, *weight_files(inner))]
    return {name: folder / name for name in names}


def weight_files(folder: Path) -> list[str]:
    """The files that hold a model's weights, whole by the length that they state."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} is no finished run: {name} is missing")
        _check_whole(folder / name)
    return names if names == [WEIGHTS] else [*names, INDEX]


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"expected the folder of a finished run, got {folder}, which is no folder")
    weights = WEIGHTS if not (folder / INDEX).is_file() else INDEX
    missing = [name for name in (CONFIG, weights, PROCESSOR, CARD, FACTS) if not (folder / name).is_file()]
    if missing:
        unfinished = any(folder.glob("checkpoint-*"))
        advice = ": the command that began it finishes it" if unfinished else ""
        raise UserError(f"{folder} is no finished run, {', '.join(missing)} missing{advice}")


def _check_whole(path: Path) -> None:
    """Raises UserError if a safetensors file is not as long as its header says."""
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
        raise UserError(f"{path} is damaged: it is not as long as its header says")


def _named(folder: Path, facts: Facts, repo_id: str) -> Files:
    """Card, facts and results with the repo's name in them; nothing if they have it already."""
    if facts["repo_id"] == repo_id:
        return {}
    renamed = cast(Facts, {**facts, "repo_id": repo_id, "name": repo_id})
    has_pretraining = (folder / "pretraining").is_dir()
    before, after = (card_texts(each, has_pretraining=has_pretraining) for each in (facts, renamed))
    if (folder / CARD).read_text(encoding="utf-8") != before[CARD]:
        del after[CARD]  # somebody wrote into it
    texts = {FACTS: json_text(renamed), **after}
    return {name: text.encode() for name, text in texts.items()}


def _check_card(card: Path | bytes) -> None:
    """Raises UserError if the card's metadata cannot be read."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
    except Exception as error:  # whatever YAML and the classes of the Hub's library make of a person's text
        reason = " ".join(str(error).split())
        raise UserError(f"the metadata at the beginning of {CARD} cannot be read: {reason}") from error
