# SPDX-License-Identifier: Apache-2.0
"""Opens or creates a repository on a Hub, compares it with local files, and updates it in one commit.

`hub_errors` turns the errors of the Hub, of its client and of the network into a UserError.
"""

import io
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from hf_ssl.errors import UserError, one_line

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Files = dict[str, Path | bytes]
"""The files of a repository by their path in it: a local file, or the content."""

RETRY_DELAYS = (1.0, 4.0, 15.0)
"""Seconds before each retry. The client has then made its own retries already."""


@dataclass(frozen=True)
class Published:
    """The result of a publication.

    Attributes:
        repo_id: "user/name".
        url: address of the repository.
        commit: the newest commit of the repository.
        uploaded, deleted: paths that changed in the repository; both are empty if nothing changed.
    """

    repo_id: str
    url: str
    commit: str
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True)
class Remote:
    """An existing repository. `kind` is "model" or "space"; `revision` is a branch, None: main."""

    api: HfApi
    repo_id: str
    kind: str
    revision: str | None = None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo_id}"

    def head(self) -> tuple[str, dict[str, str]]:
        """Return the newest commit and the hash of each file: sha256 for large files, git's for others."""
        info: Any = self.api.repo_info(
            self.repo_id, repo_type=self.kind, revision=self.revision, files_metadata=True
        )
        return info.sha, {
            file.rfilename: file.lfs.sha256 if file.lfs is not None else file.blob_id
            for file in info.siblings
        }


def open_repo(
    repo_id: str,
    *,
    kind: str = "model",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Remote:
    """Return the repository to publish to; create it if it does not exist.

    Args:
        repo_id: "user/name", or "name" for the account of the token.
        kind: "model" or "space".
        private: whether to create a private repository. An existing private repository stays private.
        token: None: the token of `hf auth login` or HF_TOKEN.
        revision: a branch; None: main.

    Raises:
        UserError: there is no token, it has no write access, the user may not write to the namespace, or the
            repository is public although `private` is true.
    """
    validate_repo_id(repo_id)
    token = token or get_token()
    if token is None:
        raise UserError(NO_TOKEN)
    api = HfApi(token=token)
    return _with_retries(repo_id, lambda: _open(api, repo_id, kind, private, revision), is_busy)


def _open(api: HfApi, repo_id: str, kind: str, private: bool, revision: str | None) -> Remote:
    account = api.whoami(cache=True)
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"{repo_id}: expected a token with write access, got a read token of {account['name']}; create "
            f"one at {api.endpoint}/settings/tokens"
        )
    full = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
    try:
        is_private = api.repo_info(full, repo_type=kind).private
    except RepositoryNotFoundError:
        _create(api, full, kind, private, account)
        is_private = private
    if private and not is_private:
        raise UserError(
            f"{full}: expected a private repository, found a public one; make it private in its settings or "
            "choose another name"
        )
    return Remote(api, full, kind, revision)


def _create(api: HfApi, repo_id: str, kind: str, private: bool, account: dict[str, Any]) -> None:
    sdk = "gradio" if kind == "space" else None
    try:
        # private=None selects the default of the namespace, which is public for users
        api.create_repo(repo_id, repo_type=kind, private=private or None, space_sdk=sdk, exist_ok=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (403, 404):
            raise
        names = [account["name"], *(org["name"] for org in account.get("orgs", []))]
        raise UserError(
            f"{repo_id}: expected a namespace that the token of {account['name']} can write to "
            f"({', '.join(names)}), got {repo_id.split('/')[0]}; choose one of them "
            f"({error.server_message or error.response.status_code})"
        ) from error


def update_repo(
    repo: Remote,
    files: Files,
    *,
    is_owned: Callable[[str], bool],
    message: str,
    report: Callable[[str], object] = logger.info,
) -> Published:
    """Make the repository contain `files`, with one commit of the differences.

    A commit is complete or absent. The client uploads large files before the commit, and a retry does not
    upload them again. After a network error, a server error or a concurrent commit, the function compares
    again and retries.

    Args:
        repo: the repository.
        files: the files that it contains afterwards.
        is_owned: whether a file of the repository is deleted if `files` does not contain it. Others stay.
        message: message of the commit.
        report: receives a progress message.

    Raises:
        Exception: any error of the client; see `hf_ssl.hub.remote`.
    """
    attempted: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((), ())]

    def attempt() -> Published:
        head, remote = repo.head()
        changed = tuple(name for name, source in files.items() if not _has_hash(source, remote.get(name)))
        gone = tuple(name for name in remote if name not in files and is_owned(name))
        if not changed and not gone:  # an earlier attempt may have succeeded although its answer was lost
            return Published(repo.repo_id, repo.url, head, *attempted[-1])
        attempted.append((changed, gone))
        size = size_text(sum(file_size(files[name]) for name in changed))
        report(f"uploading {len(changed)} of {len(files)} files ({size}) to {repo.url}")
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

    return _with_retries(repo.repo_id, attempt, is_transient)


