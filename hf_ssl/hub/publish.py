# SPDX-License-Identifier: Apache-2.0
"""Publishing what a run left, and a Space that shows it, on the Hugging Face Hub or one that speaks like it.

Loads neither torch nor transformers.
"""

import json
from pathlib import Path, PurePosixPath

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import RepoCard

from hf_ssl.errors import UserError
from hf_ssl.files import read_json
from hf_ssl.hub.facts import read_facts
from hf_ssl.hub.leaks import check_leaks, secrets_here
from hf_ssl.hub.refusals import told_in_a_sentence
from hf_ssl.hub.remote import Published, Remote, check_name, in_words, open_repo, send
from hf_ssl.hub.run_files import Files, is_owned, run_files

SPACE_LIST = "space.json"
SPACE_NEEDS = ("app.py", "README.md", "requirements.txt")


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

    Published again, only what changed is sent, and what the run no longer has is removed; files that somebody
    added to the repo stay. Until the commit is made the repo is as it was.

    Args:
        folder: `training.output_dir` of the run. Checkpoints and what begins with an underscore stay here.
        repo_id: "user/name", or "name" in the account of the token; made if it is not there.
        private: make it private, as the run's recipe may say too (`publish.private`); a repo that is there
            keeps its visibility.
        dry_run: print what would go and return None; needs neither network nor token.
        token: of the Hub; None: what `hf auth login` or HF_TOKEN left.
        revision: a branch that is there; None: main.
        message: of the commit.

    Raises:
        UserError: the folder is no finished run or says too much, there is no token that may write, the name
            is none, or the Hub does not answer.
    """
    folder = Path(folder)
    with told_in_a_sentence(repo_id, constants.ENDPOINT):
        check_name(repo_id)
        files = run_files(folder, repo_id)
        private = private or bool(read_facts(folder)["recipe"]["sections"].get("publish", {}).get("private"))
        check_leaks(files, secrets_here(folder, Path.cwd(), token=token))
        if dry_run:
            _list(files, repo_id, private)
            return None
        repo = open_repo(repo_id, private=private, token=token, revision=revision)
        if repo.repo_id != repo_id:
            files = run_files(folder, repo.repo_id)
        return _send(repo, files, message or "Publish with hf_ssl")


def recorded_repo(folder: str | Path) -> str:
    """The repo that the recipe of a finished run names. Raises UserError if it names none."""
    repo_id = read_facts(folder)["repo_id"]
    if repo_id is None:
        raise UserError(f"the recipe of {folder} names no repo: say where to publish, as user/name")
    return repo_id


def publish_space(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Published | None:
    """Publish a Space that `hf-ssl space build` made; otherwise as `publish`.

    folder: holds `app.py`, `README.md` with the Space's header, `requirements.txt`, and `space.json`, whose
    `files` lists all that belongs to it.
    """
    folder = Path(folder)
    with told_in_a_sentence(repo_id, constants.ENDPOINT):
        check_name(repo_id)
        files = space_files(folder)
        check_leaks(files, secrets_here(folder, Path.cwd(), token=token))
        if dry_run:
            _list(files, f"Space {repo_id}", private)
            return None
        repo = open_repo(repo_id, kind="space", private=private, token=token)
        return _send(repo, files, "Publish with hf_ssl", _listed(repo))


def space_files(folder: Path) -> Files:
    """What belongs to a built Space.

    Raises:
        UserError: it is none, or a file that it lists is missing or lies outside.
    """
    if not (folder / SPACE_LIST).is_file():
        raise UserError(f"{folder} is no Space that `hf-ssl space build` made: {SPACE_LIST} is missing")
    names = dict.fromkeys([*_names(read_json(folder / SPACE_LIST), folder), SPACE_LIST])
    for name in (*SPACE_NEEDS, *names):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{folder / SPACE_LIST} lists {name}, which lies outside of the Space")
        if name not in names or not (folder / name).is_file():
            raise UserError(f"{folder} is no Space that can be published: {name} is missing")
    header = RepoCard((folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=True)
    if header.data.get("sdk") != "gradio":
        raise UserError(f"{folder / 'README.md'} has no header of a Space: expected sdk: gradio")
    return {name: folder / name for name in sorted(names)}


def _names(listed: object, folder: Path) -> list[str]:
    names = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / SPACE_LIST} lists no files: expected a list of names under `files`")
    return names


def _listed(repo: Remote) -> frozenset[str]:
    """The files of the Space that an earlier publication listed as its own."""
    try:
        path = repo.api.hf_hub_download(repo.repo_id, SPACE_LIST, repo_type=repo.kind)
        return frozenset(json.loads(Path(path).read_text())["files"])
    except (EntryNotFoundError, ValueError, KeyError, TypeError):
        return frozenset()


def _send(repo: Remote, files: Files, message: str, owned: frozenset[str] | None = None) -> Published:
    done = send(
        repo, files, is_owned=is_owned if owned is None else owned.__contains__, message=message, say=print
    )
    for word, names in (("uploaded", done.uploaded), ("deleted", done.deleted)):
        if names:
            print(f"{word}: {', '.join(names)}")
    print(done.url if done.uploaded or done.deleted else f"nothing has changed: {done.url} is up to date")
    return done


def _list(files: Files, name: str, private: bool) -> None:
    sizes = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in files.items()
    }
    width = max(map(len, sizes))
    for path, size in sizes.items():
        print(f"{path:{width}}  {in_words(size):>9}")
    kind = "private" if private else "public, if it is new"
    print(
        f"{len(sizes)} files, {in_words(sum(sizes.values()))}, would go to {name} ({kind}); nothing was sent"
    )
