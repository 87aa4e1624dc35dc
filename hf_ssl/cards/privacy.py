# SPDX-License-Identifier: Apache-2.0
"""Removes private information from plain data: tokens, passwords and the locations of folders."""

import math
import re
import sys
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_key)$")
# A string that is a path: absolute, in a home folder, relative with dots, or of Windows.
PATH = re.compile(r"^(/|~|\.{1,2}[/\\]|\\\\|[A-Za-z]:[/\\])")
# An absolute path inside a text: at least one folder and a name, and no word character before it.
INNER_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;]+[/\\])+([^\s/\\'\",;]*)")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
REMOVED = "(removed)"


def public(value: Any) -> Any:
    """Return a copy of plain data without private information, at any depth.

    Paths are replaced by their last part. Values of keys that name a secret (`hub_token`) and texts that look
    like a token of the Hub are removed. URLs lose their user, password and query. Numbers that are not finite
    become None, because JSON cannot store them. Tuples become lists, and tensors and arrays with one element
    become numbers.

    Raises:
        TypeError: a value is not plain data.
    """
    if isinstance(value, dict):
        return {str(key): public(item) for key, item in value.items() if not _is_secret(key, item)}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, np.generic) or _is_tensor(value):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    raise TypeError(f"facts: expected plain data, got {type(value).__name__}")


def public_text(text: str) -> str:
    """Return a text without private information, see `public`."""
    text = TOKEN.sub(REMOVED, text)
    key, equals, rest = text.partition("=")
    if equals and re.fullmatch(r"[\w.]+", key):  # section.key=value: the value may be a path with spaces
        return text if _is_secret(key, "") and not rest else f"{key}={_public_value(key, rest)}"
    if PATH.match(text):
        return last_part(text)
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


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # importing torch takes seconds; without it there are no tensors
    return torch is not None and isinstance(value, torch.Tensor)


def _public_value(key: str, text: str) -> str:
    return REMOVED if _is_secret(key.rpartition(".")[2], text) else public_text(text)


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(SECRET_KEY.search(str(key).rpartition(".")[2]))


def _public_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return last_part(parts.path)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
