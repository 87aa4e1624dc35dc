# SPDX-License-Identifier: Apache-2.0
"""The last look before files leave this machine: tokens, home folders, user names, local paths."""

import getpass
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_ssl.errors import UserError
from hf_ssl.hub.privacy import SECRET_KEY, TOKEN, URL

TEXT = (".json", ".md", ".yaml", ".yml", ".txt", ".py")
CODE = ".py"
WEIGHTS = (".safetensors",)
UNREAD = (".pt", ".pth")  # what training needs to go on: tensors, and large
LONGEST_HEADER = 100_000_000  # as safetensors says
MOST_BYTES = 1 << 20  # read of a file that is neither text nor weights
SHORTEST_SECRET = 8
HOMES = re.compile(
    r"(?:file:///[^\s\"']*|(?<![\w.:/~-])(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[^/\\\s\"']+)"
)
ABSOLUTE = re.compile(r"(?:/[^/\s]+/|~/|[A-Za-z]:[\\/]|\\\\)\S")


@dataclass(frozen=True)
class Secrets:
    """What must not be in a published file.

    Attributes:
        literal: text to look for, by what to call it in a sentence.
        user: the name of the account; matters where it stands in a path or before an @, for many names are
            words as well.
    """

    literal: dict[str, str] = field(default_factory=dict)
    user: str | None = None


def secrets_here(*folders: Path, token: str | None = None) -> Secrets:
    """What is to be kept of this machine: the token, secrets in environment variables, the home folder, the
    account, and where `folders` lie."""
    literal = {}
    for known in (token, get_token()):
        if known:
            literal["a token of the Hub"] = known
    for name, value in os.environ.items():
        if SECRET_KEY.search(name.lower()) and len(value) >= SHORTEST_SECRET:
            literal[f"the value of the environment variable {name}"] = value
    home = Path.home()
    if len(home.parts) > 1:
        literal["the path of a home folder"] = f"{home}{os.sep}"
    for folder in folders:
        if len(folder.resolve().parts) > 2:
            literal[f"the path of {folder.name}"] = str(folder.resolve())
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such account, as in some containers
        user = None
    return Secrets(literal, user)


def check_leaks(files: Mapping[str, Path | bytes], secrets: Secrets) -> None:
    """Refuse to publish files that say more than they should.

    Args:
        files: by path in the repo. Of weights the header is read, of other binary files the beginning.
        secrets: what to look for beside what looks like a token, a home folder or (in JSON) a local path.

    Raises:
        UserError: names the first such file, and what was found in it; a secret is not repeated.
    """
    for name, source in files.items():
        found = next(leaks(name, source, secrets), None)
        if found is not None:
            raise UserError(f"nothing was published: {name} holds {found}; take it out and publish again")


def leaks(name: str, source: Path | bytes, secrets: Secrets) -> Iterator[str]:
    """What a file should not hold, in words."""
    text = _read(name, source)
    for what, value in secrets.literal.items():
        if value in text or json.dumps(value)[1:-1] in text:
            yield what
    if TOKEN.search(text):
        yield "what looks like a token of the Hub"
    path = None if name.endswith(CODE) else HOMES.search(text)  # code may speak of paths
    if path is not None:
        yield f"the path {path[0]!r} of a home folder"
    if not name.endswith(TEXT) or name.endswith(CODE):
        return
    if secrets.user is not None and _names(secrets.user, URL.sub("", text)):
        yield f"the name of your account, {secrets.user!r}, in a path or an address"
    if name.endswith(".json"):
        for value in _strings(name, text):
            if ABSOLUTE.match(value):
                yield f"the path {value!r} of this machine"


def _read(name: str, source: Path | bytes) -> str:
    """The part of a file that may hold words."""
    if name.endswith(UNREAD):
        return ""
    if isinstance(source, bytes):
        return source.decode("utf-8", errors="replace")
    with source.open("rb") as file:
        if name.endswith(WEIGHTS):
            content = file.read(min(int.from_bytes(file.read(8), "little"), LONGEST_HEADER))
        else:
            content = file.read() if name.endswith(TEXT) else file.read(MOST_BYTES)
    return content.decode("utf-8", errors="replace")


def _names(user: str, text: str) -> bool:
    """Whether an account's name stands in an absolute path or before an @."""
    name = re.escape(user)
    inside = rf"(?<![\w.:/\\~-])(?:[/\\][\w.-]+)*[/\\]{name}(?![\w-])"
    return bool(re.search(rf"(?<![\w.-]){name}@[\w-]|{inside}", text))


def _strings(name: str, text: str) -> Iterator[str]:
    """Every text value of a JSON file, at any depth."""
    try:
        left: list[Any] = [json.loads(text)]
    except ValueError as error:
        raise UserError(f"expected JSON in {name}, got: {error}") from error
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
