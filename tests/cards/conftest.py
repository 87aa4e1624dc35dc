# SPDX-License-Identifier: Apache-2.0
"""The fixture of the tests of cards."""

from typing import Any

import pytest
from example_facts import new_facts


@pytest.fixture
def facts() -> dict[str, Any]:
    return new_facts()
