# SPDX-License-Identifier: Apache-2.0
"""Private information: tokens, passwords, user names and the locations of folders.

`remove_private` removes it from plain data, and `public_facts` from the facts of a run. `check_leaks`
searches for it in files before they are published.
"""

import getpass
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import yaml
from huggingface_hub import get_token

from hf_ssl.cards.facts import Facts, check_facts
from hf_ssl.data.location import DIGITS
from hf_ssl.errors import UserError
from hf_ssl.files import local_folder

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)$")
# A string that is a path: absolute, in a home folder, relative with dots, or of Windows.
PATH = re.compile(r"^(/|~|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\])")
# An absolute path inside a text: at least one folder and a name, and no word character before it.
INNER_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;]+[/\\])+([^\s/\\'\",;]*)")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
REMOVED = "(removed)"


def remove_private(value: Any) -> Any:
    """Return a copy of plain data without private information, at any depth.

    Paths are replaced by their last part. Values of keys that name a secret (`hub_token`) and texts that look
    like a token of the Hub are removed. URLs lose their user, password and query. Numbers that are not finite
    become None, because JSON cannot store them. Tuples become lists, and tensors and arrays with one element
    become numbers.

    Raises:
        TypeError: a value is not plain data.
    """
    if isinstance(value, dict):
        return {str(key): remove_private(item) for key, item in value.items() if not _is_secret(key, item)}
    if isinstance(value, list | tuple):
        return [remove_private(item) for item in value]
    if isinstance(value, str):
        return remove_private_text(value)
    if isinstance(value, np.generic) or _is_tensor(value):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    raise TypeError(f"facts: expected plain data, got {type(value).__name__}")


def remove_private_text(text: str) -> str:
    """Return a text without private information, see `remove_private`."""
    text = TOKEN.sub(REMOVED, text)
    key, equals, rest = text.partition("=")
    if equals and re.fullmatch(r"[\w.]+", key):  # section.key=value: the value may be a path with spaces
        secret = _is_secret(key, rest)
        if secret and not rest:
            return text
        return f"{key}={REMOVED if secret else remove_private_text(rest)}"
    if PATH.match(text):
        name = last_part(text)
        return text if text == f"./{name}" else name  # "./" distinguishes a folder from a data set on the Hub
    urls = URL.findall(text)
    for number, url in enumerate(urls):
        text = text.replace(url, f"\0{number}\0")  # the slashes of a URL are not a local path
    text = INNER_PATH.sub(lambda found: found[1], text)
    for number, url in enumerate(urls):
        text = text.replace(f"\0{number}\0", _public_url(url))
    return text


def last_part(path: str) -> str:
    """Return the last part of a path of any operating system: "dogs" for "/home/me/dogs/"."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "."


def folder_name(folder: str | Path) -> str:
    """Return the name of a folder, also of "."; for a link, this is the name of the link."""
    return last_part(os.path.abspath(folder))


def encoder_name(place: str) -> str:
    """Return the name of an encoder in tables and pictures: that of its folder, or its Hub id."""
    folder = local_folder(place)
    return place if folder is None else folder_name(folder)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # importing torch takes seconds; without it there are no tensors
    return torch is not None and isinstance(value, torch.Tensor)


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(SECRET_KEY.search(str(key).rpartition(".")[2]))


def _public_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return last_part(parts.path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


TEXT = (".json", ".md", ".yaml", ".yml", ".txt", ".py")
CODE = ".py"
WEIGHTS = (".safetensors",)
LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors
MOST_BYTES = 1 << 20  # the part that is read of a file that is neither text nor weights
SHORTEST_SECRET = 8  # characters; shorter values of environment variables are not secrets
HOMES = re.compile(
    r"(?:file:///[^\s\"']*|(?<![\w.:/~-])(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[^/\\\s\"']+)"
)
ABSOLUTE = re.compile(r"(?:/[^/\s]+/|~/|[A-Za-z]:[\\/]|\\\\)\S")


@dataclass(frozen=True)
class Secrets:
    """Texts that a published file must not contain.

    Attributes:
        literal: the forbidden texts by their description for error messages.
        user: the name of the account. It is forbidden only in a path or before an @, because many names are
            also ordinary words.
    """

    literal: dict[str, str] = field(default_factory=dict)
    user: str | None = None


def local_secrets(folder: Path, token: str | None = None) -> Secrets:
    """Return the secrets of this machine.

    These are the tokens, the secrets in environment variables, and the name of the account. The paths of the
    home folder, the published folder and the working directory are also secrets.
    """
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
    for what, path in (("published folder", folder.resolve()), ("working directory", Path.cwd())):
        if len(path.parts) > 2:
            literal[f"the path of the {what}"] = str(path)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the account does not exist, as in some containers
        user = None
    return Secrets(literal, user)


def check_leaks(files: Mapping[str, Path | bytes], secrets: Secrets) -> None:
    """Raise an error if a file contains private information.

    Args:
        files: the files by their path in the repository. The function reads the header of weights and the
            first MiB of other binary files.
        secrets: the forbidden texts. The function also searches for tokens, home folders, and (in JSON) local
            paths.

    Raises:
        UserError: names the first such file and the kind of information; it does not repeat a secret.
    """
    for name, source in files.items():
        found = next(leaks(name, source, secrets), None)
        if found is not None:
            raise UserError(
                f"{name}: expected no private information, got {found}; remove it and publish again"
            )


def leaks(name: str, source: Path | bytes, secrets: Secrets) -> Iterator[str]:
    """Yield a description of each piece of private information in a file."""
    text = _read(name, source)
    for what, value in secrets.literal.items():
        if value in text or json.dumps(value)[1:-1] in text:
            yield what
    if TOKEN.search(text):
        yield "a text that looks like a token of the Hub"
    path = None if name.endswith(CODE) else HOMES.search(text)  # code may contain examples of paths
    if path is not None:
        yield f"the path {path[0]!r} of a home folder"
    if not name.endswith(TEXT) or name.endswith(CODE):
        return
    if secrets.user is not None and _contains_account(secrets.user, URL.sub("", text)):
        yield f"the name of your account, {secrets.user!r}, in a path or an address"
    if name.endswith(".json"):
        for value in _strings(name, text):
            if ABSOLUTE.match(value):
                yield f"the path {value!r} of this machine"


def _read(name: str, source: Path | bytes) -> str:
    """Return the part of a file that can contain text."""
    if isinstance(source, bytes):
        return source.decode("utf-8", errors="replace")
    with source.open("rb") as file:
        if name.endswith(WEIGHTS):
            content = file.read(min(int.from_bytes(file.read(8), "little"), LONGEST_HEADER))
        else:
            content = file.read() if name.endswith(TEXT) else file.read(MOST_BYTES)
    return content.decode("utf-8", errors="replace")


def _contains_account(user: str, text: str) -> bool:
    """Return whether the name of an account occurs in an absolute path or before an @."""
    name = re.escape(user)
    inside = rf"(?<![\w.:/\\~-])(?:[/\\][\w.-]+)*[/\\]{name}(?![\w-])"
    return bool(re.search(rf"(?<![\w.-]){name}@[\w-]|{inside}", text))


def _strings(name: str, text: str) -> Iterator[str]:
    """Yield every text in a JSON file, at any depth."""
    try:
        pending: list[Any] = [json.loads(text)]
    except ValueError as error:
        raise UserError(f"{name}: expected JSON, got another format ({error}); correct the file") from error
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


def local_path(name: str) -> str:
    """Return `data.path` for the recorded name of data that are not on the Hub; "./" marks a local folder."""
    return name if name == DIGITS or name.startswith("./") else f"./{name}"


def public_facts(facts: Any) -> Facts:
    """Return a checked copy of `facts` for publication, as plain data for JSON.

    Local paths are replaced by their last part, tokens are removed, and numbers that are not finite become
    None.

    Raises:
        UserError: the same errors as `check_facts`.
    """
    facts = remove_private(check_facts(facts))
    sections, differences = facts["recipe"]["sections"], facts["recipe"]["differences"]
    for section, source in (("data", facts["data"]), ("evaluation", facts["evaluation"])):
        # "photos/dogs" may be a Hub id or a folder. Only hub_id distinguishes them.
        if source is not None and source["hub_id"] is None and sections.get(section, {}).get("path"):
            sections[section]["path"] = path = local_path(source["name"])
            if f"{section}.path" in differences:
                differences[f"{section}.path"] = path
    facts["recipe"]["overrides"] = [_public_override(text, sections) for text in facts["recipe"]["overrides"]]
    return cast(Facts, facts)


def _public_override(text: str, sections: dict[str, Any]) -> str:
    """Return an override of the recipe, with a path replaced by the public one in `sections`."""
    key, equals, value = text.partition("=")
    section, dot, field = key.partition(".")
    if field == "path" and section in sections:
        return f"{key}{equals}{sections[section]['path']}"
    whole = yaml.safe_load(value) if not dot and section in sections else None
    if isinstance(whole, dict) and "path" in whole:  # section={key: value}; JSON is YAML
        return f"{key}={json.dumps(whole | {'path': sections[section]['path']}, ensure_ascii=False)}"
    return text
