# SPDX-License-Identifier: Apache-2.0
"""Runs the tests with the oldest and the newest versions that pyproject.toml allows, in new environments."""

import re

import pytest
from weekly import versions


def test_every_dependency_has_an_oldest_version() -> None:
    constraints = versions.oldest()
    assert {"torch", "transformers", "datasets", "gradio", "timm"} <= {
        c.partition("==")[0] for c in constraints
    }
    assert all(re.fullmatch(r"[\w.-]+==\d+(\.\d+)*", constraint) for constraint in constraints)


@pytest.mark.weekly
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_default_tests_pass(which: str) -> None:
    assert versions.run(which, ["-q"]) == pytest.ExitCode.OK
