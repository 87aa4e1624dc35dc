# SPDX-License-Identifier: Apache-2.0
"""New, empty and replaced folders, and the checkpoints in a folder."""

from pathlib import Path

import pytest
from messages import mentions

from hf_ssl.errors import UserError
from hf_ssl.files import (
    check_new_or_empty,
    delete_old_checkpoints,
    newest_checkpoint,
    read_json,
    replaced_folder,
)


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


def test_old_checkpoints_are_deleted_and_other_folders_stay(tmp_path: Path) -> None:
    others = {"checkpoint-1-old", "checkpoint-best", "my-checkpoint-2"}
    for name in (*others, *(f"checkpoint-{step}" for step in (8, 9, 10, 11))):
        (tmp_path / name).mkdir()

    def left() -> list[str]:
        names = {path.name for path in tmp_path.iterdir()}
        assert others <= names
        return sorted(names - others)

    for unlimited in (None, 0, 4):
        delete_old_checkpoints(tmp_path, unlimited, None)
        assert len(left()) == 4
    delete_old_checkpoints(tmp_path, 3, tmp_path / "checkpoint-8")
    assert left() == ["checkpoint-10", "checkpoint-11", "checkpoint-8"]
    delete_old_checkpoints(tmp_path, 1, tmp_path / "checkpoint-8")
    assert left() == ["checkpoint-11", "checkpoint-8"]
    delete_old_checkpoints(tmp_path, 1, None)
    assert left() == ["checkpoint-11"]


def test_a_file_that_is_not_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("{")
    Path("b.json").write_bytes(b"\xff")
    for name, part in (("a.json", "JSON"), ("b.json", "JSON"), ("c.json", "No such file")):
        with pytest.raises(UserError, match=mentions(f"{name}: expected", part)):
            read_json(Path(name))


def test_the_newest_checkpoint_can_be_a_complete_one(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9" / "last.json").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert newest_checkpoint(tmp_path, "last.json") == tmp_path / "checkpoint-9"
    assert newest_checkpoint(tmp_path, "other.json") is None


def test_a_link_to_a_folder_stays_and_its_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with replaced_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["real", "new"]
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "link"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["real", "new"]
