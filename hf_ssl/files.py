# SPDX-License-Identifier: Apache-2.0
"""Writes files and folders completely or not at all, and explains errors of the disk (layer 0)."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_ssl.errors import UserError, one_line

STAGING_PREFIX = "_writing-"
"""Prefix of incomplete files and folders. `hf-ssl publish` uploads no name with a leading underscore."""
RUN_LOCK = "_run.lock"
"""Name of the file in the output folder that a run locks while it trains."""
METHOD_MODEL = "pretraining"
"""Folder of the method model, beside the files of its exported encoder."""
SAVED_FILES = "all files that were saved before are complete"
# torch.save and safetensors report a full disk in their own errors
_DISK_FULL = ("No space left", "os error 28", "PytorchStreamWriter", "write failed")


def local_folder(place: str | Path) -> Path | None:
    """Return the local folder that a place names, with "~" as the home folder; None for a Hub id.

    A folder precedes a repository on the Hub with the same name.
    """
    folder = Path(place).expanduser()
    return folder if folder.is_dir() else None


def local_or_hub(place: str | Path) -> str:
    """Return the local folder that a place names, else the Hub id, for `from_pretrained`."""
    return str(local_folder(place) or place)


def staging_path(final: Path) -> Path:
    """Return the path where a file or folder is written before it gets its name."""
    return final.with_name(f"{STAGING_PREFIX}{final.name}")


def disk_error_reason(error: BaseException) -> str | None:
    """Return the reason if the error comes from the file system, else None."""
    if isinstance(error, OSError):
        return "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror or str(error)
    if isinstance(error, RuntimeError | SafetensorError) and any(text in str(error) for text in _DISK_FULL):
        return "no space left on the disk"
    return str(error) if isinstance(error, SafetensorError) else None


@contextmanager
def disk_errors_as_user_errors(what: str) -> Iterator[None]:
    """Turn a full disk, a missing permission and other errors of the file system into a UserError.

    Args:
        what: the object that the block writes, e.g. "checkpoint-100 to runs/photos".

    Raises:
        UserError: the block raised such an error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_error_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {what}: {reason}; {SAVED_FILES}") from error


@contextmanager
def replaced_file(final: Path) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces `final` at the end of the block.

    If the block raises, `final` stays as it was. The folder of `final` is created if it does not exist.

    Raises:
        UserError: the file cannot be written.
    """
    staging = staging_path(final)
    with disk_errors_as_user_errors(f"{final.name} to {final.parent.name or final.parent}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staging
            os.replace(staging, final)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def replaced_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it replaces the folder `final` at the end of the block.

    If the block raises, `final` stays as it was. Weight files get normal permissions. If `final` is a
    symbolic link to a folder, the linked folder is replaced, because a folder cannot be moved onto a link.

    Raises:
        UserError: the folder cannot be written.
    """
    final = final.resolve()
    staging = staging_path(final)
    shutil.rmtree(staging, ignore_errors=True)
    with disk_errors_as_user_errors(f"{final.name} to {final.parent.name or final.parent}"):
        try:
            staging.mkdir(parents=True)
            yield staging
            use_normal_permissions(staging)
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def remove_incomplete(root: Path) -> None:
    """Delete the incomplete files and folders that a killed process left in a folder."""
    for staging in root.glob(f"{STAGING_PREFIX}*"):
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
        else:
            staging.unlink(missing_ok=True)


def check_new_or_empty(folder: Path, where: str, other: str = "") -> None:
    """Check that a folder does not exist or is empty, before a command writes to it.

    Incomplete files and the lock of a killed process do not count.

    Args:
        folder: the folder.
        where: the command or the key that names the folder, for messages.
        other: other folders that the command accepts, for messages: " or a Space".

    Raises:
        UserError: the folder contains files, is a file, or cannot be read.
    """
    try:
        files = folder.iterdir() if folder.is_dir() else ()
        found = next((file for file in files if not file.name.startswith((STAGING_PREFIX, RUN_LOCK))), None)
        if found is None and (folder.is_dir() or not os.path.lexists(folder)):
            return
    except OSError as error:
        raise UserError(f"{where}: expected a readable folder, got {folder}: {error.strerror}") from error
    problem = "is not a folder" if found is None else f"contains {found.name}"
    raise UserError(
        f"{where}: expected a new or empty folder{other}, got {folder}, which {problem}; use another folder"
    )


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-N` in the output folder of a run, sorted by the step N.

    Other names, such as `checkpoint-12-old`, and files do not count.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in entries if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def newest_checkpoint(folder: Path, last_file: str | None = None) -> Path | None:
    """Return the last one of `all_checkpoints`, or None.

    Args:
        folder: the output folder of a run.
        last_file: the file that a writer of checkpoints writes last. Checkpoints without it do not count.
    """
    found = reversed(all_checkpoints(folder))
    return next((path for path in found if last_file is None or (path / last_file).exists()), None)


def delete_old_checkpoints(folder: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints above a limit, but neither the newest nor the best one.

    `rotate_checkpoints` of transformers also counts and deletes folders such as `checkpoint-12-old`.

    Args:
        folder: the output folder of a run.
        limit: largest number of checkpoints; None or 0 for no limit.
        best: the checkpoint of the best model.
    """
    found = all_checkpoints(folder)
    too_many = max(0, len(found) - limit) if limit else 0
    for path in [path for path in found[:-1] if path != best][:too_many]:
        shutil.rmtree(path, ignore_errors=True)


def use_normal_permissions(folder: Path) -> None:
    """Give the weight files in a folder the permissions of the configuration file beside them.

    safetensors (seen with 0.8.0) creates files that only their owner can read, regardless of the umask. Other
    users of the machine and a web server then cannot load the encoder.
    """
    for weights in folder.rglob("*.safetensors"):
        configuration = weights.with_name("config.json")
        if configuration.exists():
            shutil.copymode(configuration, weights)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with replaced_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, completely or not at all; NaN and infinity raise ValueError."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Return the data in a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, or does not contain JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: expected a readable file, got an error: {disk_error_reason(error)}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: expected JSON, got an error: {one_line(error)}; restore this file, or delete it and "
            "repeat the command that wrote it"
        ) from error