def _with_retries(
    repo_id: str, call: Callable[[], Result], is_retriable: Callable[[BaseException], bool]
) -> Result:
    """Return the result of `call`; retry after each of RETRY_DELAYS while its errors are retriable."""
    for delay in RETRY_DELAYS:
        try:
            return call()
        except Exception as error:
            if not is_retriable(error):
                raise
            reason = one_line(root_cause(error))[:100]
            logger.warning("%s: the request failed (%s); retrying in %g s", repo_id, reason, delay)
        time.sleep(delay)
    return call()


def _has_hash(source: Path | bytes, expected: str | None) -> bool:
    """Return whether a file has the hash that the repository states, a sha256 or a hash of git."""
    if expected is None:
        return False
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        is_large = len(expected) == 64
        return (sha_fileobj(file).hex() if is_large else git_hash(file.read())) == expected


def file_size(source: Path | bytes) -> int:
    """Return the size in bytes."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def size_text(size: int) -> str:
    """Return a size as text: "29.0 kB" for 29000 bytes."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


NO_TOKEN = "expected a token of the Hub with write access, found none; run `hf auth login` or set HF_TOKEN"
# A commit changes the repository in one step, so it is either complete or absent.
UNCHANGED = "the repository is unchanged; run the same command again"
TRANSIENT_STATUS = (408, 412, 425, 429, 500, 502, 503, 504)
_NO_XET = "xet-write-token"  # the request that fails on a hub without Xet


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub, its client and the network into a UserError.

    Args:
        repo_id: the name of the repository, as the user typed it.

    Raises:
        UserError: the block raised such an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = hub_error(root_cause(error), repo_id)
        if message is None:
            raise
        raise UserError(message) from error


def root_cause(error: BaseException) -> BaseException:
    """Return the cause of the client's "Error while uploading ...", which itself gives no reason."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_busy(error: BaseException) -> bool:
    """Return whether the server answered with a status after which a retry may succeed."""
    error = root_cause(error)
    return isinstance(error, HfHubHTTPError) and error.response.status_code in TRANSIENT_STATUS


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed: a network error, a busy server, or a concurrent commit."""
    error = root_cause(error)
    if isinstance(error, HfHubHTTPError):
        return is_busy(error)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError):  # raised by Xet
        return _NO_XET not in str(error)
    return isinstance(error, httpx2.TransportError | json.JSONDecodeError)


def hub_error(error: BaseException, repo_id: str) -> str | None:
    """Return the message for an error of the Hub, its client or the network, else None."""
    reason, endpoint = one_line(error), constants.ENDPOINT
    if isinstance(error, HFValidationError):
        return f"{repo_id!r}: expected user/name of letters, digits, '-', '_' and '.'; choose another name"
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: expected a connection to {endpoint}, got HF_HUB_OFFLINE=1; unset HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        return _status_error(error, repo_id, endpoint)
    if isinstance(error, ConnectionError) and _NO_XET in reason:
        return (
            f"{endpoint}: expected Xet, which uploads large files, got a hub without it ({reason}); set "
            "HF_HUB_DISABLE_XET=1 and run the same command again"
        )
    if isinstance(error, httpx2.TransportError | ConnectionError):
        return f"{endpoint}: the connection failed ({reason or type(error).__name__}); {UNCHANGED}"
    if isinstance(error, json.JSONDecodeError):
        return f"{endpoint}: expected an answer in JSON, got another format; {UNCHANGED}"
    if isinstance(error, ValueError) and "README.md" in reason:
        return f"README.md: expected a card that the Hub accepts, got an invalid one ({reason}); correct it"
    if isinstance(error, ValueError) and "LFS" in reason:
        return f"{endpoint}: expected an upload of the large files, got an error ({reason}); {UNCHANGED}"
    return None


def _status_error(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    """Return the message for an HTTP status."""
    status = error.response.status_code
    reason = one_line(error.server_message or error.response.reason_phrase or "no reason given").rstrip(".")
    got = f"got status {status} ({reason})"
    if status == 401:
        return (
            f"{endpoint}: expected a valid token, {got}; run `hf auth login`, or set HF_TOKEN to another "
            "token"
        )
    if status == 403:
        return f"{repo_id}: expected a token with write access, {got}; use another one"
    if status == 404:
        return f"{repo_id}: expected a repository, {got}; check the name and the token"
    if status == 412:
        return f"{repo_id}: expected no other commits during the upload, got some ({reason}); {UNCHANGED}"
    if status in TRANSIENT_STATUS:
        return f"{endpoint}: the server is busy or broken (status {status}, {reason}); {UNCHANGED}"
    return f"{repo_id}: expected {endpoint} to accept the request, {got}"
