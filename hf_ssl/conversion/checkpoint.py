# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a checkpoint without running code that the file contains."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_ssl.errors import UserError, first_line

StateDict = dict[str, Tensor]
_DEEPEST = 6
_HARMLESS: list[Any] = [argparse.Namespace]
"""Classes that a checkpoint may contain. Their constructors only set attributes.

The full checkpoints of DINO contain the arguments of the training as a `Namespace`.
"""
_CLASS = re.compile(r"GLOBAL (\S+)")
_DAMAGED = ("unexpected EOF", "central directory", "corrupted", "Ran out of input", "underflow")


def read_checkpoint(file: Path, entry: str) -> Mapping[str, Any]:
    """Return the content of a file of `torch.save` or safetensors: dicts of tensors and plain values.

    `torch.load` gets `weights_only=True`, so no code of the file runs. Large files are read on demand.

    Args:
        file: the checkpoint.
        entry: keys of the dict with the weights, for messages: "state_dict".

    Raises:
        UserError: the file is missing, is damaged, is another file, or contains objects of other classes.
    """
    if file.is_dir():
        raise UserError(
            f"{file}: expected a file, got a folder; an encoder needs only hf-ssl evaluate {file}"
        )
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise UserError(
            f"{file}: expected a readable file, got an error ({error.strerror}); check the path"
        ) from error
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return _read_safetensors(file)
    if not start.startswith((b"PK", b"\x80")):
        kind = "an empty file" if not start else "another file, such as a web page"
        raise UserError(f"{file}: expected a file of torch.save, got {kind}; download the checkpoint again")
    is_zip = zipfile.is_zipfile(file)
    if start.startswith(b"PK") and not is_zip:
        raise _damaged(file)
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many types for damaged and other files
        raise _read_error(file, error, entry) from error
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UserError(
            f"{file}: expected a dict of tensors, got a {type(content).__name__}; save a state dict instead"
        )
    return content


def _read_safetensors(file: Path) -> StateDict:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: expected a complete safetensors file, got: {first_line(error)}; download it again"
        ) from error


def _damaged(file: Path) -> UserError:
    return UserError(
        f"{file}: expected a complete file, got a damaged one of {file.stat().st_size:,} bytes; download it "
        "again"
    )


def _read_error(file: Path, error: Exception, entry: str) -> UserError:
    """Return the message for an error of `torch.load`."""
    text = str(error)
    found = _CLASS.search(text)
    keys = "".join(f"[{key!r}]" for key in entry.split("/") if key)
    if found is not None:
        return UserError(
            f"{file}: expected tensors and plain values, got {found[1]}, which could run code; only if you "
            'trust the file, save its weights alone: python -c "import torch; torch.save(torch.load('
            f"{str(file)!r}, weights_only=False){keys}, 'weights.pth')\""
        )
    if isinstance(error, EOFError) or any(word in text for word in _DAMAGED):
        return _damaged(file)
    kind = "a TorchScript archive" if "TorchScript" in text else "another file"
    if isinstance(error, pickle.UnpicklingError):
        kind = "another pickle"
    return UserError(
        f"{file}: expected a file of torch.save with tensors, got {kind}; save the state dict of the model"
    )


def state_dicts(content: Mapping[str, Any]) -> dict[str, StateDict]:
    """Return {its keys: dict of tensors} at any depth. The keys are "" for the file itself, or "a/b"."""
    found: dict[str, StateDict] = {}

    def visit(values: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        tensors = {
            key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)
        }
        if tensors:
            found["/".join(path)] = tensors
        for key, value in values.items():
            if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEEPEST:
                visit(value, (*path, key))

    visit(content, ())
    return found
