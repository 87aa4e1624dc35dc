# SPDX-License-Identifier: Apache-2.0
"""Tests of the check that a folder is new or empty."""

from pathlib import Path

import pytest
from messages import mentions

from hf_ssl.errors import UserError
from hf_ssl.files import check_new_or_empty


def test_new_and_empty_folders_pass_and_others_are_named(tmp_path: Path) -> None:
    check_new_or_empty(tmp_path, "export")
    check_new_or_empty(tmp_path / "new" / "folder", "export")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for path, parts in (
        (tmp_path / "file", ["is not a folder"]),
        (tmp_path / "link", ["is not a folder"]),
    ):
        with pytest.raises(UserError, match=mentions("export", path.name, *parts)):
            check_new_or_empty(path, "export")
    with pytest.raises(UserError, match=mentions("or a Space", tmp_path.name)):
        check_new_or_empty(tmp_path, "space", " or a Space")
