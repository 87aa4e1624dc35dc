# SPDX-License-Identifier: Apache-2.0
"""Tests the generator of mutated files by default, and many mutants with -m weekly."""

import pytest
from weekly.file_mutations import EXPECTED, mutant, results, seeds

FILES = seeds()


@pytest.mark.parametrize("name", FILES)
def test_a_mutant_is_a_function_of_its_number(name: str) -> None:
    changed = [mutant(FILES[name], number) for number in range(20)]
    assert changed == [mutant(FILES[name], number) for number in range(20)]
    assert len(set(changed)) > 15 and max(map(len, changed)) < len(FILES[name]) + 30


@pytest.mark.weekly
@pytest.mark.parametrize("name", FILES)
def test_a_mutant_is_read_or_rejected(name: str) -> None:
    states = [state for _, state, _ in results(name, 10_000 // len(FILES))]
    assert len(states) >= 10_000 // len(FILES) and set(states) <= set(EXPECTED)
