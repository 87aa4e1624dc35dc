# SPDX-License-Identifier: Apache-2.0
"""Checks the facts in an error message, independent of its wording: keys, values, limits, suggestions."""

import re


def mentions(*parts: object) -> str:
    """Return a pattern for `pytest.raises(match=...)` that matches messages with all parts, in any order.

    The pattern matches only whole parts: `max_step` does not match `max_steps`, and 0 matches neither 10 nor
    0.5.
    """
    return "(?s)" + "".join(f"(?=.*{_whole(part)})" for part in parts)


def missing(message: str, *parts: object) -> list[object]:
    """Return the parts that the message does not contain as a whole."""
    return [part for part in parts if not re.search(_whole(part), message)]


def _whole(part: object) -> str:
    text = str(part)
    if isinstance(part, int | float):
        return rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)"
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    return before + re.escape(text) + after
