# SPDX-License-Identifier: Apache-2.0
"""Publishes a finished run, or a Space that shows it, on the Hugging Face Hub or on another hub with its API.

This module imports neither torch nor transformers.
"""

import re
from pathlib import Path, PurePosixPath
from typing import cast

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import RepoCard
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_ssl.cards.card import CARD, EVALUATION_RESULTS, card_texts, is_generated, picture_files
from hf_ssl.cards.conversion import FILE as CONVERSION
from hf_ssl.cards.facts import Facts
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.facts_files import read_facts
from hf_ssl.cards.privacy import check_leaks, local_secrets
from hf_ssl.cards.result_files import RESULTS, suite_results
from hf_ssl.errors import UserError, one_line
from hf_ssl.files import METHOD_MODEL, json_text, newest_checkpoint, read_json
from hf_ssl.hub.remote import (
    Files,
    Published,
    Remote,
    file_size,
    hub_errors,
    open_repo,
    size_text,
    update_repo,
)
from hf_ssl.modeling.encoder_parts import PARTS, SUBFOLDER, listed_subfolders
from hf_ssl.weight_files import not_finite_in_file

SPACE_FACTS = "space.json"
SPACE_FILES = ("app.py", "README.md", "requirements.txt")


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Published | None:
    """Publish a finished run in one commit: encoder, image processor, method model, card, results, pictures.

    A later publication uploads only the changed files. It deletes files of the model, the card and the facts
    that the run no longer has, but not pictures or `results/`. Files that users added to the repository stay.
    Until the commit, the repository is unchanged.

    Args:
        folder: `training.output_dir` of the run. Checkpoints and files with a leading underscore are not
            uploaded.
        repo_id: "user/name", or "name" for the account of the token. A missing repository is created.
        private: whether to create a private repository. The recipe can also request it (`publish.private`).
            An existing private repository stays private. For an existing public one, `private` is an error.
        dry_run: print the list of files and return None. This needs neither network nor token.
        token: a token of the Hub; None: the token of `hf auth login` or HF_TOKEN.
        revision: an existing branch; None: main.
        message: message of the commit.

    Raises:
        UserError: the folder is not a finished run or contains private information, no token has write
            access, the name is not valid, or the Hub does not answer.
    """
    folder = Path(folder).expanduser()
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        files = run_files(folder, repo_id)
        private = private or is_private(folder)
        check_leaks(files, local_secrets(folder, token))
        if dry_run:
            _print_files(files, repo_id, private)
            return None
        repo = open_repo(repo_id, private=private, token=token, revision=revision)
        if repo.repo_id != repo_id:
            files = run_files(folder, repo.repo_id)
        return _update(repo, files, message or "Publish with hf_ssl")


def is_private(folder: str | Path) -> bool:
    """Return whether the recipe of a finished run has `publish.private`."""
    return bool(read_facts(folder)["recipe"]["sections"].get("publish", {}).get("private"))


def recorded_repo(folder: str | Path) -> str:
    """Return the repository that the recipe of a finished run names.

    Raises:
        UserError: the recipe names none.
    """
    repo_id = read_facts(folder)["repo_id"]
    if repo_id is None:
        raise UserError(f"publish.repo_id: expected one in {folder}, got none; add user/name to the command")
    return repo_id


