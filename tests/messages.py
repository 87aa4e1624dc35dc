# SPDX-License-Identifier: Apache-2.0
"""What an error message must name, whatever its words: keys, values, limits, suggestions."""

import re


def mentions(*parts: object) -> str:
    """Return a pattern for `pytest.raises(match=...)` that finds messages with all parts, in any order.

    A part is found as a whole: `max_step` not in `max_steps`, 0 neither in 10 nor in 0.5.
    """
    return "(?s)" + "".join(f"(?=.*{_whole(part)})" for part in parts)


def missing(message: str, *parts: object) -> list[object]:
    """Return the parts that a message does not hold as a whole."""
    return [part for part in parts if not re.search(_whole(part), message)]


def _whole(part: object) -> str:
    text = str(part)
    if isinstance(part, int | float):
        return rf"(?<![\w.]){re.escape(text)}(?!\w|\.\d)"
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    return before + re.escape(text) + after
