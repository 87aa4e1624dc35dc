# SPDX-License-Identifier: Apache-2.0
"""Short names that differ, and one text instead of several similar ones (layer 3)."""

import re
from collections.abc import Sequence

from hf_ssl.evaluation.scores import EDGE

_NUMBER = re.compile(r"(\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)")


def distinguished(parts: list[list[str]]) -> list[str]:
    """Return different texts: the first part, and those further parts that distinguish equal texts.

    Args:
        parts: for each text, the same number of parts. Texts whose parts are all equal get numbers.
    """
    texts = [first for first, *_ in parts]
    for number in range(1, max(map(len, parts), default=1)):
        values: dict[str, set[str]] = {}
        for text, own in zip(texts, parts, strict=True):
            values.setdefault(text, set()).add(own[number])
        texts = [
            f"{text}, {own[number]}" if len(values[text]) > 1 and own[number] else text
            for text, own in zip(texts, parts, strict=True)
        ]
    seen: dict[str, int] = {}
    for position, text in enumerate(texts):
        seen[text] = seen.get(text, 0) + 1
        if seen[text] > 1:
            texts[position] = f"{text} ({seen[text]})"
    return texts


def joined(texts: Sequence[str]) -> str:
    """Return one text for several texts. Numbers that differ become a range, such as "0.1 to 1".

    Texts that differ in more than numbers follow each other. If only some texts report the edge of a sweep,
    the result says so at the end.
    """
    at_edge = [EDGE in text for text in texts]
    if any(at_edge) and not all(at_edge):
        plain = joined([text.replace(EDGE, "") for text in texts])
        where = EDGE.strip(" ()")
        return f"{plain}. In {sum(at_edge)} of {len(texts)} results, the selected value is {where}"
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for text in dict.fromkeys(texts):
        parts = _NUMBER.split(text)
        alike.setdefault(tuple(parts[::2]), []).append(parts)
    return "; or: ".join("".join(map(_range, zip(*group, strict=True))) for group in alike.values())


def _range(same: tuple[str, ...]) -> str:
    """Return the text that several texts have at one position, or the range of their numbers."""
    if len(set(same)) == 1:
        return same[0]
    ordered = sorted(same, key=lambda number: float(number.replace(",", "")))
    return f"{ordered[0]} to {ordered[-1]}"
