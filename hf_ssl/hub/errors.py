# SPDX-License-Identifier: Apache-2.0
"""Turns errors of the Hub, its client and the network into a UserError."""

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

NO_TOKEN = "expected a token of the Hub with write access, found none; run `hf auth login` or set HF_TOKEN"
# A commit changes the repository in one step, so it is either complete or absent.
UNCHANGED = "the repository is unchanged; run the same command again"
TRANSIENT_STATUS = (408, 412, 425, 429, 500, 502, 503, 504)
_NO_XET = "xet-write-token"  # the request that fails on a hub without Xet


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub, its client and the network into a UserError.

    Args:
        repo_id: the name of the repository, as the user typed it.
        endpoint: the address of the Hub.

    Raises:
        UserError: the block raised such an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = hub_error(root_cause(error), repo_id, endpoint)
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


def hub_error(error: BaseException, repo_id: str, endpoint: str) -> str | None:
    """Return the message for an error of the Hub, its client or the network, else None."""
    reason = " ".join(str(error).split())
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
    reason = error.server_message or error.response.reason_phrase or "no reason given"
    reason = " ".join(reason.split()).rstrip(".")
    if status == 401:
        return (
            f"{endpoint}: expected a valid token, got status 401 ({reason}); run `hf auth login`, or set "
            "HF_TOKEN to another token"
        )
    if status == 403:
        return f"{repo_id}: expected a token with write access, got status 403 ({reason}); use another one"
    if status == 404:
        return f"{repo_id}: expected a repository, got status 404 ({reason}); check the name and the token"
    if status == 412:
        return f"{repo_id}: expected no other commits during the upload, got some ({reason}); {UNCHANGED}"
    if status in TRANSIENT_STATUS:
        return f"{endpoint}: the server is busy or broken (status {status}, {reason}); {UNCHANGED}"
    return f"{repo_id}: expected {endpoint} to accept the request, got status {status} ({reason})"
