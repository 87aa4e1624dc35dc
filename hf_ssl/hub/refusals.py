# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between here and a Hub, as one sentence each."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from hf_ssl.errors import UserError

NO_TOKEN = "no token of the Hub was found: run `hf auth login`, or set HF_TOKEN to a token that may write"
# The repo's head is moved in one step, so these two are all that can be.
WHOLE = "what was there before is whole, and the same command goes on"
TRANSIENT = (408, 412, 425, 429, 500, 502, 503, 504)
NO_XET = "xet-write-token"


@contextmanager
def told_in_a_sentence(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn what the Hub, its client and the network raise into a `UserError`.

    repo_id: as the user gave it. endpoint: the Hub's address.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = explanation(root_of(error), repo_id, endpoint)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def root_of(error: BaseException) -> BaseException:
    """The error beneath the client's "Error while uploading ...", which says nothing by itself."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_busy(error: BaseException) -> bool:
    """Whether a server answered that the same may succeed in a moment."""
    error = root_of(error)
    return isinstance(error, HfHubHTTPError) and error.response.status_code in TRANSIENT


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed in a moment: the network, a busy server, somebody else's commit."""
    error = root_of(error)
    if isinstance(error, HfHubHTTPError):
        return is_busy(error)
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, ConnectionError):  # of Xet
        return NO_XET not in str(error)
    return isinstance(error, httpx2.TransportError | json.JSONDecodeError)


def explanation(error: BaseException, repo_id: str, endpoint: str) -> str | None:
    """One sentence about an error, or None for one that is a bug."""
    reason = " ".join(str(error).split())
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no name of a repo: expected user/name, of letters, digits, '-', '_' and '.'"
    if isinstance(error, LocalTokenNotFoundError):
        return NO_TOKEN
    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot publish {repo_id} while HF_HUB_OFFLINE is set: unset it first"
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, repo_id, endpoint)
    if isinstance(error, ConnectionError) and NO_XET in reason:
        return (
            f"{endpoint} has no Xet, by which large files are sent: set HF_HUB_DISABLE_XET=1 and give the "
            f"same command again ({reason})"
        )
    if isinstance(error, httpx2.TransportError | ConnectionError):
        return f"the connection to {endpoint} failed ({reason or type(error).__name__}): {WHOLE}"
    if isinstance(error, json.JSONDecodeError):
        return f"{endpoint} answered something that is no JSON: {WHOLE}"
    if isinstance(error, ValueError) and "README.md" in reason:
        return f"the Hub does not take the card: {reason}"
    if isinstance(error, ValueError) and "LFS" in reason:
        return f"{endpoint} did not take the files: {reason}; {WHOLE}"
    return None


def _of_status(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    status = error.response.status_code
    said = error.server_message or error.response.reason_phrase or "no reason given"
    said = " ".join(said.split()).rstrip(".")
    if status == 401:
        return (
            f"{endpoint} does not accept the token ({said}): run `hf auth login`, or set HF_TOKEN to another"
        )
    if status == 403:
        return f"the token may not write to {repo_id} ({said}): it needs the right to write there"
    if status == 404:
        return f"{repo_id} is not there, or the token may not see it ({said})"
    if status == 412:
        return f"{repo_id} keeps changing while this is published ({said}): {WHOLE}"
    if status in TRANSIENT:
        return f"{endpoint} is busy or broken (status {status}, {said}): {WHOLE}"
    return f"{endpoint} refused {repo_id} (status {status}): {said}"