def publish_space(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Published | None:
    """Publish a Space that `hf-ssl space build` made.

    Args:
        folder: folder with `app.py`, `README.md` with the metadata of a Space, `requirements.txt`, and
            `space.json`, whose `files` lists all files of the Space.
        repo_id, private, dry_run, token: as for `publish`.

    Raises:
        UserError: the folder is not a Space, or as for `publish`.
    """
    folder = Path(folder).expanduser()
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
        files = space_files(folder)
        check_leaks(files, local_secrets(folder, token))
        if dry_run:
            _print_files(files, f"Space {repo_id}", private)
            return None
        repo = open_repo(repo_id, kind="space", private=private, token=token)
        return _update(repo, files, "Publish with hf_ssl", _published_list(repo))


def space_files(folder: Path) -> Files:
    """Return the files of a built Space.

    Raises:
        UserError: the folder is not a Space, or a listed file is missing or outside of the folder.
    """
    space_list = folder / SPACE_FACTS
    if not space_list.is_file():
        raise UserError(
            f"{folder}: expected a Space with {SPACE_FACTS}, found none; run `hf-ssl space build`"
        )
    names = dict.fromkeys([*_listed_names(read_json(space_list), space_list), SPACE_FACTS])
    for name in (*SPACE_FILES, *names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{space_list}: expected files inside the Space, got {name}; remove it")
        if name not in names or not (folder / name).is_file():
            raise UserError(f"{folder}: expected a Space with {name}, found none; run `hf-ssl space build`")
        if name.endswith(".safetensors"):
            _check_weights(folder / name)
    header = RepoCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
    if header.data.get("sdk") != "gradio":
        raise UserError(
            f"{folder / 'README.md'}: expected metadata with sdk: gradio; run `hf-ssl space build`"
        )
    return {name: folder / name for name in sorted(names)}


def _listed_names(listed: object, space_list: Path) -> list[str]:
    names = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{space_list}: expected a list of names in `files`, got none; build the Space again")
    return names


def _published_list(repo: Remote) -> frozenset[str]:
    """Return the names in the list of files of the Space that is published now."""
    try:
        path = repo.api.hf_hub_download(repo.repo_id, SPACE_FACTS, repo_type=repo.kind)
        return frozenset(read_json(Path(path))["files"])
    except (EntryNotFoundError, ValueError, KeyError, TypeError):
        return frozenset()


def _update(repo: Remote, files: Files, message: str, owned: frozenset[str] | None = None) -> Published:
    """Update the repository and print what changed."""
    may_delete = is_owned if owned is None else owned.__contains__
    done = update_repo(repo, files, is_owned=may_delete, message=message, report=print)
    for change, names in (("uploaded", done.uploaded), ("deleted", done.deleted)):
        if names:
            print(f"{change}: {', '.join(names)}")
    print(done.url if done.uploaded or done.deleted else f"no changes: {done.url} is up to date")
    return done


def _print_files(files: Files, name: str, private: bool) -> None:
    """Print the files that a publication would upload."""
    sizes = {path: file_size(source) for path, source in files.items()}
    width = max(map(len, sizes))
    for path, size in sizes.items():
        print(f"{path:{width}}  {size_text(size):>9}")
    visibility = "private" if private else "public if it is new"
    print(
        f"dry run: {len(sizes)} files, {size_text(sum(sizes.values()))}, to {name} ({visibility}); nothing "
        "was uploaded"
    )


CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_ENCODER = re.compile(
    rf"{re.escape(PARTS)}|({SUBFOLDER}/)?({re.escape(CONFIG)}|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?)"
)


def is_encoder_file(path: str) -> bool:
    """Return whether a file belongs to an encoder: config, weights, or the list of its parts (`PARTS`)."""
    return _ENCODER.fullmatch(path) is not None


def is_owned(path: str) -> bool:
    """Return whether a publication may delete this file if the run does not contain it.

    It keeps files that users added, pictures, and files in `results/`.
    """
    return path in (PROCESSOR, CARD, FACTS, EVALUATION_RESULTS) or is_encoder_file(
        path.removeprefix(f"{METHOD_MODEL}/")
    )


def run_files(folder: Path, repo_id: str) -> Files:
    """Return the files of a finished run for the repository `repo_id`.

    These are the encoder, image processor, card, facts, results, pictures, and the method model in
    `pretraining/`. The results are all JSON files in `results/`, also those of suites and of `hf-ssl evaluate
    --output`. Card, facts and the results of the card contain the name of the repository instead of that of
    the folder. The card contains the tables of the suites in `results/`. A card that a user edited stays
    unchanged.

    Raises:
        UserError: the folder is not a finished run (the message names the missing files), or a file is
            damaged.
    """
    _check_finished(folder)
    facts = read_facts(folder)
    files = encoder_files(folder) | {FACTS: folder / FACTS, CARD: folder / CARD}
    if (folder / EVALUATION_RESULTS).is_file():
        files[EVALUATION_RESULTS] = folder / EVALUATION_RESULTS
    for path in sorted((folder / RESULTS).rglob("*.json")):
        name = path.relative_to(folder)
        if not any(part.startswith("_") for part in name.parts):  # such as the checkpoints of a suite
            files[name.as_posix()] = path
    files |= picture_files(folder, facts) | _renamed(folder, facts, repo_id)
    _check_card(files[CARD])
    return dict(sorted(files.items()))


def encoder_files(folder: Path) -> Files:
    """Return the files of the encoder, its image processor, and the method model in `pretraining/` if any.

    The files of an encoder in parts are in subfolders (`hf_ssl.modeling.encoder_parts`).

    Raises:
        UserError: weights are missing or incomplete.
    """
    names = [PROCESSOR]
    if (folder / PARTS).is_file():
        names.append(PARTS)
        for part in listed_subfolders(folder / PARTS):
            names += [f"{part}/{name}" for name in model_files(folder / part)]
    else:
        names += model_files(folder)
    if (folder / METHOD_MODEL).is_dir():
        names += [f"{METHOD_MODEL}/{name}" for name in model_files(folder / METHOD_MODEL)]
    return {name: folder / name for name in names}


def model_files(folder: Path) -> list[str]:
    """Return the names of a model's files, and check that each weight file is complete and finite."""
    weights, others = [WEIGHTS], [CONFIG]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        weights, others = sorted(set(read_json(folder / INDEX)["weight_map"].values())), [CONFIG, INDEX]
    for name in (*others, *weights):
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder}: expected a model with {name}, found no such file; export it again")
    for name in weights:
        _check_weights(folder / name)
    return [*others, *weights]


def _check_finished(folder: Path) -> None:
    """Raise UserError if a file of a finished run is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a finished run, found no folder; check the path")
    encoder = [CONFIG, WEIGHTS if not (folder / INDEX).is_file() else INDEX]
    if (folder / PARTS).is_file():
        encoder = [PARTS]
    missing = [name for name in (*encoder, PROCESSOR, CARD, FACTS) if not (folder / name).is_file()]
    if missing:
        is_interrupted = newest_checkpoint(folder) is not None
        advice = "run its command again to finish it" if is_interrupted else "use another folder"
        if (folder / CONVERSION).is_file():
            advice = f"run hf upload user/name {folder} to publish a converted encoder"
        raise UserError(f"{folder}: expected a finished run, found no {', '.join(missing)}; {advice}")


def _check_weights(path: Path) -> None:
    """Raise UserError if a file has not the length in its header, or weights that are not finite."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening a file compares both lengths
    except SafetensorError as error:
        size = path.stat().st_size
        raise UserError(
            f"{path}: expected the length in its header, got {size} bytes; export the model again"
        ) from error
    name = not_finite_in_file(path)
    if name is not None:
        raise UserError(
            f"{path}: expected finite weights, got NaN or infinity in {name}; export a checkpoint "
            "of an earlier step"
        )


def _renamed(folder: Path, facts: Facts, repo_id: str) -> Files:
    """Return the card with the current results of suites, and facts and results of another repository.

    Facts and results are left out if they contain the name of this repository already. The card is left out
    if a user edited it.
    """
    has_pretraining = (folder / METHOD_MODEL).is_dir()
    renamed = cast(Facts, {**facts, "repo_id": repo_id, "name": repo_id})
    texts = card_texts(renamed, has_pretraining=has_pretraining, suites=suite_results(folder, facts))
    if not is_generated((folder / CARD).read_text(encoding="utf-8"), facts, has_pretraining):
        del texts[CARD]
    if facts["repo_id"] == repo_id:
        texts = {name: text for name, text in texts.items() if name == CARD}
    else:
        texts[FACTS] = json_text(renamed)
    return {name: text.encode() for name, text in texts.items()}


def _check_card(card: Path | bytes) -> None:
    """Raise UserError if the metadata of the card cannot be parsed."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
    except Exception as error:  # YAML and huggingface_hub raise many types for a text that a user edited
        sentence = f"{CARD}: expected valid metadata, got an error ({one_line(error)}); correct it"
        raise UserError(sentence) from error
