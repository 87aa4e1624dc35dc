# SPDX-License-Identifier: Apache-2.0
"""A repo on a Hub: opened or made, compared with local files, and moved on in one commit."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from hf_ssl.errors import UserError
from hf_ssl.hub.refusals import NO_TOKEN, is_busy, is_transient, root_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PAUSES = (1.0, 4.0, 15.0)  # seconds before the next try, after the client's own tries


@dataclass(frozen=True)
class Published:
    """What came of a publication.

    Attributes:
        repo_id: "user/name". url: where to look at it. commit: the repo's head now.
        uploaded, deleted: paths that changed in the repo; both empty if nothing had changed.
    """

    repo_id: str
    url: str
    commit: str
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True)
class Remote:
    """A repo that is there and may, as far as is known, be written. kind: "model" or "space"."""

    api: HfApi
    repo_id: str
    kind: str
    revision: str | None = None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo_id}"

    def head(self) -> tuple[str, dict[str, str]]:
        """The newest commit, and the hash of each of its files: sha256 for large ones, git's for others."""
        info: Any = self.api.repo_info(
            self.repo_id, repo_type=self.kind, revision=self.revision, files_metadata=True
        )
        return info.sha, {
            file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id
            for file in info.siblings
        }


def check_name(repo_id: str) -> None:
    """Raises HFValidationError unless `repo_id` could be the name of a repo."""
    validate_repo_id(repo_id)


def open_repo(
    repo_id: str,
    *,
    kind: str = "model",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Remote:
    """The repo to publish to, made if it is not there.

    Args:
        repo_id: "user/name", or "name" for the account that the token belongs to.
        private: of a repo that is made; one that is there keeps its visibility.
        token: None: the one that `hf auth login` or HF_TOKEN left.

    Raises:
        UserError: no token, one that may only read, a namespace that is not the user's, or a public repo
            where a private one was asked for.
    """
    check_name(repo_id)
    token = token or get_token()
    if token is None:
        raise UserError(NO_TOKEN)
    api = HfApi(token=token)
    return _patiently(repo_id, lambda: _open(api, repo_id, kind, private, revision), is_busy)


def _open(api: HfApi, repo_id: str, kind: str, private: bool, revision: str | None) -> Remote:
    account = api.whoami(cache=True)
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"the token of {account['name']} may only read: publishing {repo_id} needs one that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    full = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
    try:
        is_private = api.repo_info(full, repo_type=kind).private
    except RepositoryNotFoundError:
        _create(api, full, kind, private, account)
        is_private = private
    if private and not is_private:
        raise UserError(
            f"{full} is there and public, so nothing was sent: make it private in its settings, or choose "
            "another name"
        )
    return Remote(api, full, kind, revision)


def _create(api: HfApi, repo_id: str, kind: str, private: bool, account: dict[str, Any]) -> None:
    sdk = "gradio" if kind == "space" else None
    try:
        # None: what the namespace has as its default, public for people
        api.create_repo(repo_id, repo_type=kind, private=private or None, space_sdk=sdk, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (403, 404):
            raise
        names = [account["name"], *(org["name"] for org in account.get("orgs", []))]
        raise UserError(
            f"cannot make {repo_id}: the token of {account['name']} may write to {', '.join(names)}, not to "
            f"{repo_id.split('/')[0]} ({error.server_message or error.response.status_code})"
        ) from error


def send(
    repo: Remote,
    files: Mapping[str, Path | bytes],
    *,
    is_owned: Callable[[str], bool],
    message: str,
    say: Callable[[str], object] = logger.info,
) -> Published:
    """Make the repo hold `files`, in one commit that holds what differs and nothing else.

    A commit is there whole or not at all. Large files are sent before it, and what has arrived of them is not
    sent again. What may pass (the network, a busy server, a commit by somebody else) is tried again a few
    times, each time from what the repo holds by then.

    Args:
        files: by path in the repo.
        is_owned: which files of the repo are deleted if `files` does not hold them; no others are touched.
        message: of the commit.
        say: told in words what is being done.

    Raises:
        Exception: whatever the client raises; see `hf_ssl.hub.refusals`.
    """
    planned: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())]

    def once() -> Published:
        head, remote = repo.head()
        changed = tuple(name for name, source in files.items() if not _same(source, remote.get(name)))
        gone = tuple(name for name in remote if name not in files and is_owned(name))
        if not changed and not gone:  # an earlier try may have arrived, and its answer got lost
            return Published(repo.repo_id, repo.url, head, *planned[-1])
        planned.append((changed, gone))
        say(f"uploading {len(changed)} of {len(files)} files ({_size(files, changed)}) to {repo.url}")
        commit = repo.api.create_commit(
            repo.repo_id,
            [
                *(CommitOperationAdd(name, files[name]) for name in changed),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message=message,
            repo_type=repo.kind,
            revision=repo.revision,
            parent_commit=head,
        )
        return Published(repo.repo_id, repo.url, commit.oid, changed, gone)

    return _patiently(repo.repo_id, once, is_transient)


def _patiently(repo_id: str, call: Callable[[], Result], may_pass: Callable[[BaseException], bool]) -> Result:
    """The result of `call`, tried again after each of `PAUSES` while what it raises may pass."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            reason = " ".join(str(root_of(error)).split())[:100]
            logger.warning("publishing %s: %s; trying again in %g s", repo_id, reason, pause)
        time.sleep(pause)
    return call()


def _same(source: Path | bytes, remote: str | None) -> bool:
    """Whether a file has the hash that the repo states for it."""
    if remote is None:
        return False
    is_large = len(remote) == 64
    if isinstance(source, Path) and is_large:
        with source.open("rb") as file:
            return sha_fileobj(file).hex() == remote
    content = source if isinstance(source, bytes) else source.read_bytes()
    if is_large:
        return hashlib.sha256(content).hexdigest() == remote
    return git_hash(content) == remote


def _size(files: Mapping[str, Path | bytes], names: tuple[str, ...]) -> str:
    """The size of some files together, for people."""
    sources = [files[name] for name in names]
    return in_words(sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in sources))


def in_words(size: int) -> str:
    """29000 is "29.0 kB"."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
