# SPDX-License-Identifier: Apache-2.0
"""The common tests of transformers pass on all methods (`-m weekly`), and the committed counts say so."""

import json

import pytest
from weekly.transformers_tests import RECORD, main


@pytest.mark.weekly
def test_the_common_tests_of_transformers_pass() -> None:
    assert main([]) == 0


def test_the_committed_counts_have_no_failure() -> None:
    record = json.loads(RECORD.read_text())
    assert record["passed"] > 1000 and not record.get("failed") and not record.get("error")
