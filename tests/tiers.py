# SPDX-License-Identifier: Apache-2.0
"""Grids in two tiers: the default tests run a sample of the cases, and `pytest -m slow` runs the others."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def in_tiers(cases: Iterable[tuple], sampled: Collection[tuple], *, as_one: bool = False) -> list[Any]:
    """Return the cases as parameters of a test, with the mark `slow` for those that are not sampled.

    With `as_one`, each case is one value, as a fixture needs it.
    """
    cases = list(cases)
    unknown = [case for case in sampled if case not in cases]
    assert not unknown, f"expected sampled cases to be cases, got {unknown}"
    return [
        pytest.param(
            *([case] if as_one else case),
            id="-".join(map(str, case)),
            marks=[] if case in sampled else pytest.mark.slow,
        )
        for case in cases
    ]
