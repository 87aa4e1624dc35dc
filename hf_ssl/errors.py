# SPDX-License-Identifier: Apache-2.0
"""The exception for mistakes of the user, and parts of messages and texts that modules share (layer 0)."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """A mistake in a command, a recipe or a data set.

    The message has the form `section.key: expected X, got Y; do Z`. The command line prints it and exits with
    status 2. A script can catch it as a `ValueError`.
    """


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown name.

    It contains the most similar known name. If no name is similar, it contains all names, unless there are
    more than 40.

    Args:
        name: the unknown name.
        known: the known names.
        prefix: text before the similar name, for example the section.
    """
    names = list(known)
    if not names:
        return "none exists"
    close = get_close_matches(name, names, 1, cutoff=0.5)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    if len(names) > 40:
        return f"none of the {len(names)} known names is similar"
    return f"use one of {', '.join(names)}"


def check_name(key: str, name: Any, known: Iterable[Any], expected: str, prefix: str = "") -> None:
    """Raise `UserError` for an unknown name, with a suggestion.

    Args:
        key: key of the value, with its section.
        name: the value.
        known: the values that it may have.
        expected: the known values in words.
        prefix: text before the similar name.
    """
    names = list(known)
    if name not in names:
        raise UserError(f"{key}: expected {expected}, got {name}; {suggestion(str(name), names, prefix)}")


def check_keys(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `UserError` for an unknown key, with a suggestion.

    Args:
        keys: the keys that a section of a recipe contains.
        known: the keys that it may contain.
        where: name of the section.
    """
    names = list(known)
    for key in keys:
        check_name(f"{where}.{key}", key, names, "a known key", f"{where}.")


def check_values(section: str, *rows: tuple[Any, ...]) -> None:
    """Raise `UserError` for the first value outside of its range.

    Args:
        section: name of the section of a recipe.
        rows: (key, value, whether the value is valid, the expected values in words), and the advice, if any.
    """
    for key, value, valid, expected, *advice in rows:
        if not valid:
            sentence = f"{section}.{key}: expected {expected}, got {value!r}"
            raise UserError("; use ".join((sentence, *advice)))


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "50,000 images".

    Args:
        number: the number.
        noun: the singular of the noun, for example "labeled image".
        plural: its plural; None: the singular with "s".
    """
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun if number == 1 else plural or noun + 's'}"


def one_line(message: BaseException | str) -> str:
    """Return a message, for example that of an error, without line breaks."""
    return " ".join(str(message).split())


def loading_reason(error: BaseException) -> str:
    """Return the first line of a loading error, or a new sentence if the line does not say what to do.

    transformers (5.20 to 5.24) names the argument `trust_remote_code` in its error. hf_ssl never sets it to
    True. Without `trust_remote_code=False`, transformers asks on standard input and runs the code after "y".
    """
    if "trust_remote_code" in str(error):
        return (
            "transformers has no class for it, and hf_ssl does not run the code that its auto_map names; "
            "use a model type of transformers, or load it yourself and pass the object to evaluate_encoder"
        )
    if "couldn't find them in the cached files" in str(error):
        return "there is no such folder, and the Hub cannot be reached; check the path"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if there is no message."""
    return str(error).strip().split("\n")[0] or type(error).__name__
