# SPDX-License-Identifier: Apache-2.0
"""Writing files so that none is ever half there, and saying in one sentence when it cannot be done."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_ssl.errors import UserError


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk, a missing permission or any other failure of the file system into a UserError.

    what: "the encoder to my_encoder": the sentence is "cannot write <what>: <reason>."
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}.") from error
    except SafetensorError as error:  # its writer has an error of its own for a full disk
        raise UserError(f"cannot write {what}: {error}.") from error


def use_normal_permissions(folder: Path) -> None:
    """Give the weight files in a folder the permissions of the configuration file beside them.

    safetensors (seen with 0.8.0) creates files that only their owner can read, whatever the umask says. Other
    users of the machine and a web server then cannot load the encoder.
    """
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one go: it is whole or as it was. Makes the folder.

    Raises:
        UserError: the file cannot be written.
    """
    # A name with a leading underscore is never published, should a crash leave it behind.
    staged = path.with_name(f"_{path.name}.part")
    with disk_errors(f"{path.name} to {path.parent.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """As `replace_text`, for plain data without NaN or infinity, which JSON does not have."""
    replace_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `replace_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Plain data from a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path.name} in {path.parent.name}: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise UserError(f"expected JSON in {path.name} in {path.parent.name}, got: {error}.") from error
